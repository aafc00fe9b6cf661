"""One generator for each published data set: the same folders and names, and the junk that really lies in them."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mim3d.datasets.published.presets import Preset, published_presets
from tests.miniatures.bodies import SHAPE, affine_of, ct, label_map, mri, save, turned

#: The layout of a preset's files: case number -> paths of image and label, as the owners name them.
Names = Callable[[str], tuple[str, str]]


@dataclass(frozen=True)
class Miniature:
    """A published data set in miniature.

    Attributes:
        name: of its preset.
        train: numbers of cases that fold 0 trains on, as the owners publish it.
        val: numbers of cases that fold 0 holds out.
        write: fills a folder.
    """

    name: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    write: Callable[["Miniature", Path], None]

    @property
    def preset(self) -> Preset:
        """Of the data set."""
        return published_presets()[self.name]

    def values(self) -> list[int]:
        """Label values but the background's."""
        return [value for value in self.preset.labels if value != 0]


def _junk(folder: Path) -> None:
    """What archives made on a Mac, and their readers, leave behind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    (folder / "README.txt").write_text("Please cite the owners.\n")


def _apple_double(path: Path) -> None:
    """The ``._`` file that lies beside every file of the Decathlon's archives."""
    path.with_name(f"._{path.name}").write_bytes(b"\x00\x05\x16\x07" + bytes(200))


def _decathlon(task: str, stem: str, digits: int, spacing_mm: tuple[float, float, float]):
    def write(mini: Miniature, folder: Path) -> None:
        root = folder / task
        _junk(root)
        training = []
        for index, number in enumerate((*mini.train, *mini.val)):
            name = f"{stem}_{number.zfill(digits)}.nii.gz"
            label = label_map(mini.values())
            affine = affine_of(spacing_mm, "RAS", (-50.0, -40.0, 10.0 * index))
            several = len(mini.preset.channels) > 1
            image = mri(label, index, len(mini.preset.channels)) if several else ct(label, index)
            for part, array in (("imagesTr", image), ("labelsTr", label.astype(np.uint8))):
                save(root / part / name, array, affine)
                _apple_double(root / part / name)
            training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        save(root / "imagesTs" / f"{stem}_{'999'.zfill(digits)}.nii.gz", image, affine)
        description = {
            "name": stem,
            "modality": {str(place): name for place, name in enumerate(mini.preset.channels)},
            "labels": {str(value): name for value, name in mini.preset.labels.items()},
            "training": training,
        }
        (root / "dataset.json").write_text(json.dumps(description))

    return write


def _btcv(mini: Miniature, folder: Path) -> None:
    """imagesTr and labelsTr with names of their own, stored in LAS; the last case lies uncompressed."""
    _junk(folder)
    for index, number in enumerate((*mini.train, *mini.val)):
        suffix = ".nii" if index == 0 else ".nii.gz"
        label = label_map(mini.values())
        affine = affine_of((2.0, 2.0, 3.0), "LAS", (30.0, -20.0, 400.0))
        save(folder / "imagesTr" / f"img{number.zfill(4)}{suffix}", ct(label, index), affine)
        save(folder / "labelsTr" / f"label{number.zfill(4)}{suffix}", label.astype(np.uint8), affine)
    save(folder / "imagesTs" / "img0061.nii.gz", ct(label, 9), affine)


def _btcv_as_downloaded(mini: Miniature, folder: Path) -> None:
    """RawData/Training/img and label, as the archives of Synapse unpack."""
    for index, number in enumerate((*mini.train, *mini.val)):
        label = label_map(mini.values())
        affine = affine_of((2.0, 2.0, 3.0), "LAS")
        root = folder / "RawData" / "Training"
        save(root / "img" / f"img{number.zfill(4)}.nii.gz", ct(label, index), affine)
        save(root / "label" / f"label{number.zfill(4)}.nii.gz", label.astype(np.uint8), affine)
    save(folder / "RawData" / "Testing" / "img" / "img0061.nii.gz", ct(label, 9), affine)


def _mm_whs(mini: Miniature, folder: Path) -> None:
    """Image and label side by side in ct_train, oblique, with axes in an order of their own; test cases elsewhere."""
    root = folder / "MM-WHS 2017 Dataset" / "ct_train"
    _junk(root)
    for index, number in enumerate((*mini.train, *mini.val)):
        label = label_map(mini.values())
        orientation = ("LPS", "PIR", "RAS")[index % 3]
        affine = turned(affine_of((1.8, 1.8, 2.0), orientation, (-90.0, 112.5, -1033.0)), 7.0 * index)
        save(root / f"ct_train_{number}_image.nii.gz", ct(label, index) + np.int16(400), affine)
        save(root / f"ct_train_{number}_label.nii.gz", label, affine)
    save(root.parent / "ct_test" / "ct_test_2001_image.nii.gz", ct(label, 9), affine)


def _amos(mini: Miniature, folder: Path) -> None:
    """CT in imagesTr and imagesVa, and MRI (numbers above 500) between them."""
    root = folder / "amos22"
    _junk(root)
    for index, number in enumerate((*mini.train, *mini.val, "507")):
        part = "Va" if index % 2 else "Tr"
        label = label_map(mini.values())
        affine = affine_of((2.0, 2.0, 3.0), "LAS")
        save(root / f"images{part}" / f"amos_{number.zfill(4)}.nii.gz", ct(label, index), affine)
        save(root / f"labels{part}" / f"amos_{number.zfill(4)}.nii.gz", label.astype(np.uint8), affine)
    save(root / "imagesTs" / "amos_0201.nii.gz", ct(label, 9), affine)


