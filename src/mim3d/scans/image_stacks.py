"""Scans published as pictures, one file per slice: a folder of them read as one volume.

Nothing in such files says how large a voxel is or how the patient lay: voxels count as 1 mm, columns run to the
patient's left, rows to the back and slices to the head, as radiologists look at axial slices.
"""

import functools
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import LPS_TO_RAS, Grid
from mim3d.scans.itk import simple_itk
from mim3d.scans.voxel_copies import slices_at_once

SLICE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

#: A grey picture saved in colour may differ by so much between its channels, from the rounding of JPEG.
MAX_COLOUR_DIFFERENCE = 4


def is_slice_folder(folder: str) -> bool:
    """Whether a folder holds pictures and nothing else, hidden files apart."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except OSError:
        return False
    return bool(names) and all(is_slice(name) for name in names)


def read_grid(folder: str) -> Grid:
    """The grid of a folder of pictures, from the header of its first one.

    Raises:
        DataError: no picture, or one that cannot be read.
    """
    paths = slice_paths(folder)
    columns, rows = _size_of(paths[0])
    _warn_of_spacing()
    return Grid(shape=(columns, rows, len(paths)), affine=LPS_TO_RAS.copy(), path=folder)


def read_slabs(grid: Grid) -> Iterator[npt.NDArray[Any]]:
    """Voxels in stored axis order (column, row, some slices), slab by slab, in the type of the pictures.

    Raises:
        DataError: a picture that cannot be read, is of another size than the first, or holds colours.
    """
    paths = slice_paths(grid.path)
    num_at_once = slices_at_once(grid.shape[0] * grid.shape[1])
    for start in range(0, len(paths), num_at_once):
        pictures = []
        for path in paths[start : start + num_at_once]:
            picture = _read_slice(path)
            if picture.shape[::-1] != grid.shape[:2]:
                raise DataError(
                    f"{path}: {picture.shape[1]} x {picture.shape[0]} pixels, but the first slice of the folder has "
                    f"{grid.shape[0]} x {grid.shape[1]}; keep the slices of one scan in one folder."
                )
            pictures.append(picture)
        yield np.stack(pictures).T


def slice_paths(folder: str) -> list[str]:
    """The pictures of a folder in natural order: 2.png before 10.png.

    Raises:
        DataError: none, or two of the same number.
    """
    names = sorted(filter(is_slice, os.listdir(folder)), key=natural)
    if not names:
        raise DataError(f"{folder}: no pictures of slices; expected files such as 1.png.")
    for one, other in itertools.pairwise(names):
        if natural(os.path.splitext(one)[0]) == natural(os.path.splitext(other)[0]):
            raise DataError(f"{folder}: {one} and {other} are the same slice; keep one of them.")
    return [os.path.join(folder, name) for name in names]


def is_slice(name: str) -> bool:
    """Whether a file is a picture by its name."""
    return not name.startswith(".") and name.lower().endswith(SLICE_SUFFIXES)


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts digits by their value and all else by letters: 2.png before 10.png."""
    parts = re.findall(r"\d+|\D+", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _size_of(path: str) -> tuple[int, int]:
    files.check_file(path)
    reader = simple_itk().ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _unreadable(path) from error
    columns, rows = reader.GetSize()[:2]
    return int(columns), int(rows)


def _read_slice(path: str) -> npt.NDArray[Any]:
    """One picture ``(row, column)``; grey ones saved in colour become grey again."""
    files.check_file(path)
    sitk = simple_itk()
    try:
        picture = np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(path)))
    except RuntimeError as error:
        raise _unreadable(path) from error
    if picture.ndim == 2:
        return picture
    # Two values are grey and opacity, four are colour and opacity.
    colours = picture[..., : 1 if picture.shape[-1] == 2 else 3] if picture.ndim == 3 else picture
    if colours.ndim != 3 or int(np.ptp(colours.astype(np.int64), axis=-1).max()) > MAX_COLOUR_DIFFERENCE:
        raise DataError(f"{path}: holds colours or several pictures, but a slice is one grey picture; convert it.")
    return np.asarray(colours[..., 0])


def _unreadable(path: str) -> DataError:
    return DataError(f"{path}: cannot be read as a picture; copy it again from its source.")


@functools.cache
def _warn_of_spacing() -> None:
    """Once per process: what is not known of one folder of pictures is known of none."""
    warnings.warn(
        "slices saved as pictures say nothing of the size of a voxel: 1 x 1 x 1 mm is assumed, so lengths and volumes "
        "mean nothing.",
        stacklevel=3,
    )
