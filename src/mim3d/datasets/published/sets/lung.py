"""MSD Lung: tumours of the lungs on CT, task 6 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_LUNG = decathlon_preset(
    number=6,
    name="Lung",
    labels=("cancer",),
    num_cases=63,
    spacing_mm=(1.0, 1.0, 1.0),
    window=(-1000.0, 1000.0),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.3, shift_prob=0.1),
    folds=(
        "1 3-6 9 10 14-16 18 20 22",
        "23 25-29 31 33 34 36-38 41",
        "42-49 51 53-55 57",
        "58 59 61 62 64-66 69-71 73 74",
        "75 78-81 83 84 86 92 93 95 96",
    ),
)
