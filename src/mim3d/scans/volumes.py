"""A scan in and out: NIfTI, NRRD, MetaImage and DICOM series as (X, Y, Z) arrays along RAS+ axes."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.files import atomic_file
from mim3d.core.types import Spacing
from mim3d.scans.files import check_file, walk
from mim3d.scans.grids import Grid, split_channel
from mim3d.scans.voxel_copies import copy_tiled

__all__ = [
    "Grid",
    "Volume",
    "channels_of",
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
        path: an image file, `file::channel=2` for one volume of a NIfTI file of four axes, a folder with one DICOM
            series, `folder::hash` for one of several series, or a folder of slices saved as pictures.

    Raises:
        DataError: whatever keeps the scan from being read as one volume, in one sentence with its remedy.
    """
    name = os.fspath(path)
    form = _form(name)
    if form == "nifti":
        from mim3d.scans import nifti

        return nifti.read_source(name).grid
    if form == "itk":
        from mim3d.scans import itk

        return itk.read_grid(name)
    if form == "slices":
        from mim3d.scans import image_stacks

        return image_stacks.read_grid(name)
    from mim3d.scans.dicom import series as dicom

    return dicom.read_stack(name).grid


def read_volume(path: str | os.PathLike[str], *, label: bool = False, narrow: bool = False) -> Volume:
    """Read a scan and bring it to RAS+ axes by swapping and flipping axes, never by resampling.

    The voxels go from the file straight to their places: memory holds them once, and some slices more. Formats that
    SimpleITK reads (NRRD, MetaImage) are held twice until the last voxel is in place.

    Args:
        path: as for `read_grid`.
        label: whole numbers are needed; a float file that holds only whole numbers is cast to integers.
        narrow: a label is kept in the smallest of uint8, int16 and int32 that holds its values, whatever its file has.

    Raises:
        DataError: as for `read_grid`, voxels that cannot be unpacked, NaN or infinite voxels, or a label with
            fractions.
    """
    name = os.fspath(path)
    grid, slabs = _open(name)
    kept = (lambda slab: _as_label(slab, name, narrow)) if label else None
    return Volume(array=_assembled(grid, slabs, name, kept), grid=grid)


def _open(name: str) -> tuple[Grid, Iterator[npt.NDArray[Any]]]:
    """A scan's grid, and its voxels in stored axis order, slab by slab along the last axis."""
    form = _form(name)
    if form == "nifti":
        from mim3d.scans import nifti

        source = nifti.read_source(name)
        return source.grid, nifti.read_slabs(source)
    if form == "itk":
        from mim3d.scans import itk

        grid = itk.read_grid(name)
        return grid, itk.read_slabs(grid)
    if form == "slices":
        from mim3d.scans import image_stacks

        grid = image_stacks.read_grid(name)
        return grid, image_stacks.read_slabs(grid)
    from mim3d.scans.dicom import series as dicom

    stack = dicom.read_stack(name)
    return stack.grid, dicom.read_slabs(stack)


def _assembled(
    grid: Grid,
    slabs: Iterator[npt.NDArray[Any]],
    name: str,
    kept: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None,
) -> npt.NDArray[Any]:
    """Slabs, as what is kept of them, in their places along RAS+ axes and in one type that holds all of them.

    Raises:
        DataError: NaN or infinite voxels, or what ``kept`` raises.
    """
    array: npt.NDArray[Any] | None = None
    start = num_bad = 0
    for slab in slabs:
        if slab.dtype.kind == "f":
            num_bad += int(np.count_nonzero(~np.isfinite(slab)))
        if kept is not None and not num_bad:
            slab = kept(slab)
        if array is None:
            array = np.empty(grid.ras_shape, dtype=slab.dtype)
        array = array.astype(np.promote_types(array.dtype, slab.dtype), copy=False)
        stop = start + slab.shape[2]
        copy_tiled(grid.from_ras(array)[..., start:stop], slab)
        start = stop
    assert array is not None
    if num_bad:
        raise DataError(
            f"{name}: {num_bad} of {array.size} voxels are NaN or infinite; replace them (for CT by -1000) "
            "and save the scan again."
        )
    return array


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
        from mim3d.scans.nifti import write_stored
    else:
        from mim3d.scans.itk import write_stored
    with atomic_file(name) as part:
        write_stored(str(part), stored, grid)


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
    from mim3d.scans.dicom import series as dicom

    scans: list[str] = []
    others: list[str] = []
    for path in walk(root):
        (scans if _suffix(path) else others).append(path)
    series, refused = dicom.find_series(others)
    if not scans and not series and refused:
        more = f" ({len(refused) - 1} more series were refused too.)" if len(refused) > 1 else ""
        raise DataError(refused[0] + more)
    return sorted(scans + series)


