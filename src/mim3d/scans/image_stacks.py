"""Scans published as images, one file per slice: a folder of them read as one volume.

Nothing in such files says how large a voxel is or how the patient lay: voxels count as 1 mm, columns run to the
patient's left, rows to the back and slices to the head, as radiologists look at axial slices.
"""

import itertools
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import LPS_TO_RAS, Grid, volume_shape
from mim3d.scans.reading_process import read_apart

SLICE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

#: First bytes of an image -> what SimpleITK decodes it with; the ending of its name may say otherwise.
_DECODERS = {
    b"\x89PNG": "PNGImageIO", b"\xff\xd8": "JPEGImageIO", b"BM": "BMPImageIO",
    b"II": "TIFFImageIO", b"MM": "TIFFImageIO",
}  # fmt: skip

_NO_SPACING = (
    "slices saved as images do not say how large a voxel is: 1 x 1 x 1 mm is assumed, so lengths and volumes mean "
    "nothing."
)

#: No slice is larger; it bounds the memory and the time that a damaged one may take.
MAX_SLICE_BYTES = 2**25

#: A grey image saved in colour may differ by so much between its channels, from the rounding of JPEG.
MAX_COLOUR_DIFFERENCE = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStack:
    """The slice images of one scan.

    Attributes:
        grid: Grid of the scan; stored axes are (column, row, slice).
        paths: Path of each slice, in order.
    """

    grid: Grid
    paths: tuple[str, ...]

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in stored axis order (column, row, some slices), slab by slab, in the type of the images.

        Raises:
            DataError: An image cannot be read, is of another size than the first, or holds colours.
        """
        for slab in self.grid.slabs():
            images = []
            for path in self.paths[slab]:
                image = _read_slice(path)
                if image.shape[::-1] != self.grid.shape[:2]:
                    raise DataError(
                        f"{path}: {image.shape[1]} x {image.shape[0]} pixels, but the first slice of the folder has "
                        f"{self.grid.shape[0]} x {self.grid.shape[1]}; keep the slices of one scan in one folder."
                    )
                images.append(image)
            yield np.stack(images).T


def open_image_stack(folder: str) -> ImageStack:
    """Find the slice images of a folder; the size of each slice is that of the first one.

    Raises:
        DataError: There are no images, two have the same number, or the first cannot be read.
    """
    paths = slice_paths(folder)
    first = _read_slice(paths[0])
    rows, columns = first.shape
    shape = volume_shape((columns, rows, len(paths)), folder)
    files.check_memory(folder, shape, first.itemsize)
    # What is not known of one folder of images is known of none.
    files.warn_once(_NO_SPACING)
    grid = Grid(shape=shape, affine=LPS_TO_RAS.copy(), path=folder)
    return ImageStack(grid=grid, paths=tuple(paths))


def is_slice_folder(folder: str) -> bool:
    """Whether a folder holds images and nothing else, hidden files apart."""
    try:
        names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
    except (OSError, ValueError):  # The latter of a name with a zero byte.
        return False
    return bool(names) and all(is_slice(name) for name in names)


def slice_paths(folder: str) -> list[str]:
    """The slice images of a folder in natural order: 2.png before 10.png.

    Raises:
        DataError: There are none, or two of the same number.
    """
    names = sorted(filter(is_slice, os.listdir(folder)), key=natural)
    if not names:
        raise DataError(f"{folder}: no images of slices; expected files such as 1.png.")
    for one, other in itertools.pairwise(names):
        if natural(os.path.splitext(one)[0]) == natural(os.path.splitext(other)[0]):
            raise DataError(f"{folder}: {one} and {other} are the same slice; keep one of them.")
    return [os.path.join(folder, name) for name in names]


def is_slice(name: str) -> bool:
    """Whether a file is a slice image by its name."""
    return not name.startswith(".") and name.lower().endswith(SLICE_SUFFIXES)


def natural(name: str) -> list[tuple[int, str]]:
    """Key that sorts digits by their value and all else by letters: 2.png before 10.png."""
    parts = re.findall(r"\d+|\D+", name.casefold())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _read_slice(path: str) -> npt.NDArray[Any]:
    """One image ``(row, column)``; grey ones saved in colour become grey again."""
    files.check_file(path)
    with open(path, "rb") as stream:
        start = stream.read(4)
    image_io = next((name for magic, name in _DECODERS.items() if start.startswith(magic)), None)
    if image_io is None:
        raise DataError(f"{path}: this is no image (its first bytes say otherwise); copy it again from its source.")
    _require_whole(path, image_io)
    try:
        image = read_apart(path, image_io, MAX_SLICE_BYTES)
    except DataError as error:
        raise DataError(f"{error} Copy the image again from its source.") from error
    if image.ndim == 2:
        return image
    # Two values are grey and opacity, four are colour and opacity.
    colours = image[..., : 1 if image.shape[-1] == 2 else 3] if image.ndim == 3 else image
    if colours.ndim != 3 or int(np.ptp(colours.astype(np.int64), axis=-1).max()) > MAX_COLOUR_DIFFERENCE:
        raise DataError(f"{path}: holds colours or several images, but a slice is one grey image; convert it.")
    return np.asarray(colours[..., 0])


def _require_whole(path: str, image_io: str) -> None:
    """Refuse a truncated image of the formats whose decoders fill what is missing with grey, or with anything.

    Raises:
        DataError: The image ends too early.
    """
    held = os.path.getsize(path)
    with open(path, "rb") as stream:
        if image_io == "JPEGImageIO":
            stream.seek(max(0, held - 4096))
            is_whole = b"\xff\xd9" in stream.read()
        elif image_io == "BMPImageIO":
            header = stream.read(38).ljust(38, b"\0")
            offset, _, width, height = struct.unpack("<IIii", header[10:26])
            bits, compression = struct.unpack("<HI", header[28:34])
            packed_bytes = int.from_bytes(header[34:38], "little") if compression else 0
            is_whole = held >= offset + (packed_bytes or (width * bits + 31) // 32 * 4 * abs(height))
        else:
            is_whole = True
    if not is_whole:
        raise DataError(f"{path}: the image ends before its last pixel; copy it again from its source.")
