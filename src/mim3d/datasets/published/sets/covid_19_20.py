"""COVID-19-20: lesions of the lungs on CT."""

from mim3d.datasets.published.presets import NIFTI, FileNames, Preset, Variation, numbered
from mim3d.scans.intensity import Intensity

COVID_19_20 = Preset(
    name="COVID-19-20",
    aliases=("COVID", "COVID-19 lesion"),
    labels=numbered("lesion"),
    num_cases=199,
    spacing_mm=(1.25, 1.25, 5.0),
    patch_size=(192, 192, 32),
    intensity=Intensity(window=(-1000.0, 500.0)),
    variation=Variation(flip_prob=0.5, affine_prob=0.15, noise_prob=0.15),
    nsd_tolerance_mm=2.0,
    files=FileNames(
        image=rf"volume-covid19-A-(?P<case>\d{{4}}(_\d+)?)_ct{NIFTI}",
        label=rf"volume-covid19-A-(?P<case>\d{{4}}(_\d+)?)_seg{NIFTI}",
        example="volume-covid19-A-{0}_ct.nii.gz with volume-covid19-A-{0}_seg.nii.gz",
    ),
    folds=(
        "3 11 13 14 16 25 31 34 38 39 41 44 46 53 54 66 70 72 73 77 83 90 92 96 106 110 112 114 120 129 130 133 "
        "147 151 154 161 164 165 47_1 74_1",
        "173 178 179 181 187 199 201 214 215 228 233 236 237 239 240 246 247 251 252 255 263 264 267 270 282 285 "
        "288 295 296 299 301 307 313-316 167_1 196_0 202_0 256_1",
        "319 320 323 329 331 332 338 339 342 347 351 354 355 360 361 366 372 377 380 382 386-388 391 392 394 397 "
        "400 402 407 413 414 416-418 421-423 435 383_1",
        "437 443 445 455 462-464 472 473 475 476 479 483 494 495 498 500 502 504 511 521 522 524-526 530 531 534 "
        "537 547 548 553 557 559 560 562 566 567 569 570",
        "573 575 576 579 581 585 586 589 590 599 600 604 612 614 623 626 627 629 635 636 638 643 648 652 656-660 "
        "665 666 669 670 678 685 686 694 696 698",
    ),
    citation=(
        "Roth et al., Rapid artificial intelligence solutions in a pandemic: the COVID-19-20 Lung CT Lesion "
        "Segmentation Challenge, Medical Image Analysis 82 (2022) 102605"
    ),
    url="https://covid-segmentation.grand-challenge.org",
)
