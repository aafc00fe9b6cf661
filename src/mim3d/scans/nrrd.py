"""Headers of NRRD files, attached to their voxels or in a file beside them."""

import math
import re
from itertools import islice
from typing import Any

import numpy as np

from mim3d.core.errors import DataError
from mim3d.core.types import Triple
from mim3d.scans import files
from mim3d.scans.grids import check_spacing, volume_shape
from mim3d.scans.text_headers import (
    NO_SPACING,
    ItkGeometry,
    TextHeader,
    add_field,
    axis_count,
    header_lines,
    in_millimetres,
    integers,
    numbers,
    parts_of,
    voxel_file_names,
)
from mim3d.scans.voxel_files import Encoding, VoxelFile

#: Names of voxel types, without "signed" in front and "int" at the end where they have both.
_TYPES = {
    "signed char": "i1", "int8": "i1", "int8_t": "i1",
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1",
    "short": "i2", "int16": "i2", "int16_t": "i2",
    "ushort": "u2", "unsigned short": "u2", "uint16": "u2", "uint16_t": "u2",
    "int": "i4", "int32": "i4", "int32_t": "i4",
    "uint": "u4", "unsigned": "u4", "uint32": "u4", "uint32_t": "u4",
    "longlong": "i8", "long long": "i8", "int64": "i8", "int64_t": "i8",
    "ulonglong": "u8", "unsigned long long": "u8", "uint64": "u8", "uint64_t": "u8",
    "float": "f4", "double": "f8",
}  # fmt: skip

_ENCODINGS: dict[str, Encoding] = {
    "raw": "raw", "gzip": "gzip", "gz": "gzip", "ascii": "text", "text": "text", "txt": "text", "hex": "hex",
}  # fmt: skip

#: Signs that turn a space's axes into LPS.
_SPACES = {
    "right-anterior-superior": (-1.0, -1.0, 1.0), "ras": (-1.0, -1.0, 1.0),
    "left-anterior-superior": (1.0, -1.0, 1.0), "las": (1.0, -1.0, 1.0),
    "left-posterior-superior": (1.0, 1.0, 1.0), "lps": (1.0, 1.0, 1.0),
}  # fmt: skip

#: Kinds of axes along which voxels lie; along any other lie the values of one voxel.
_DOMAINS = ("domain", "space", "time", "???", "none")

#: Every field of the format, without blanks.
_FIELDS = frozenset(
    "type dimension sizes encoding endian content blocksize min max oldmin oldmax number datafile lineskip byteskip "
    "spacings thicknesses axismins axismaxs centers centerings labels units kinds sampleunits space spacedimension "
    "spaceunits spaceorigin spacedirections measurementframe".split()
)


def read_nrrd_header(path: str) -> TextHeader:
    """Read the header of an .nrrd or .nhdr file and check that the files it names may be read.

    Raises:
        DataError: The file is no NRRD file, its header is damaged or contradicts itself, or its voxels lie elsewhere.
    """
    fields: dict[str, str] = {}
    names: tuple[list[str], int] | None = None
    with open(path, "rb") as stream:
        if not re.fullmatch(rb"NRRD\d\d\.?\d\d\r?\n", stream.readline(12)):
            raise DataError(f"{path}: this is not an NRRD file (its first bytes say otherwise).")
        lines = header_lines(stream, path)
        for line in lines:
            if not line.strip():
                break
            # A key of somebody's own, whose name may hold colons too, stands before ":=".
            if line.startswith("#") or ":=" in line.partition(": ")[0]:
                continue
            name, found, value = line.partition(":")
            key = name.lower().replace(" ", "")
            if not found or key not in _FIELDS:
                raise DataError(
                    f"{path}: its header has the line '{line[:80]}', which is no field of NRRD; correct it."
                )
            add_field(fields, key, value.strip(), path)
            if key == "datafile":
                # A list of files goes on to the end of the header.
                num_axes = axis_count(fields.get("dimension", "3"), path, "dimension")
                names = voxel_file_names(value.strip(), lines, num_axes, path)
        end = stream.tell()
    missing = [name for name in ("sizes", "type", "encoding", "dimension") if name not in fields]
    if missing:
        raise DataError(f"{path}: the header lacks '{missing[0]}'; it is truncated or damaged.")
    return _header(fields, names, end, path)


def _header(fields: dict[str, str], names: tuple[list[str], int] | None, end: int, path: str) -> TextHeader:
    num_axes = axis_count(fields["dimension"], path, "dimension")
    sizes = integers(fields["sizes"], path, "sizes", num_axes)
    kinds = fields.get("kinds", "").lower().split() or ["domain"] * num_axes
    if len(kinds) != num_axes:
        raise DataError(f"{path}: its header has {len(kinds)} kinds for {num_axes} axes; correct the header.")
    along = [axis for axis, kind in enumerate(kinds) if kind in _DOMAINS]
    files.require_one_value(math.prod(size for axis, size in enumerate(sizes) if axis not in along), path)
    shape = volume_shape([sizes[axis] for axis in along], path)
    encoding = _ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        raise DataError(
            f"{path}: voxels in the encoding '{fields['encoding'][:80]}' are not read; save it as raw or gzip."
        )
    dtype = _dtype(fields, encoding, path)
    geometry, assumed = _geometry(fields, along[:3], num_axes, shape, path)
    size_bytes = files.check_memory(path, shape, dtype.itemsize)
    (lines,) = integers(fields.get("lineskip", "0"), path, "line skip", 1)
    (skip,) = integers(fields.get("byteskip", "0"), path, "byte skip", 1)
    if not 0 <= lines < 2**16 or skip < -1:
        raise DataError(f"{path}: its header passes over {lines} lines and {skip} bytes; correct the header.")
    if names is None:
        parts: tuple[VoxelFile, ...] = (VoxelFile(path=path, offset=end, skip=skip, size_bytes=size_bytes),)
    else:
        parts = parts_of(path, names, sizes, size_bytes, skip=skip)
    if lines:
        parts = tuple(_after_lines(part, lines) for part in parts)
    return TextHeader(shape=shape, dtype=dtype, encoding=encoding, parts=parts, geometry=geometry, assumed=assumed)


