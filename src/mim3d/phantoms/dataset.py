"""A labelled set of phantoms on disk, in the layout of the Medical Segmentation Decathlon."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nibabel import orientations as _orientations

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import load_json, remove_partial, write_json
from mim3d.core.progress import counted
from mim3d.core.types import Triple
from mim3d.phantoms.body import MIN_SIZE, make_phantom
from mim3d.phantoms.parts import LABELS
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import Grid, times
from mim3d.scans.volumes import read_grid, write_volume

# Untyped, so that calls into it are not held against the types of this package.
orientations: Any = _orientations

#: Grows with every change of the phantoms, so that one folder never mixes two kinds.
FORMAT = 1
SETTINGS_FILE = "phantom.json"
#: Smallest size of a case along X, Y, Z against the set's.
MIN_SIZE_RATIO = (0.85, 0.78, 0.65)
#: How cases are stored: half of them along LPS or RAS axes, the others as PACS and converters leave them too.
STORED_AXES = ("LPS", "RAS", "LAS", "LPI", "PIR", "SRA")
STORED_PROB = (0.3, 0.25, 0.15, 0.1, 0.1, 0.1)
#: Memory that making one voxel takes at the peak.
BYTES_PER_VOXEL = 24


@dataclass(frozen=True, kw_only=True)
class PhantomSettings:
    """What a set of phantoms is made of.

    Attributes:
        num_cases: Cases to train on.
        size: Largest number of voxels along X, Y, Z; the first case has it, the others up to a third less.
        seed: Names the set.
        num_test: Cases kept apart, with labels.
    """

    num_cases: int
    size: Triple
    seed: int
    num_test: int = 0

    def __post_init__(self) -> None:
        if self.num_cases < 1:
            raise ConfigError(f"num_cases is {self.num_cases}; a set needs at least 1 case.")
        if self.num_test < 0:
            raise ConfigError(f"num_test is {self.num_test}; use 0 or more.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; use a whole number from 0.")
        if len(self.size) != 3 or min(self.size) < MIN_SIZE:
            raise ConfigError(
                f"size {times(self.size)} needs three axes of at least {MIN_SIZE} voxels; use 96 96 80 or more."
            )
        needed, available = int(np.prod(self.size, dtype=object)) * BYTES_PER_VOXEL, available_memory_bytes()
        if needed > available:
            raise ConfigError(
                f"size {times(self.size)} needs {needed / 2**30:.1f} GiB of memory, but {available / 2**30:.1f} GiB "
                "are available; use a smaller size."
            )


@dataclass(frozen=True, kw_only=True)
class PhantomCase:
    """One case of a set, known before a voxel is made.

    Attributes:
        image: Path of the image within the set.
        label: Path of the label within the set.
        seed: The numbers that name its phantom.
        shape: Its voxels along X, Y, Z (RAS+).
        stored_axes: The directions of its axes in the file, such as "LPS".
    """

    image: str
    label: str
    seed: tuple[int, int, int]
    shape: Triple
    stored_axes: str


def make_set(out: str | Path, settings: PhantomSettings) -> tuple[int, int]:
    """Make a set of phantoms, with a progress display; cases that are finished already are kept.

    Args:
        out: Folder for imagesTr, labelsTr and dataset.json.
        settings: Settings of the set.

    Returns:
        How many cases the set has, and how many of them were made now.
    Raises:
        ConfigError: The folder holds other things, or phantoms of other settings.
        DataError: The folder cannot be written to; finished cases stay.
    """
    folder, cases = Path(out), plan_cases(settings)
    wanted = json.loads(json.dumps({"format": FORMAT, **asdict(settings)}))
    path = folder / SETTINGS_FILE
    if path.exists():
        try:
            found = load_json(path)
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise ConfigError(f"{path} cannot be read as the settings of a set of phantoms; choose another folder.")
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            changes = ", ".join(f"{name} {found.get(name)} instead of {wanted[name]}" for name in different)
            raise ConfigError(f"{folder} holds phantoms with {changes}; use the same settings or another folder.")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is no set of phantoms and not empty; choose an empty or a new folder.")
    for each in (folder, *(folder / name for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"))):
        remove_partial(each)
    write_json(path, wanted)
    num_made = sum(counted(_write_cases(folder, cases), len(cases), "phantoms"))
    training, test = cases[: settings.num_cases], cases[settings.num_cases :]
    write_json(
        folder / "dataset.json",
        {
            "name": "mim3d phantom",
            "description": "Synthetic CT of chest and belly with labels; no patient behind it.",
            "tensorImageSize": "3D",
            "modality": {"0": "CT"},
            "labels": {str(value): name for value, name in LABELS.items()},
            "numTraining": len(training),
            "numTest": len(test),
            "training": [{"image": f"./{case.image}", "label": f"./{case.label}"} for case in training],
            "test": [f"./{case.image}" for case in test],
        },
    )
    return len(cases), num_made


def plan_cases(settings: PhantomSettings) -> list[PhantomCase]:
    """The cases of a set, training cases first; each depends on the seed, the size and its own number alone."""
    cases = []
    for part, count, suffix, prefix in ((0, settings.num_cases, "Tr", ""), (1, settings.num_test, "Ts", "test_")):
        for number in range(count):
            seed = (settings.seed, part, number)
            rng = np.random.default_rng((*seed, *settings.size))
            ratios = rng.uniform(MIN_SIZE_RATIO, 1)
            if number == 0:
                ratios[:] = 1
            x, y, z = (max(MIN_SIZE, round(size * float(r))) for size, r in zip(settings.size, ratios, strict=True))
            axes = str(rng.choice(STORED_AXES, p=STORED_PROB))
            image, label = (f"{kind}{suffix}/phantom_{prefix}{number:03d}.nii.gz" for kind in ("images", "labels"))
            cases.append(PhantomCase(image=image, label=label, seed=seed, shape=(x, y, z), stored_axes=axes))
    return cases


def _write_cases(out: Path, cases: list[PhantomCase]) -> Iterator[bool]:
    """Write the cases that are not there yet; yields after each case whether it had to be made."""
    for case in cases:
        missing = False
        for path in (out / case.label, out / case.image):
            try:
                # Whole and of the right shape; what else a file holds follows from the folder's settings.
                missing |= not path.exists() or read_grid(path).shape != _stored_shape(case)
            except DataError:
                missing = True
        if missing:
            phantom = make_phantom(case.seed, case.shape)
            stored = orientations.axcodes2ornt(case.stored_axes)
            turn = orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), stored)
            affine = phantom.affine @ orientations.inv_ornt_aff(turn, case.shape)
            grid = Grid(shape=_stored_shape(case), affine=affine, path=str(out / case.image))
            write_volume(out / case.label, phantom.label, grid)
            write_volume(out / case.image, phantom.image, grid)
        yield missing


def _stored_shape(case: PhantomCase) -> Triple:
    x, y, z = (case.shape[int(axis)] for axis, _ in orientations.axcodes2ornt(case.stored_axes))
    return x, y, z
