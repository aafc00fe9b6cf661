"""A scan in and out: any format as an (X, Y, Z) array along RAS+ axes, with the grid it is stored on."""

import os
import re
import unicodedata
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.files import atomic_file
from mim3d.core.types import Spacing
from mim3d.scans.files import walk
from mim3d.scans.formats import DICOM, format_of, num_channels, open_scan, suffix_of, writer_of
from mim3d.scans.grids import Grid, split_channel

#: Voxels copied at a time along each axis: what is read and what is written of them stays in the processor's cache.
_TILE = (128, 8, 64)


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan in memory.

    Attributes:
        array: Voxels (X, Y, Z) along RAS+ axes, contiguous; integers keep their type, rescaling has been applied.
        grid: Grid as the file stores it.
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
    """Read where the voxels of a scan lie, from its headers only.

    Args:
        path: An image file, `file::channel=2` for one volume of a NIfTI file of four axes, a folder with one DICOM
            series, `folder::hash` for one of several series, or a folder of slices saved as images.

    Raises:
        DataError: The scan cannot be read as one volume; the sentence names the remedy.
    """
    return open_scan(os.fspath(path)).grid


def read_volume(path: str | os.PathLike[str], *, label: bool = False, narrow: bool = False) -> Volume:
    """Read a scan and bring it to RAS+ axes by swapping and flipping axes, never by resampling.

    The voxels are copied from the file straight to their places: memory holds them once, and some slices more. Formats
    that SimpleITK reads (NRRD, MetaImage) are held twice until the last voxel is in place.

    Args:
        path: The scan, as for `read_grid`.
        label: Whether whole numbers are needed; a float file that holds only whole numbers is cast to integers.
        narrow: Whether a label map is kept in the smallest of uint8, int16 and int32 that holds its values, whatever
            its file has.

    Raises:
        DataError: As for `read_grid`; or voxels cannot be unpacked, are NaN or infinite, or a label map has fractions.
    """
    name = os.fspath(path)
    scan = open_scan(name)
    array: npt.NDArray[Any] | None = None
    start = num_bad = 0
    for slab in scan.read_slabs():
        if slab.dtype.kind == "f":
            num_bad += int(np.count_nonzero(~np.isfinite(slab)))
        if label and not num_bad:
            slab = _as_label(slab, name, narrow)
        if array is None:
            array = np.empty(scan.grid.ras_shape, dtype=slab.dtype)
        array = array.astype(np.promote_types(array.dtype, slab.dtype), copy=False)
        stop = start + slab.shape[2]
        copy_tiled(scan.grid.from_ras(array)[..., start:stop], slab)
        start = stop
    assert array is not None
    if num_bad:
        raise DataError(
            f"{name}: {num_bad} of {array.size} voxels are NaN or infinite; replace them (for CT by -1000) "
            "and save the scan again."
        )
    return Volume(array=array, grid=scan.grid)


def _as_label(slab: npt.NDArray[Any], path: str, narrow: bool) -> npt.NDArray[Any]:
    """Voxels as integers.

    Raises:
        DataError: Voxels are fractions, or beyond 32 bits.
    """
    is_integer = slab.dtype.kind in "iu"
    if is_integer and not narrow:
        return slab
    broken = slab[:0] if is_integer else slab[slab != np.rint(slab)]
    if broken.size:
        raise DataError(
            f"{path}: a label needs whole numbers, but voxels hold values such as {float(broken[0]):g}; "
            "give the label map, not an image or a probability."
        )
    kept = _narrowed(slab)
    if kept.dtype.kind == "f":
        low, high = float(slab.min()), float(slab.max())
        raise DataError(f"{path}: label values from {low:g} to {high:g} are not plausible; give the label map.")
    return kept


def _narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Whole numbers in the smallest of uint8, int16 and int32 that holds them; as they are where none does."""
    low, high = array.min().item(), array.max().item()
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    return array


def copy_tiled(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy between two views of equal (X, Y, Z) shape whatever the order of their axes in memory.

    This is several times faster than plain assignment where one runs fast along X and the other along Z.
    """
    spans = (range(0, size, edge) for size, edge in zip(target.shape, _TILE, strict=True))
    for corner in product(*spans):
        tile = tuple(slice(start, start + edge) for start, edge in zip(corner, _TILE, strict=True))
        target[tile] = source[tile]


def write_volume(path: str | os.PathLike[str], array: npt.NDArray[Any], grid: Grid) -> None:
    """Write an array on a scan's own grid and orientation; the file appears whole or not at all.

    Args:
        path: File to be written; it ends in .nii, .nii.gz, .nrrd, .nhdr, .mha or .mhd. Missing folders are made.
        array: Voxels (X, Y, Z) on the RAS+ form of `grid`.
        grid: Grid of the scan that the array belongs to; from NIfTI to NIfTI the geometry is copied bit by bit.

    Raises:
        DataError: The suffix is unknown, the array has another shape than the grid, or the file cannot be written.
    """
    write = writer_of(os.fspath(path))
    # No format holds booleans or half precision, and few readers take 64 bits.
    if array.dtype.kind == "b":
        array = array.astype(np.uint8)
    elif array.dtype == np.float16:
        array = array.astype(np.float32)
    elif array.dtype in (np.int64, np.uint64) and array.size:
        array = _narrowed(array)
    stored = grid.from_ras(array)
    with atomic_file(path) as part:
        write(str(part), stored, grid)


def find_scans(folder: str | os.PathLike[str]) -> list[str]:
    """Find every image below a folder: files by suffix, and one entry per DICOM image series, sorted.

    A series is named by its folder where the folder holds one image series, else by `folder::hash`. Scouts,
    derived series, structure sets and series that cannot be stacked are left out with one warning each; files
    of other kinds are passed over. Hidden files and folders are not entered.

    Raises:
        DataError: There is no such folder, or nothing in it but DICOM series that cannot be stacked.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; check the path and that the disk is mounted.")
    from mim3d.scans.dicom.series import find_series

    scans: list[str] = []
    others: list[str] = []
    for path in walk(root):
        (scans if suffix_of(path) else others).append(path)
    series, refused = find_series(others)
    if not scans and not series and refused:
        more = f" ({len(refused) - 1} more series were refused too.)" if len(refused) > 1 else ""
        raise DataError(refused[0] + more)
    return sorted(scans + series)


def channels_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Addresses of the volumes in a file: `file::channel=0` and so on for a NIfTI of four axes, else just the path.

    Raises:
        DataError: A NIfTI file cannot be read.
    """
    name = os.fspath(path)
    number = num_channels(name)
    return (name,) if number == 1 else tuple(f"{name}::channel={channel}" for channel in range(number))


def scan_id(path: str | os.PathLike[str]) -> str:
    """Name of a scan fit for a file name, in any script: that of the file without suffix, or a series' folder.

    The first channel of a file is called like the file, which names a case of several channels; others by number.
    """
    address, channel = split_channel(os.fspath(path))
    folder, _, series = address.partition("::")
    name = os.path.basename(os.path.abspath(folder))
    stem = name.removesuffix(suffix_of(name))
    safe = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", stem)).strip("._") or "scan"
    if channel:
        return f"{safe}_channel_{channel}"
    return f"{safe}_{series}" if series else safe


def patient_of(path: str | os.PathLike[str]) -> str | None:
    """Salted hash that stands for the patient of a DICOM series; None for other formats, which name none.

    Raises:
        DataError: As for `read_grid`, where the series cannot be found.
    """
    name = os.fspath(path)
    if format_of(name) is not DICOM:
        return None
    from mim3d.scans.dicom.series import patient_key

    return patient_key(name)
