"""A scan in and out: any format as an (X, Y, Z) array along RAS+ axes, with the grid it is stored on.

One table, ``FORMATS``, serves finding, reading and writing. A new format is one file, with a class as ``StoredScan``
describes it, and one line there.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pkgutil import resolve_name
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError, Mim3dError, TooLargeError, first_line
from mim3d.core.files import atomic_file
from mim3d.core.names import file_name, number_of
from mim3d.core.types import LARGEST_LABEL, Spacing
from mim3d.scans.files import check_file, walk
from mim3d.scans.grids import Grid, smallest_integer, split_channel, split_series
from mim3d.scans.image_stacks import is_slice_folder

#: Numbers in a label map may be off a whole number by this much: half a thousandth of the step between two labels.
LABEL_TOLERANCE = 5e-4

#: No scan holds larger numbers; what is computed from them stays within single precision.
_LARGEST = 1e30

#: Voxels copied at a time along each axis: what is read and what is written of them stays in the processor's cache.
_TILE = (128, 8, 64)


class StoredScan(Protocol):
    """A scan on disk: its headers are read and checked, its voxels are not."""

    @property
    def grid(self) -> Grid:
        """Where its voxels lie."""

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in the order of the stored axes, in the parts of ``Grid.slabs``, rescaled as the headers say.

        A slab is valid until the next one is asked for.

        Raises:
            DataError: The voxels cannot be unpacked.
        """


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way in which scans lie on disk.

    Attributes:
        name: Name of the format.
        suffixes: Endings of its file names in lower case; empty where a scan is a folder.
        reader: Function that opens an address as a ``StoredScan`` or refuses it with a DataError, as
            ``"module:function"``. It is imported at the first scan of the format.
        writer: Function that writes an array in stored axis order to a path, on a grid, in the same notation; None
            where the format is not written.
        counter: Function that counts the volumes in a file, named as ``file::channel=2``, in the same notation; None
            where a file holds one.
        parts: Function that names every file that a scan is read from, in the same notation; None where it is one.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    reader: str
    writer: str | None = None
    counter: str | None = None
    parts: str | None = None


IMAGE_STACK = Format(name="slice images", reader="mim3d.scans.image_stacks:open_image_stack")
DICOM = Format(name="DICOM", reader="mim3d.scans.dicom.series:open_series")

#: Every format that is known. Folders of slice images and of DICOM files are recognised by what they hold.
FORMATS = (
    Format(
        name="NIfTI",
        suffixes=(".nii", ".nii.gz"),
        reader="mim3d.scans.nifti:open_nifti",
        writer="mim3d.scans.nifti:write_nifti",
        counter="mim3d.scans.nifti:num_channels",
    ),
    Format(
        name="NIfTI pair",
        suffixes=(".hdr", ".hdr.gz"),
        reader="mim3d.scans.nifti:open_nifti",
        counter="mim3d.scans.nifti:num_channels",
        parts="mim3d.scans.nifti:pair_files",
    ),
    Format(
        name="NRRD",
        suffixes=(".nrrd", ".nhdr"),
        reader="mim3d.scans.itk:open_itk",
        writer="mim3d.scans.itk:write_itk",
        parts="mim3d.scans.itk:itk_files",
    ),
    Format(
        name="MetaImage",
        suffixes=(".mha", ".mhd"),
        reader="mim3d.scans.itk:open_itk",
        writer="mim3d.scans.itk:write_itk",
        parts="mim3d.scans.itk:itk_files",
    ),
    IMAGE_STACK,
    DICOM,
)

#: Endings of the names of all files that are scans by themselves.
SUFFIXES = tuple(suffix for form in FORMATS for suffix in form.suffixes)


def suffix_of(name: str) -> str:
    """The ending of a file name that names a format, as it is written; empty where there is none."""
    found = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    return name[-max(map(len, found)) :] if found else ""


def format_of_file(name: str) -> Format | None:
    """The format that the ending of a file name names; None where there is none."""
    suffix = suffix_of(name).lower()
    return next((form for form in FORMATS if suffix in form.suffixes), None)


