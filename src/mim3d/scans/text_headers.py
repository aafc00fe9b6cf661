"""Text headers of NRRD and MetaImage files: their lines, their numbers, and the files of voxels that they may name.

A header may come from anywhere, so it names only regular files that lie beside or below it, whatever links say.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import times
from mim3d.scans.voxel_files import Encoding, VoxelFile

#: A text header longer than this is no header.
_MAX_HEADER_BYTES = 2**20

#: More files than this hold no single scan.
_MAX_FILES = 2**16

#: A pattern of file names with the one number that C would print, and its range: ``slice%03d.raw 1 20 1``.
_PATTERN = re.compile(r"(?P<before>[^%]*)%(?P<form>0?\d{0,2})[dui](?P<after>[^%\s]*)(?P<numbers>(\s+[-+]?\d+){2,4})")

#: Millimetres per unit of length.
_UNITS_MM = {
    "": 1.0, "???": 1.0, "mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "centimeter": 10.0,
    "m": 1000.0, "meter": 1000.0, "um": 0.001, "\u00b5m": 0.001, "\u03bcm": 0.001, "micrometer": 0.001,
    "micron": 0.001, "microns": 0.001,
}  # fmt: skip

#: Characters that no line of text holds.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class ItkGeometry:
    """Spacing, origin and direction of an ITK image as stored, in LPS millimetres.

    Attributes:
        spacing: Voxel size along each of the three axes.
        origin: Place of the first voxel.
        direction: Matrix of the directions row by row; its columns belong to the axes.
    """

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextHeader:
    """What the text in front of the voxels, or in a file beside them, says.

    Attributes:
        shape: Number of voxels along each of the three axes.
        dtype: Type of the voxels as stored.
        encoding: How the files hold the voxels.
        parts: Files of the voxels in their order.
        geometry: Where the voxels lie.
        assumed: A phrase for each thing that the header leaves open, with what is assumed.
    """

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    encoding: Encoding
    parts: tuple[VoxelFile, ...]
    geometry: ItkGeometry
    assumed: tuple[str, ...] = ()


#: What is assumed without a voxel size.
NO_SPACING = "it does not say how large a voxel is, and 1 x 1 x 1 mm is assumed"


def in_millimetres(geometry: ItkGeometry, unit: str) -> tuple[ItkGeometry, tuple[str, ...]]:
    """A geometry in a unit of length as one in millimetres, and what is assumed where the unit is not known."""
    factor = _UNITS_MM.get(unit.strip('" \t').lower())
    if factor is None:
        return geometry, (f"lengths are in '{unit[:40]}', which is no known unit, and are taken for millimetres",)
    if factor == 1.0:
        return geometry, ()
    spacing, origin = (tuple(factor * value for value in values) for values in (geometry.spacing, geometry.origin))
    return ItkGeometry(spacing=spacing, origin=origin, direction=geometry.direction), ()


def header_lines(stream: BinaryIO, path: str) -> Iterator[str]:
    """Lines of a text header, from where a file stands, without their ends.

    Raises:
        DataError: The header does not end, or holds bytes that no text holds.
    """
    while raw := stream.readline(_MAX_HEADER_BYTES):
        line = os.fsdecode(raw.rstrip(b"\r\n"))
        if stream.tell() > _MAX_HEADER_BYTES:
            raise DataError(
                f"{path}: its header is longer than {_MAX_HEADER_BYTES} bytes, so it is none; export again."
            )
        if _CONTROL.search(line):
            raise DataError(f"{path}: its header holds bytes that are no text; it is damaged, so copy it again.")
        yield line


def add_field(fields: dict[str, str], name: str, value: str, path: str) -> None:
    """Take a field of a header up, which may be there once.

    Raises:
        DataError: The header has it already.
    """
    if name in fields:
        raise DataError(f"{path}: its header has the field '{name}' twice; correct the header.")
    fields[name] = value


def numbers(text: str, path: str, field: str, count: int | None = None) -> tuple[float, ...]:
    """The numbers of a field.

    Raises:
        DataError: They are no numbers, or not as many as are needed.
    """
    try:
        found = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        raise DataError(f"{path}: its header has '{field}: {text[:80]}', not numbers; correct the header.") from error
    if count is not None and len(found) != count:
        raise DataError(
            f"{path}: its header has {len(found)} numbers in '{field}: {text[:80]}', but {count} are needed; correct "
            "the header."
        )
    return found


def integers(text: str, path: str, field: str, count: int | None = None) -> tuple[int, ...]:
    """The whole numbers of a field, one at least.

    Raises:
        DataError: They are no whole numbers of a plausible size, or not as many as are needed.
    """
    found = numbers(text, path, field, count)
    if not found or not all(number.is_integer() and abs(number) < 2**53 for number in found):
        raise DataError(f"{path}: its header has '{field}: {text[:80]}', not whole numbers; correct the header.")
    return tuple(int(number) for number in found)


def axis_count(text: str, path: str, field: str) -> int:
    """The number of axes that a header states.

    Raises:
        DataError: It is not one from 1 to 16.
    """
    (count,) = integers(text, path, field, 1)
    if not 1 <= count <= 16:
        raise DataError(f"{path}: its header claims {count} axes ('{field}: {text[:80]}'); correct the header.")
    return count


def voxel_file_names(value: str, lines: Iterator[str], num_axes: int, path: str) -> tuple[list[str], int]:
    """Names of the files of voxels: one, all of a list in the lines that follow, or those of a pattern with numbers.

    Args:
        value: What the field says: a name, ``LIST``, or ``slice%03d.raw FIRST LAST STEP``; the latter two may be
            followed by the number of axes of each file.
        lines: The lines after it.
        num_axes: Axes of the scan.
        path: The header.

    Returns:
        The names, and the number of axes of what each file holds.

    Raises:
        DataError: The list or pattern is not understood, or names too many files.
    """
    if value.split()[:1] in (["LIST"], ["List"], ["list"]):
        given, names = value.split()[1:], [line.strip() for line in lines if line.strip()]
    elif match := _PATTERN.fullmatch(value):
        first, last, step, *given = [*match["numbers"].split(), "1"][: max(3, len(match["numbers"].split()))]
        start, stop, stride = int(first), int(last), int(step)
        if stride == 0 or not 0 < (stop - start) // stride + 1 <= _MAX_FILES:
            raise DataError(f"{path}: its header counts files from {start} to {stop} in steps of {stride}; correct it.")
        count = range(start, stop + (1 if stride > 0 else -1), stride)
        names = [f"{match['before']}{index:{match['form']}d}{match['after']}" for index in count]
    else:
        return [value], num_axes
    each = integers(" ".join(given), path, "data file", 1)[0] if given else num_axes - 1
    if not names or len(names) > _MAX_FILES or not 1 <= each <= num_axes:
        raise DataError(f"{path}: its header lists {len(names)} files of {each} axes; correct the header.")
    return names, each


def beside(path: str, name: str) -> str:
    """The file of voxels that a header names, which has to lie beside the header or in a folder below.

    Raises:
        DataError: It leads elsewhere, once links are resolved, is missing, or is no regular file.
    """
    if not name:
        raise DataError(f"{path}: its header names no file of its voxels; name it there.")
    target = os.path.join(os.path.dirname(path), name)
    homes = {os.path.realpath(os.path.dirname(path) or "."), os.path.dirname(os.path.realpath(path))}
    real = os.path.realpath(target)
    if not any(os.path.commonpath([home, real]) == home for home in homes):
        raise DataError(
            f"{path}: its header names '{name[:200]}' as the file of its voxels, which leads out of its folder; "
            "put the file beside its header, and name it there without a path."
        )
    if not os.path.lexists(target):
        raise DataError(f"{path}: its voxels, {target[:500]}, are missing; put them there.")
    try:
        files.check_file(target)
    except DataError as error:
        raise DataError(f"{path}: its voxels cannot be read: {error}") from error
    return target


def parts_of(
    path: str,
    named: tuple[Sequence[str], int],
    sizes: Sequence[int],
    size_bytes: int,
    *,
    offset: int = 0,
    skip: int = 0,
) -> tuple[VoxelFile, ...]:
    """The detached files of a header, each of which holds as much as every other.

    Args:
        path: The header.
        named: The names of the files, and the number of axes of what each holds.
        sizes: Sizes of all axes.
        size_bytes: Bytes of all voxels.
        offset: Byte of each file where its voxels start.
        skip: Bytes before them once unpacked, see ``VoxelFile``.

    Raises:
        DataError: One of them may not be read, or the voxels do not divide among them.
    """
    names, num_axes = named
    if len(names) > 1 and math.prod(sizes[num_axes:]) != len(names):
        raise DataError(f"{path}: its header lists {len(names)} files for {times(sizes)} voxels; correct the header.")
    each = size_bytes // len(names)
    return tuple(VoxelFile(path=beside(path, name), offset=offset, skip=skip, size_bytes=each) for name in names)
