"""MSD Spleen: the spleen on CT, task 9 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_SPLEEN = decathlon_preset(
    number=9,
    name="Spleen",
    labels=("spleen",),
    num_cases=41,
    spacing_mm=(1.0, 1.0, 1.0),
    window=(-57.0, 175.0),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    num_digits=1,
    folds=("2 3 6 8-10 12-14", "16-22 24", "25-29 31-33", "38 40 41 44-47 49", "52 53 56 59-63"),
)