def _dtype(fields: dict[str, str], encoding: str, path: str) -> np.dtype[Any]:
    word = " ".join(fields["type"].lower().split())
    kind = _TYPES.get(word) or _TYPES.get(word.removeprefix("signed ").removesuffix(" int"))
    if kind is None:
        raise DataError(
            f"{path}: the header has the unknown voxel type '{fields['type'][:80]}'; export the scan again."
        )
    endian = fields.get("endian", "").lower()
    if kind[1] == "1" or encoding == "text":
        return np.dtype(kind)
    if endian not in ("little", "big"):
        raise DataError(f"{path}: the header does not say the order of bytes ('endian: little' or 'big'); add it.")
    return np.dtype(kind).newbyteorder("<" if endian == "little" else ">")


def _after_lines(part: VoxelFile, count: int) -> VoxelFile:
    """A part that starts after some lines of its file."""
    with open(part.path, "rb") as stream:
        stream.seek(part.offset)
        offset = part.offset + sum(len(line) for line in islice(iter(lambda: stream.readline(2**20), b""), count))
    return VoxelFile(path=part.path, offset=offset, skip=part.skip, size_bytes=part.size_bytes)


def _geometry(
    fields: dict[str, str], along: list[int], num_axes: int, shape: Triple, path: str
) -> tuple[ItkGeometry, tuple[str, ...]]:
    """Where the voxels lie, and what is assumed of it. NRRD states directions in a space, or spacings alone."""
    signs = np.ones(3)
    assumed: list[str] = []
    # A space of four axes differs in the last one alone, which is time.
    space = fields.get("space", "").lower().removesuffix("-time")
    if space in _SPACES:
        signs = np.array(_SPACES[space])
    elif space or "spacedirections" in fields:
        assumed.append(f"the space is '{space or 'of no name'}', and its axes are taken for left, posterior, superior")
    vectors = re.findall(r"none|\([^()]*\)", fields.get("spacedirections", ""))
    if "spacedirections" in fields and len(vectors) != num_axes:
        raise DataError(
            f"{path}: its header has {len(vectors)} space directions for {num_axes} axes; correct the header."
        )
    stated = [vectors[axis] for axis in along if vectors and vectors[axis] != "none"]
    spacing, direction, origin = np.ones(3), np.eye(3), np.zeros(3)
    if stated:
        if "spacings" in fields or len(stated) != 3:
            raise DataError(f"{path}: its header has directions for some axes, or spacings beside them; correct it.")
        columns = np.array([_vector(vector, path) for vector in stated]).T * signs[:, None]
        spacing = np.array([math.sqrt(x * x + y * y + z * z) for x, y, z in columns.T.tolist()])
        check_spacing(spacing.tolist(), path)
        direction = columns * (1.0 / spacing)
    elif "spacings" in fields:
        found = numbers(fields["spacings"], path, "spacings", num_axes)
        spacing = np.array([found[axis] for axis in along])
        check_spacing(spacing.tolist(), path)
    else:
        assumed.append(NO_SPACING)
    if not stated:
        assumed.append("it does not say how the patient lies; its axes are taken for left, posterior, superior")
    if "spaceorigin" in fields:
        origin = np.array(_vector(fields["spaceorigin"], path)) * signs
    elif "axismins" in fields and not stated:
        origin = _axis_origin(fields, along, num_axes, shape, spacing, path)
    geometry = ItkGeometry(
        spacing=tuple(spacing.tolist()), origin=tuple(origin.tolist()), direction=tuple(direction.ravel().tolist())
    )
    # Each axis of the space has a unit in quotes.
    units = set(re.findall(r'"([^"]*)"', fields.get("spaceunits", "")))
    geometry, unknown = in_millimetres(geometry, " and ".join(sorted(units)))
    return geometry, (*assumed, *unknown)


def _vector(text: str, path: str) -> tuple[float, ...]:
    """Three coordinates in brackets; a fourth, of time, is left away."""
    found = numbers(text.strip("() \t"), path, "space vector")
    if not 3 <= len(found) <= 4:
        raise DataError(f"{path}: its header has the vector '{text[:80]}', where three numbers are needed; correct it.")
    return found[:3]


def _axis_origin(
    fields: dict[str, str], along: list[int], num_axes: int, shape: Triple, spacing: Any, path: str
) -> Any:
    """The centre of the first voxel from the ends of the axes: voxels are cells, unless the header calls them nodes."""
    low = numbers(fields["axismins"], path, "axis mins", num_axes)
    high = numbers(fields.get("axismaxs", "nan " * num_axes), path, "axis maxs", num_axes)
    centred = (fields.get("centers", fields.get("centerings", "")).lower().split() or ["cell"] * num_axes)[:num_axes]
    steps = [(high[axis] - low[axis]) / size for axis, size in zip(along, shape, strict=True)]
    steps = [float(own) if math.isnan(step) else step for step, own in zip(steps, spacing, strict=True)]
    is_node = [centred[axis : axis + 1] == ["node"] for axis in along]
    return np.array(
        [low[axis] + (0 if node else step / 2) for axis, node, step in zip(along, is_node, steps, strict=True)]
    )
