"""BraTS: brain tumours on MRI of four channels, task 1 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import CITATION, URL, decathlon_files
from mim3d.datasets.published.presets import Preset, numbered
from mim3d.scans.intensity import Intensity

BRATS = Preset(
    name="BraTS",
    aliases=("MSD BrainTumour", "BrainTumour", "Task01_BrainTumour", "MSD Task01 BrainTumour", "Task01"),
    modality="MRI",
    channels=("FLAIR", "T1w", "T1gd", "T2w"),
    labels=numbered("oedema", "non-enhancing tumour", "enhancing tumour"),
    regions={"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)},
    num_cases=484,
    spacing_mm=(1.0, 1.0, 1.0),
    patch_size=(128, 128, 128),
    larger_patch_size=(224, 224, 128),
    intensity=Intensity(kind="zscore", window=None),
    files=decathlon_files("BRATS"),
    folds=("1-97", "98-194", "195-291", "292-388", "389-484"),
    citation=CITATION,
    url=URL,
)
