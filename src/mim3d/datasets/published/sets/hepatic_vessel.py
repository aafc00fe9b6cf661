"""MSD HepaticVessel: vessels and tumours of the liver on CT, task 8 of the Medical Segmentation Decathlon."""

from mim3d.datasets.published.decathlon import decathlon_preset
from mim3d.datasets.published.presets import Variation

MSD_HEPATIC_VESSEL = decathlon_preset(
    number=8,
    name="HepaticVessel",
    labels=("Vessel", "Tumour"),
    num_cases=303,
    spacing_mm=(1.5, 1.5, 1.5),
    window=(0.0, 230.0),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    folds=(
        "1 2 4 5 7 8 10 11 13 16 18-20 22 23 25-33 39 40 42 44 46 49-53 57-59 61 62 65-68 70-72 75 77-90",
        "91-94 96-98 100 102-104 108 110-113 115-117 119 121 123-125 127-129 131-133 136-142 144-148 150 151 154 "
        "157-161 163-167 171-175 177",
        "178 179 181 183-186 189 192-201 203 206-211 213-215 217-219 221-225 227 229-231 233-238 240 242 244-246 "
        "248 255 256 258 259 262 263 265 266 268",
        "269-272 274 275 278-282 284-287 289-291 293 294 296 297 299 300 303 305 307-309 314 318-325 327 329 330 "
        "332 333 335 336 338 340 341 344 345 348-350 353 356 358 359 361-363",
        "367-369 371-375 378 379 382-386 388 389 391 393 396-398 400-402 404 406-409 411 412 416 419 420 422-425 "
        "427 429 431-434 437 438 440-447 453-456 458",
    ),
)
