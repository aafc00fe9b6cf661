"""The formats in which scans lie on disk: one table that finding, reading and writing use.

A new format is one file, with a class as ``StoredScan`` describes it, and one line in ``FORMATS``.
"""

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans.files import check_file
from mim3d.scans.grids import Grid, split_channel
from mim3d.scans.image_stacks import is_slice_folder


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


#: Writes an array in stored axis order to a path, on a grid.
Writer = Callable[[str, npt.NDArray[Any], Grid], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way in which scans lie on disk.

    Attributes:
        name: Name of the format.
        suffixes: Endings of its file names in lower case; empty where a scan is a folder.
        reader: Function that opens an address as a ``StoredScan`` or refuses it with a DataError, as
            ``"module:function"``. It is imported at the first scan of the format.
        writer: Function that writes the format, see ``Writer``, in the same notation; None where it is not written.
        counter: Function that counts the volumes in a file, named as ``file::channel=2``, in the same notation; None
            where a file holds one.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    reader: str
    writer: str | None = None
    counter: str | None = None


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
        name="NRRD",
        suffixes=(".nrrd", ".nhdr"),
        reader="mim3d.scans.itk:open_itk",
        writer="mim3d.scans.itk:write_itk",
    ),
    Format(
        name="MetaImage",
        suffixes=(".mha", ".mhd"),
        reader="mim3d.scans.itk:open_itk",
        writer="mim3d.scans.itk:write_itk",
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
    if is_folder and "::" not in address and is_slice_folder(address):
        return IMAGE_STACK
    if is_folder or "::" in address:
        return DICOM
    check_file(address)
    raise DataError(
        f"{address}: no image format is known by this name; give a file that ends in one of {', '.join(SUFFIXES)}, or "
        "the folder of a DICOM series."
    )


def open_scan(address: str) -> StoredScan:
    """Read and check the headers of a scan in any format.

    Raises:
        DataError: The scan cannot be read as one volume; the sentence names the remedy.
    """
    opened: StoredScan = _imported(format_of(address).reader)(address)
    return opened


def num_channels(path: str) -> int:
    """Number of volumes in a file; 1 for a folder and for formats whose files hold one.

    Raises:
        DataError: The header of a file that may hold several cannot be read.
    """
    form = None if os.path.isdir(path) else format_of_file(path)
    return 1 if form is None or form.counter is None else int(_imported(form.counter)(path))


def writer_of(path: str) -> Writer:
    """The function that writes the format which the suffix of ``path`` names.

    Raises:
        DataError: No format that is written is known by this name.
    """
    form = format_of_file(path)
    if form is None or form.writer is None:
        known = ", ".join(suffix for form in FORMATS if form.writer for suffix in form.suffixes)
        raise DataError(f"{path}: no format is known by this name; end it in one of {known}.")
    writer: Writer = _imported(form.writer)
    return writer


def _imported(place: str) -> Any:
    module, function = place.split(":")
    return getattr(importlib.import_module(module), function)