def format_of(address: str) -> Format:
    """The format of a scan.

    Args:
        address: A file, ``file::channel=2``, a folder with one DICOM series or with slice images, or ``folder::hash``.

    Raises:
        DataError: There is no such file, no format is known by its name, or it names a channel that its format has not.
    """
    file, channel = split_channel(address)
    is_folder = os.path.isdir(address)
    found = None if is_folder else format_of_file(file)
    if channel is not None and (found is None or found.counter is None):
        names = " and ".join(form.name for form in FORMATS if form.counter)
        raise DataError(f"{address}: only {names} files have channels; save it as a file of its own.")
    if found is not None:
        return found
    if is_folder and is_slice_folder(address):
        return IMAGE_STACK
    if is_folder or split_series(address)[1]:
        return DICOM
    check_file(address)
    from mim3d.scans.dicom.headers import read_slices

    if read_slices(address):
        return DICOM
    raise DataError(
        f"{address}: no image format is known by this name; give a file that ends in one of {', '.join(SUFFIXES)}, or "
        "the folder of a DICOM series."
    )


def open_scan(address: str) -> StoredScan:
    """Read and check the headers of a scan in any format.

    Raises:
        DataError: The scan cannot be read as one volume; the sentence names the remedy.
    """
    with explained_read(address):
        opened: StoredScan = resolve_name(format_of(address).reader)(address)
        return opened


@contextmanager
def explained_read(address: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a scan into an error that names the scan.

    Readers check what they know of. Files are made by others, though, and libraries raise anything about them.

    Raises:
        DataError: Something else than an error of mim3d was raised.
    """
    try:
        # What overflows is found by looking at the values.
        with np.errstate(all="ignore"):
            yield
    except Mim3dError:
        raise
    except MemoryError as error:
        raise TooLargeError(f"{address}: larger than the memory left for it; crop it, or give more memory.") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise DataError(
            f"{address}: cannot be read ({reason}); copy it again from its source, or export it again."
        ) from error


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

    The voxels are copied from the file straight to their places: memory holds them once, and some slices more.

    Args:
        path: The scan, as for `read_grid`.
        label: Whether whole numbers are needed; a float file is cast to integers if no number is off a whole one by
            more than `LABEL_TOLERANCE`.
        narrow: Whether a label map is kept in the smallest of uint8, int16 and int32 that holds its values, whatever
            its file has.

    Raises:
        DataError: As for `read_grid`; or voxels cannot be unpacked, are NaN, infinite or
            beyond all measure, or a label map has fractions or a value beyond those
            of labels.
    """
    name = os.fspath(path)
    scan = open_scan(name)
    array: npt.NDArray[Any] | None = None
    start = num_bad = 0
    with explained_read(name):
        for slab in scan.read_slabs():
            if slab.dtype.kind == "f":
                num_bad += slab.size - int(np.count_nonzero(np.abs(slab) <= _LARGEST))
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
            f"{name}: {number_of(num_bad, 'voxel', 'are', of=array.size)} NaN, infinite or beyond {_LARGEST:g}; "
            f"replace them ({'by 0, the background' if label else 'for CT by -1000'}) and save the file again."
        )
    return Volume(array=array, grid=scan.grid)


def _as_label(slab: npt.NDArray[Any], path: str, narrow: bool) -> npt.NDArray[Any]:
    """Voxels as integers, which they must be up to what rescaling and rounding leave, in the range of label values."""
    is_float = slab.dtype.kind == "f"
    if is_float:
        whole = np.rint(slab)
        broken = slab[np.abs(slab - whole) > LABEL_TOLERANCE]
        if broken.size:
            raise DataError(
                f"{path}: a label needs whole numbers, but voxels hold values such as {broken[0]!s}; "
                "give the label map, not an image or a probability, or save it as integers without rescaling."
            )
        slab = whole
    low, high = int(slab.min()), int(slab.max())
    if low < 0 or high > LARGEST_LABEL:
        raise DataError(
            f"{path}: holds the label value {low if low < 0 else high}, but label values lie between 0 and "
            f"{LARGEST_LABEL}; correct the map, or give the label map where this is an image."
        )
    return _narrowed(slab) if narrow or is_float else slab


