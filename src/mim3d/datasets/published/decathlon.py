"""What the tasks of the Medical Segmentation Decathlon share: file names, citation and most settings."""

from mim3d.core.types import Spacing
from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

CITATION = "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022); CC BY-SA 4.0"
URL = "http://medicaldecathlon.com"


def decathlon_files(stem: str, num_digits: int = 3) -> FileNames:
    """Names of the files of a task, whose images and label maps share their names: ``spleen_10.nii.gz``."""
    pattern, file = rf"{stem}_(?P<case>\d+){NIFTI}", stem + "_{0}.nii.gz"
    return FileNames(
        image=f"imagesTr/{pattern}",
        label=f"labelsTr/{pattern}",
        example=f"imagesTr/{file} with labelsTr/{file}",
        num_digits=num_digits,
    )


def decathlon_preset(
    *,
    number: int,
    name: str,
    labels: tuple[str, ...],
    num_cases: int,
    spacing_mm: Spacing,
    window: tuple[float, float],
    variation: Variation,
    folds: tuple[str, ...],
    num_digits: int = 3,
    aliases: tuple[str, ...] = (),
) -> Preset:
    """The preset of a CT task.

    Args:
        number: Number of the task in the Decathlon.
        name: Name of the task as its folder has it, such as ``HepaticVessel``; files begin with it in lower case.
        labels: Names of the labels from 1 on.
        num_cases: Number of labelled cases.
        spacing_mm: Voxel size along X, Y, Z to resample to.
        window: Lower and upper bound of intensities, in HU.
        variation: Augmentation of crops.
        folds: Numbers of the cases that each fold holds out.
        num_digits: Number of digits to which the numbers of cases are filled up in file names.
        aliases: Other names of the task than those made of its number and name.
    """
    numbered_task = f"Task{number:02d}"
    return Preset(
        name=f"MSD {name}",
        aliases=(name, f"{numbered_task}_{name}", f"MSD {numbered_task} {name}", numbered_task, *aliases),
        labels=numbered(*labels),
        num_cases=num_cases,
        spacing_mm=spacing_mm,
        intensity=Intensity(window=window),
        variation=variation,
        files=decathlon_files(name.lower(), num_digits),
        folds=folds,
        citation=CITATION,
        url=URL,
    )
