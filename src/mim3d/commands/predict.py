"""``mim3d predict``: scans through trained networks, each on its own grid."""

from mim3d.core.types import Named
from mim3d.tasks.contract import Format, PredictionSettings


def predict(
    weights: str | list[str],
    out: str,
    input: str | list[str] | None = None,
    overlap: float | None = None,
    batch_size: int = 4,
    mirror: bool | None = None,
    body_only: bool = True,
    probabilities: bool = False,
    largest_component: bool | list[str] = False,
    min_component_ml: float = 0.0,
    format: Format = "auto",
    task: str | None = None,
    backbone: Named | None = None,
    accelerator: str = "auto",
    overwrite: bool = False,
) -> str:
    """Segment scans with a fine-tuned network, or with several that answer together.

    Every scan gives one label map on its own grid and orientation, OUT/<id>.nii.gz (or .nrrd, .mha, as its source);
    OUT/predictions.json lists them. May be stopped and run again: what is finished is kept. A scan that cannot be used
    is listed with its reason and does not stop the others. Weights of a classifier give a table of classes instead.

    Args:
        weights: Run of `mim3d finetune`, or a folder with an exported segmenter; several, such as the folds of a
            cross-validation, are an ensemble: the mean of their probabilities decides.
        out: Folder for the label maps.
        input: Scans: files, folders, DICOM trees, CSV or JSON lists; if not given, the held-out cases of the run, or
            those that all of several runs held out.
        overlap: Share of a window that its neighbour sees too; that of the task if not given.
        batch_size: Windows per call of the network.
        mirror: Average over mirrored windows, along the axes mirrored in training; as the task says if not given.
        body_only: Cover the body alone: windows over the box around it, without those that hold nothing but air or
            background; what no window covers is background. False covers the whole scan.
        probabilities: Write OUT/<id>_probabilities.nii.gz too: float32, one volume per class (background first) or
            region, before any clean-up; predictions.json names them as `channels`.
        largest_component: Keep the largest connected component (26 neighbours) alone: true for every label, or the
            names of labels.
        min_component_ml: Remove connected components (26 neighbours) smaller than this, in millilitres.
        format: nii.gz, nrrd, mha, dicom_seg (for DICOM series; needs the extra `dicom`), or auto: as the source, NIfTI
            for DICOM series.
        task: Name or dotted path of the task, where the card names one that is not mim3d's own; its code is imported.
        backbone: Encoder, where the card names a class that is not mim3d's own.
        accelerator: auto, cpu, cuda or mps.
        overwrite: Do scans again that are finished, and replace label maps of another network.

    Returns:
        The folder of the label maps.

    Raises:
        ConfigError: Settings that cannot work, or a folder with other predictions, before any work begins.
        CheckpointError: Weights that hold no network of a task.
        DataError: No scan to segment; or, once all others are done, scans that could not be.
    """
    from mim3d.workflows.predict import predict_scans

    settings = PredictionSettings(
        overlap=overlap,
        batch_size=batch_size,
        mirror=mirror,
        body_only=body_only,
        probabilities=probabilities,
        largest_component=largest_component,
        min_component_ml=min_component_ml,
        format=format,
    )
    return predict_scans(
        [weights] if isinstance(weights, str) else weights,
        out,
        input=input,
        settings=settings,
        task=task,
        backbone=backbone,
        accelerator=accelerator,
        overwrite=overwrite,
    )