def _flare(mini: Miniature, folder: Path) -> None:
    """A folder in a folder, as the download unpacks, beside scans without labels."""
    root = folder / "FLARE22Train" / "FLARE22_LabeledCase50"
    _junk(root)
    for index, number in enumerate((*mini.train, *mini.val)):
        label = label_map(mini.values())
        affine = affine_of((2.0, 2.0, 2.5), "LPS")
        save(root / "images" / f"FLARE22_Tr_{number.zfill(4)}_0000.nii.gz", ct(label, index), affine)
        save(root / "labels" / f"FLARE22_Tr_{number.zfill(4)}.nii.gz", label.astype(np.uint8), affine)
    save(folder / "FLARE22Train" / "FLARE22_UnlabeledCase1-500" / "Case_00001_0000.nii.gz", ct(label, 9), affine)


def _covid(mini: Miniature, folder: Path) -> None:
    """Few thick slices, image and label side by side."""
    root = folder / "COVID-19-20_v2" / "Train"
    _junk(root)
    for index, number in enumerate((*mini.train, *mini.val)):
        first, line, more = number.partition("_")
        stem = f"volume-covid19-A-{first.zfill(4)}{line}{more}"
        label = label_map(mini.values(), (SHAPE[0], SHAPE[1], 10))
        affine = affine_of((1.4, 1.4, 5.0), "LPS")
        save(root / f"{stem}_ct.nii.gz", ct(label, index), affine)
        save(root / f"{stem}_seg.nii.gz", label.astype(np.uint8), affine)
    save(root.parent / "Validation" / "volume-covid19-A-0001.nii.gz", ct(label, 9), affine)


def write_cc_ccii(folder: Path, num_patients: int = 6) -> None:
    """CC-CCII: class/patient/scan/0000.jpg, one patient of each class with two scans, and what else lies there."""
    from PIL import Image

    root = folder / "CC-CCII" / "dataset"
    _junk(root)
    for place, name in enumerate(published_presets()["CC-CCII"].classes):
        for patient in range(num_patients):
            for scan in range(2 if patient == 0 else 1):
                scan_folder = root / name / str(100 * place + patient) / str(1000 * place + 10 * patient + scan)
                scan_folder.mkdir(parents=True)
                (scan_folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
                rng = np.random.default_rng([place, patient, scan])
                for index in range(6):
                    picture = rng.normal(90 + 40 * place, 20, (40, 40)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(picture).save(scan_folder / f"{index:04d}.jpg")
    (root / "lesions" / "7").mkdir(parents=True)
    Image.fromarray(picture).save(root / "lesions" / "7" / "0.png")


#: Every set whose cases are files, and BTCV in its second layout.
MINIATURES: dict[str, Miniature] = {
    "BTCV": Miniature("BTCV", ("1", "7", "22", "34"), ("35", "40"), _btcv),
    "BTCV as downloaded": Miniature("BTCV", ("2", "23"), ("36",), _btcv_as_downloaded),
    "MM-WHS CT": Miniature("MM-WHS CT", ("1005", "1012", "1020"), ("1001", "1004"), _mm_whs),
    "MSD Spleen": Miniature(
        "MSD Spleen", ("16", "24", "63"), ("2", "10"), _decathlon("Task09_Spleen", "spleen", 1, (1.2, 1.2, 2.0))
    ),
    "MSD Liver": Miniature(
        "MSD Liver", ("27", "100", "130"), ("0", "26"), _decathlon("Task03_Liver", "liver", 1, (1.2, 1.2, 1.5))
    ),
    "MSD Lung": Miniature(
        "MSD Lung", ("23", "61", "96"), ("1", "22"), _decathlon("Task06_Lung", "lung", 3, (1.2, 1.2, 1.5))
    ),
    "MSD Pancreas": Miniature(
        "MSD Pancreas",
        ("98", "345", "421"),
        ("1", "96"),
        _decathlon("Task07_Pancreas", "pancreas", 3, (1.5, 1.5, 2.5)),
    ),
    "MSD HepaticVessel": Miniature(
        "MSD HepaticVessel",
        ("91", "268", "458"),
        ("1", "90"),
        _decathlon("Task08_HepaticVessel", "hepaticvessel", 3, (1.5, 1.5, 2.5)),
    ),
    "MSD Colon": Miniature(
        "MSD Colon", ("45", "134", "219"), ("1", "42"), _decathlon("Task10_Colon", "colon", 3, (1.5, 1.5, 2.5))
    ),
    "AMOS22": Miniature("AMOS22", ("1", "13", "409"), ("14", "410"), _amos),
    "FLARE22": Miniature("FLARE22", ("1", "3", "50"), ("2", "49"), _flare),
    "COVID-19-20": Miniature("COVID-19-20", ("167_1", "196_0", "698"), ("3", "47_1"), _covid),
    "BraTS": Miniature(
        "BraTS", ("98", "292", "484"), ("1", "97"), _decathlon("Task01_BrainTumour", "BRATS", 3, (1.0, 1.0, 1.0))
    ),
}