def channels_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Addresses of the volumes in a file: `file::channel=0` and so on for a NIfTI of four axes, else the path alone.

    Raises:
        DataError: a NIfTI file that cannot be read.
    """
    name = os.fspath(path)
    if _suffix(name) not in NIFTI_SUFFIXES or os.path.isdir(name):
        return (name,)
    from mim3d.scans.nifti import num_channels

    number = num_channels(name)
    return (name,) if number == 1 else tuple(f"{name}::channel={channel}" for channel in range(number))


def scan_id(path: str | os.PathLike[str]) -> str:
    """Name of a scan fit for a file name, in any script: that of the file without suffix, or a series' folder.

    The first channel of a file is called like the file, which names a case of several channels; others by number.
    """
    address, channel = split_channel(os.fspath(path))
    folder, _, series = address.partition("::")
    name = os.path.basename(os.path.abspath(folder))
    suffix = _suffix(name)
    stem = name[: -len(suffix)] if suffix else name
    safe = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", stem)).strip("._") or "scan"
    if channel:
        return f"{safe}_channel_{channel}"
    return f"{safe}_{series}" if series else safe


def patient_of(path: str | os.PathLike[str]) -> str | None:
    """Salted hash that stands for the patient of a DICOM series; None for other formats, which name none.

    Raises:
        DataError: as for `read_grid`, where the series cannot be found.
    """
    name = os.fspath(path)
    if _form(name) != "dicom":
        return None
    from mim3d.scans.dicom import series as dicom

    return dicom.patient_key(name)


def _suffix(name: str) -> str | None:
    lower = name.lower()
    found = [suffix for suffix in NIFTI_SUFFIXES + ITK_SUFFIXES if lower.endswith(suffix)]
    return max(found, key=len) if found else None


def _form(name: str) -> str:
    file, channel = split_channel(name)
    suffix = None if os.path.isdir(name) else _suffix(file)
    if channel is not None and suffix not in NIFTI_SUFFIXES:
        raise DataError(f"{name}: a channel can be named in a NIfTI file alone; save it as a file of its own.")
    if suffix in NIFTI_SUFFIXES:
        return "nifti"
    if suffix in ITK_SUFFIXES:
        return "itk"
    if "::" not in name and os.path.isdir(name):
        from mim3d.scans.image_stacks import is_slice_folder

        return "slices" if is_slice_folder(name) else "dicom"
    if "::" in name:
        return "dicom"
    check_file(name)
    known = ", ".join(NIFTI_SUFFIXES + ITK_SUFFIXES)
    raise DataError(
        f"{name}: no image format is known by this name; give a file that ends in one of {known}, or the "
        "folder of a DICOM series."
    )


def _as_label(slab: npt.NDArray[Any], path: str, narrow: bool) -> npt.NDArray[Any]:
    is_integer = slab.dtype.kind in "iu"
    if is_integer and not narrow:
        return slab
    broken = slab[:0] if is_integer else slab[slab != np.rint(slab)]
    if broken.size:
        raise DataError(
            f"{path}: a label needs whole numbers, but voxels hold values such as {float(broken[0]):g}; "
            "give the label map, not an image or a probability."
        )
    low, high = float(slab.min()), float(slab.max())
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return slab.astype(dtype)
    if is_integer:
        return slab
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
