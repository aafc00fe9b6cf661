"""MSD Liver: the liver and its tumours on CT, task 3 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_LIVER = decathlon_preset(
    number=3,
    name="Liver",
    labels=("liver", "cancer"),
    num_cases=131,
    spacing_mm=(1.0, 1.0, 1.0),
    window=(-21.0, 189.0),
    variation=Variation(flip_prob=0.2, rotate90_prob=0.2, shift_prob=0.1),
    aliases=("LiTS",),
    num_digits=1,
    folds=("0-26", "27-52", "53-78", "79-104", "105-130"),
)