def _narrowed(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Whole numbers in the smallest of uint8, int16 and int32 that holds them; as they are where none does."""
    low, high = array.min().item(), array.max().item()
    return array.astype(smallest_integer(low, high, (np.uint8, np.int16, np.int32), otherwise=array.dtype))


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
    form = format_of_file(os.fspath(path))
    if form is None or form.writer is None:
        known = ", ".join(suffix for form in FORMATS if form.writer for suffix in form.suffixes)
        raise DataError(f"{path}: no format is known by this name; end it in one of {known}.")
    write = resolve_name(form.writer)
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


def find_scans(folder: str | os.PathLike[str], *, with_predictions: bool = False) -> list[str]:
    """Find every image below a folder: files by suffix, and one entry per DICOM image series, sorted.

    A series is named by its folder where the folder holds one image series, by its file where it is one file (of many
    frames) among others, else by `folder::hash`. Scouts,
    derived series and structure sets are left out with one warning each; files of other kinds are passed over. A scan
    that cannot be read is found too, and refused when it is opened. Hidden files and folders are not entered.

    Args:
        folder: The folder.
        with_predictions: Whether folders that `mim3d predict` filled are entered, too. The given folder always is.

    Raises:
        DataError: There is no such folder.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such folder; check the path and that the disk is mounted.")
    from mim3d.scans.dicom.series import find_series

    scans: list[str] = []
    others: list[str] = []
    for path in walk(root, with_predictions=with_predictions):
        if suffix_of(path):
            scans.append(path)
        elif os.path.isfile(path):
            # A pipe or a device is no scan, and looking into it would wait for ever.
            others.append(path)
    return sorted(scans + find_series(others))


def files_of(path: str) -> list[str]:
    """Every file that a scan file is read from: itself, and those of its voxels beside it.

    Raises:
        DataError: Its header cannot be read, or names files that may not be read.
    """
    form = format_of_file(path)
    with explained_read(path):
        return [path] if form is None or form.parts is None else list(resolve_name(form.parts)(path))


def channels_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Addresses of the volumes in a file: `file::channel=0` and so on for a NIfTI of four axes, else just the path.

    Raises:
        DataError: A NIfTI file cannot be read.
    """
    name = os.fspath(path)
    form = None if os.path.isdir(name) else format_of_file(name)
    with explained_read(name):
        number = 1 if form is None or form.counter is None else resolve_name(form.counter)(name)
    return (name,) if number == 1 else tuple(f"{name}::channel={channel}" for channel in range(number))


def scan_id(path: str | os.PathLike[str]) -> str:
    """Name of a scan fit for a file name, in any script: that of the file without suffix, or a series' folder.

    The first channel of a file is called like the file, which names a case of several channels; others by number.
    """
    address, channel = split_channel(os.fspath(path))
    folder, series = split_series(address)
    name = os.path.basename(os.path.abspath(folder))
    stem = name.removesuffix(suffix_of(name))
    if stem == name and os.path.isfile(folder):
        stem = re.sub(r"\.(dcm|dicom|ima)$", "", name, flags=re.IGNORECASE)
    safe = file_name(stem)
    if channel:
        return f"{safe}_channel_{channel}"
    return f"{safe}_{series}" if series else safe


def modality_of(path: str | os.PathLike[str]) -> str | None:
    """Modality of a DICOM series as its header says (CT, MR, PT); None for other formats, which name none.

    Raises:
        DataError: As for `read_grid`, where the series cannot be found.
    """
    name = os.fspath(path)
    if format_of(name) is not DICOM:
        return None
    from mim3d.scans.dicom.series import open_series

    return open_series(name).slices[0].modality or None


def scanner_of(path: str | os.PathLike[str]) -> str | None:
    """What made a DICOM series, such as ``SIEMENS Avanto, 1.5 T``; None for other formats, which do not say it.

    Raises:
        DataError: As for `read_grid`, where the series cannot be found.
    """
    name = os.fspath(path)
    if format_of(name) is not DICOM:
        return None
    from mim3d.scans.dicom.series import scanner

    return scanner(name)


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
