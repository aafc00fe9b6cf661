"""A scan in and out: NIfTI, NRRD, MetaImage and DICOM series as (X, Y, Z) arrays along RAS+ axes."""

import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.data.files import check_file, written_whole
from mim3d.data.grids import Grid
from mim3d.errors import DataError
from mim3d.types import Spacing

__all__ = [
    "Grid",
    "Volume",
    "find_scans",
    "patient_of",
    "read_grid",
    "read_volume",
    "scan_id",
    "write_volume",
]

NIFTI_SUFFIXES = (".nii", ".nii.gz")
ITK_SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory.

    Attributes:
        array: (X, Y, Z) along RAS+ axes, contiguous; integers keep their type, rescaling has been applied.
        grid: the grid as the file stores it.
    """

    array: npt.NDArray[Any]
    grid: Grid

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """(4, 4) float64, index of `array` to RAS millimetres."""
        return self.grid.ras_affine

    @property
    def spacing_mm(self) -> Spacing:
        """Voxel size along X, Y, Z of `array`."""
        return self.grid.spacing_mm


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read where the voxels of a scan lie, from its headers alone.

    Args:
        path: an image file, a folder with one DICOM series, or `folder::hash` for one of several series.

    Raises:
        DataError: whatever keeps the scan from being read as one volume, in one sentence with its remedy.
    """
    name = os.fspath(path)
    form = _form(name)
    if form == "nifti":
        from mim3d.data import nifti

        return nifti.read_source(name).grid
    if form == "itk":
        from mim3d.data import itk

        return itk.read_grid(name)
    from mim3d.data import dicom

    return dicom.read_stack(name).grid


def read_volume(path: str | os.PathLike[str], *, label: bool = False) -> Volume:
    """Read a scan and bring it to RAS+ axes by swapping and flipping axes, never by resampling.

    Args:
        path: as for `read_grid`.
        label: whole numbers are needed; a float file that holds only whole numbers is cast to integers.

    Raises:
        DataError: as for `read_grid`, voxels that cannot be unpacked, NaN or infinite voxels, or a label with
            fractions.
    """
    name = os.fspath(path)
    form = _form(name)
    if form == "nifti":
        from mim3d.data import nifti

        source = nifti.read_source(name)
        grid, stored = source.grid, nifti.read_stored(source)
    elif form == "itk":
        from mim3d.data import itk

        grid = itk.read_grid(name)
        stored = itk.read_stored(grid)
    else:
        from mim3d.data import dicom

        stack = dicom.read_stack(name)
        grid, stored = stack.grid, dicom.read_stored(stack)
    _check_finite(stored, name)
    if label:
        stored = _as_label(stored, name)
    return Volume(array=np.ascontiguousarray(grid.to_ras(stored)), grid=grid)


def write_volume(path: str | os.PathLike[str], array: npt.NDArray[Any], grid: Grid) -> None:
    """Write an array on a scan's own grid and orientation; the file appears whole or not at all.

    Args:
        path: ends in .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd; missing folders are made.
        array: (X, Y, Z) on the RAS+ form of `grid`.
        grid: grid of the scan the array belongs to; NIfTI to NIfTI copies the geometry bit by bit.

    Raises:
        DataError: unknown suffix, another shape than the grid, or a place that cannot be written to.
    """
    name = os.fspath(path)
    suffix = _suffix(name)
    if suffix is None:
        known = ", ".join(NIFTI_SUFFIXES + ITK_SUFFIXES)
        raise DataError(f"{name}: no format is known by this name; end it in one of {known}.")
    stored = grid.from_ras(_storable(array))
    if suffix in NIFTI_SUFFIXES:
        from mim3d.data.nifti import write_stored
    else:
        from mim3d.data.itk import write_stored
    with written_whole(name) as scratch:
        write_stored(scratch, stored, grid)


