"""Scans to measure on: phantom CTs with noise as real ones have it, and real scans by their paths."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

import mim3d
from mim3d.core.types import Triple
from mim3d.scans.volumes import find_scans, read_volume, scan_id

# Without types.
nib: Any = nibabel

NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class Scan:
    """One scan as a NIfTI file.

    Attributes:
        id: name without suffixes.
        path: of the file.
    """

    id: str
    path: Path

    def voxels_hu(self) -> np.ndarray:
        """``(X, Y, Z)`` in RAS+, as stored."""
        return np.asarray(nib.as_closest_canonical(nib.load(self.path)).dataobj)


def phantom_scans(folder: Path, num_scans: int, size: Triple) -> list[Scan]:
    """Phantom CTs of one size, each the first of a set of its own seed: others of a set are smaller."""
    images = folder / "imagesTr"
    images.mkdir(parents=True)
    scans = []
    for seed in range(num_scans):
        made = Path(mim3d.phantom(out=str(folder / f"seed_{seed}"), num_cases=1, size=size, seed=seed))
        (source,) = (made / "imagesTr").iterdir()
        scans.append(Scan(f"phantom_{seed}", images / f"phantom_{seed}.nii.gz"))
        source.rename(scans[-1].path)
        shutil.rmtree(made)
    return scans


def real_scans(paths: Sequence[str], folder: Path) -> list[Scan]:
    """Scans of folders and files. Other formats than NIfTI, which not every store here can read, are converted."""
    folder.mkdir(parents=True)
    found = [scan for path in paths for scan in (find_scans(path) if Path(path).is_dir() else [path])]
    scans = []
    for number, source in enumerate(found):
        if source.endswith(NIFTI):
            target = folder / f"{number:03}_{Path(source).name}"
            target.symlink_to(Path(source).resolve())
        else:
            volume = read_volume(source)
            target = folder / f"{number:03}_{scan_id(source)}.nii.gz"
            nib.save(nib.Nifti1Image(volume.array, volume.affine), target)
        scans.append(Scan(scan_id(str(target)), target))
    return scans


def noise_hu(voxels_hu: np.ndarray) -> float:
    """Standard deviation of the noise in soft tissue, from differences between neighbouring slices."""
    middle = voxels_hu[tuple(slice(size // 4, 3 * size // 4) for size in voxels_hu.shape)].astype(np.float32)
    step = np.diff(middle, axis=2)
    soft = (middle[..., 1:] > 0) & (middle[..., 1:] < 120) & (middle[..., :-1] > 0) & (middle[..., :-1] < 120)
    if not soft.any():
        return float("nan")
    return float(np.median(np.abs(step[soft])) / 0.6745 / 2**0.5)
