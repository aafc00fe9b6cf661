"""MSD Colon: tumours of the colon on CT, task 10 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_COLON = decathlon_preset(
    number=10,
    name="Colon",
    labels=("colon cancer primaries",),
    num_cases=126,
    spacing_mm=(1.5, 1.5, 1.5),
    window=(-57.0, 175.0),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    folds=(
        "1 5-9 11 12 15 22 24-33 36 38-42",
        "45 46 50 51 53 54 59 61 64-66 69 72 74 75 77 78 81 86 88 89 91 92 95 96",
        "98-100 102-104 106-108 111 112 114 115 117-120 122 124 126 127 129 131 133 134",
        "136-145 148 149 154 155 157 159 161-166 168 169 171",
        "172 175 176 181 185 187 192-194 196 201-203 205-208 212-219",
    ),
)