def find_scans(folder: str | os.PathLike[str]) -> list[str]:
    """Find every image below a folder: files by suffix, and one entry per DICOM image series, sorted.

    A series is named by its folder where the folder holds one image series, else by `folder::hash`. Scouts,
    derived series, structure sets and series that cannot be stacked are left out with one warning each; files
    of other kinds are passed over. Hidden files and folders are not entered.

    Raises:
        DataError: no such folder, or nothing in it but DICOM series that cannot be stacked.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; check the path and that the disk is mounted.")
    from mim3d.data import dicom

    scans: list[str] = []
    others: list[str] = []
    for path in dicom.walk(root):
        (scans if _suffix(path) else others).append(path)
    series, refused = dicom.find_series(others)
    if not scans and not series and refused:
        more = f" ({len(refused) - 1} more series were refused too.)" if len(refused) > 1 else ""
        raise DataError(refused[0] + more)
    return sorted(scans + series)


def scan_id(path: str | os.PathLike[str]) -> str:
    """Name of a scan fit for a file name: the file's without suffix, or the folder's of a DICOM series."""
    folder, _, series = os.fspath(path).partition("::")
    name = os.path.basename(os.path.abspath(folder))
    suffix = _suffix(name)
    stem = name[: -len(suffix)] if suffix else name
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._") or "scan"
    return f"{safe}_{series}" if series else safe


def patient_of(path: str | os.PathLike[str]) -> str | None:
    """Salted hash that stands for the patient of a DICOM series; None for other formats, which name none.

    Raises:
        DataError: as for `read_grid`, where the series cannot be found.
    """
    name = os.fspath(path)
    if _form(name) != "dicom":
        return None
    from mim3d.data import dicom

    return dicom.patient_key(name)


def _suffix(name: str) -> str | None:
    lower = name.lower()
    found = [suffix for suffix in NIFTI_SUFFIXES + ITK_SUFFIXES if lower.endswith(suffix)]
    return max(found, key=len) if found else None


def _form(name: str) -> str:
    suffix = None if os.path.isdir(name) else _suffix(name)
    if suffix in NIFTI_SUFFIXES:
        return "nifti"
    if suffix in ITK_SUFFIXES:
        return "itk"
    if "::" in name or os.path.isdir(name):
        return "dicom"
    check_file(name)
    known = ", ".join(NIFTI_SUFFIXES + ITK_SUFFIXES)
    raise DataError(
        f"{name}: no image format is known by this name; give a file that ends in one of {known}, or the "
        "folder of a DICOM series."
    )


def _check_finite(array: npt.NDArray[Any], path: str) -> None:
    if array.dtype.kind != "f":
        return
    num_bad = sum(int(np.count_nonzero(~np.isfinite(array[..., index]))) for index in range(array.shape[-1]))
    if num_bad:
        raise DataError(
            f"{path}: {num_bad} of {array.size} voxels are NaN or infinite; replace them (for CT by -1000) "
            "and save the scan again."
        )


def _as_label(array: npt.NDArray[Any], path: str) -> npt.NDArray[Any]:
    if array.dtype.kind in "iu":
        return array
    low, high = float(array.min()), float(array.max())
    for index in range(array.shape[-1]):
        slab = array[..., index]
        broken = slab[slab != np.rint(slab)]
        if broken.size:
            raise DataError(
                f"{path}: a label needs whole numbers, but voxels hold values such as {float(broken[0]):g}; "
                "give the label map, not an image or a probability."
            )
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise DataError(f"{path}: label values from {low:g} to {high:g} are not plausible; give the label map.")


def _storable(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array in a type that every format holds: no booleans, no half precision, no needless 64 bits."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype == np.float16:
        return array.astype(np.float32)
    if array.dtype in (np.int64, np.uint64) and array.size:
        low, high = int(array.min()), int(array.max())
        for dtype in (np.uint8, np.int16, np.int32):
            if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
                return array.astype(dtype)
    return array
