"""Headers of MetaImage files, attached to their voxels or in a file beside them."""

from typing import Any

import numpy as np

from mim3d.core.errors import DataError
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
from mim3d.scans.voxel_files import VoxelFile

#: Voxel types, whose sizes are MetaIO's own: its long has 4 bytes on every machine.
_TYPES = {
    "met_char": "i1", "met_ascii_char": "i1", "met_uchar": "u1", "met_short": "i2", "met_ushort": "u2",
    "met_int": "i4", "met_uint": "u4", "met_long": "i4", "met_ulong": "u4",
    "met_long_long": "i8", "met_ulong_long": "u8", "met_float": "f4", "met_double": "f8",
}  # fmt: skip

#: The fields that are read; any other is a remark.
_FIELDS = frozenset(
    "ndims dimsize elementtype elementdatafile elementspacing elementsize elementnumberofchannels headersize "
    "binarydata binarydatabyteordermsb elementbyteordermsb compresseddata compresseddatasize "
    "offset position origin transformmatrix rotation orientation distanceunits "
    "elementtointensityfunctionslope elementtointensityfunctionoffset".split()
)


#: Fields of a rescaling, by the ends of their names, with what they are by default.
_RESCALING = {"slope": "1", "offset": "0"}


def read_meta_header(path: str) -> TextHeader:
    """Read the header of an .mha or .mhd file and check that the files it names may be read.

    Raises:
        DataError: The file is no MetaImage file, its header is damaged or contradicts itself, or its voxels lie
            elsewhere.
    """
    fields: dict[str, str] = {}
    names: tuple[list[str], int] = ([], 0)
    with open(path, "rb") as stream:
        lines = header_lines(stream, path)
        for line in lines:
            name, found, value = line.partition("=")
            key = name.strip().lower()
            if found and key in _FIELDS:
                add_field(fields, key, value.strip(), path)
            if key == "elementdatafile":
                num_axes = axis_count(fields.get("ndims", "3"), path, "NDims")
                names = voxel_file_names(value.strip(), lines, num_axes, path)
                break
        end = stream.tell()
    missing = [name for name in ("ndims", "dimsize", "elementtype", "elementdatafile") if name not in fields]
    if missing:
        raise DataError(f"{path}: this is not a MetaImage file, or its header is truncated (no '{missing[0]}').")
    return _header(fields, names, end, path)


def _header(fields: dict[str, str], names: tuple[list[str], int], end: int, path: str) -> TextHeader:
    num_axes = axis_count(fields["ndims"], path, "NDims")
    sizes = integers(fields["dimsize"], path, "DimSize", num_axes)
    (num_values,) = integers(fields.get("elementnumberofchannels", "1"), path, "ElementNumberOfChannels", 1)
    files.require_one_value(num_values, path)
    shape = volume_shape(sizes, path)
    kind = _TYPES.get(fields["elementtype"].lower().removesuffix("_array").removesuffix("_matrix"))
    if kind is None:
        raise DataError(
            f"{path}: the header has the unknown voxel type '{fields['elementtype'][:80]}'; export it again."
        )
    is_big = _is_true(fields, "binarydatabyteordermsb", "elementbyteordermsb")
    dtype: np.dtype[Any] = np.dtype(kind).newbyteorder(">" if is_big else "<")
    geometry, assumed = _geometry(fields, num_axes, path)
    size_bytes = files.check_memory(path, shape, dtype.itemsize)
    (offset,) = integers(fields.get("headersize", "0"), path, "HeaderSize", 1)
    if offset < -1:
        raise DataError(f"{path}: its header has a HeaderSize of {offset}; correct the header.")
    is_zipped = _is_true(fields, "compresseddata")
    is_text = not _is_true(fields, "binarydata", default="True")
    if fields["elementdatafile"].upper() == "LOCAL":
        (packed,) = integers(fields.get("compresseddatasize", "0"), path, "CompressedDataSize", 1)
        packed = packed if is_zipped else 0
        if 0 < offset < end:
            raise DataError(
                f"{path}: its header puts the voxels at byte {offset}, but is {end} bytes long; correct it."
            )
        skip = -1 if offset == -1 else 0
        parts: tuple[VoxelFile, ...] = (
            VoxelFile(path=path, offset=max(offset, end), skip=skip, size_bytes=size_bytes, packed_bytes=packed),
        )
    else:
        parts = parts_of(path, names, sizes, size_bytes, offset=max(offset, 0), skip=min(offset, 0))
    return TextHeader(
        shape=shape,
        dtype=dtype,
        encoding="zlib" if is_zipped else "text" if is_text else "raw",
        parts=parts,
        geometry=geometry,
        assumed=assumed,
    )


def _is_true(fields: dict[str, str], *names: str, default: str = "False") -> bool:
    """Whether the first of some fields that is there says so, as MetaIO reads it: true, True, T, 1."""
    value = next((fields[name] for name in names if name in fields), default)
    return value[:1] in ("T", "t", "1")


def _geometry(fields: dict[str, str], num_axes: int, path: str) -> tuple[ItkGeometry, tuple[str, ...]]:
    """Where the voxels lie, and what is assumed of it."""
    assumed: tuple[str, ...] = ()
    said = fields.get("elementspacing", fields.get("elementsize"))
    spacing = (1.0,) * num_axes if said is None else numbers(said, path, "ElementSpacing", num_axes)
    check_spacing(spacing, path)
    if said is None:
        assumed = (NO_SPACING,)
    rescaling = [fields.get(f"elementtointensityfunction{name}", default) for name, default in _RESCALING.items()]
    if [numbers(text, path, "ElementToIntensityFunction", 1)[0] for text in rescaling] != [1.0, 0.0]:
        assumed += (f"its rescaling by {rescaling[0]} and {rescaling[1]} is not applied: voxels are taken as stored",)
    origin = _one_of(fields, ("offset", "position", "origin"), num_axes, path) or (0.0,) * num_axes
    turn = _one_of(fields, ("transformmatrix", "rotation", "orientation"), num_axes**2, path)
    matrix = np.eye(num_axes) if turn is None else np.array(turn).reshape(num_axes, num_axes)
    geometry = ItkGeometry(spacing=spacing[:3], origin=origin[:3], direction=tuple(matrix.T[:3, :3].ravel().tolist()))
    geometry, unknown = in_millimetres(geometry, fields.get("distanceunits", ""))
    return geometry, assumed + unknown


def _one_of(fields: dict[str, str], names: tuple[str, ...], count: int, path: str) -> tuple[float, ...] | None:
    """The numbers of a field with several names; None where it is not there."""
    found = [numbers(fields[name], path, name, count) for name in names if name in fields]
    if any(other != found[0] for other in found):
        raise DataError(f"{path}: its header has different numbers for {' and '.join(names)}; correct the header.")
    return found[0] if found else None
