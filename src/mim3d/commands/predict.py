"""The command that brings scans through trained networks, each on its own grid."""

from mim3d.core.command import command
from mim3d.workflows.predict import PredictSettings, predict_scans


@command(PredictSettings)
def predict(settings: PredictSettings) -> str:
    """Segment scans with a fine-tuned network, or with several that answer together.

    Every scan gives one label map on its own grid and orientation, OUT/<id>.nii.gz (or .nrrd, .mha, as its source);
    OUT/predictions.json lists them. May be stopped and run again: what is finished is kept. A scan that cannot be used
    is listed with its reason and does not stop the others. Weights of a classifier give a table of classes instead.
    """
    return predict_scans(settings)
