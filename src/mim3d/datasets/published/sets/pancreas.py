"""MSD Pancreas: the pancreas and its tumours on CT, task 7 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_PANCREAS = decathlon_preset(
    number=7,
    name="Pancreas",
    labels=("pancreas", "cancer"),
    num_cases=281,
    spacing_mm=(1.5, 1.5, 1.5),
    window=(-87.0, 199.0),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    folds=(
        "1 4-6 10 12 15 16 18 19 21 24 25 28 29 32 35 37 40-43 45 46 48-52 55 56 58 61 64 66 67 69-71 74 75 77 78 "
        "80 81 83 84 86-89 91-96",
        "98-107 109-111 113 114 117 119 120 122 124-127 129-131 135 137 138 140 145 147-149 155 157-160 165-167 "
        "169 170 172 173 175 178-183 186 187 191",
        "193 194 196-201 203 204 207 209-215 217-219 222 224-231 234-236 239 241-244 246 247 249 253-256 258 259 "
        "261 262 264-270",
        "274-280 283-287 289-305 308-313 315 316 318 320 321 323 325-331 333 334 336 339 342-345",
        "346-348 350 351 354-358 360-362 364-367 369 370 372 374-380 382 385-389 391-393 395 398-402 404-406 "
        "409-416 418 419 421",
    ),
)
