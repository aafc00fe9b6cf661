"""A data set of the laboratory's own: balls with cores, as ``tests.labelled`` writes them."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation
from mim3d.scans.intensity import Intensity

BALLS = Preset(
    name="Balls",
    modality="MRI",
    channels=("MRI",),
    labels={0: "background", 2: "ball", 5: "core"},
    num_cases=6,
    spacing_mm=None,
    patch_size=(16, 16, 12),
    intensity=Intensity(kind="zscore", window=None),
    variation=Variation(flip_prob=0.5),
    files=FileNames(
        image=rf"imagesTr/ball_(?P<case>\d+){NIFTI}",
        label=rf"labelsTr/ball_(?P<case>\d+){NIFTI}",
        example="imagesTr/ball_{0}.nii.gz and labelsTr/ball_{0}.nii.gz",
        num_digits=1,
    ),
    folds=("0 1", "2 3", "4 5"),
    num_folds=3,
    epochs=2,
    warmup_epochs=1,
    citation="Nobody, never.",
    url="https://example.org/balls",
)
