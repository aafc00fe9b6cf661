"""NRRD and MetaImage files: the text header checked against the file, then read and written by SimpleITK."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import LPS_TO_RAS, Grid, check_affine, check_spacing, spacing_of, volume_shape

#: Bytes per voxel, by the last word that matters of a type in either format.
_ITEMSIZES = {
    "char": 1, "int8": 1, "uint8": 1, "int8_t": 1, "uint8_t": 1, "uchar": 1,
    "short": 2, "int16": 2, "uint16": 2, "int16_t": 2, "uint16_t": 2, "ushort": 2,
    "int": 4, "int32": 4, "uint32": 4, "int32_t": 4, "uint32_t": 4, "uint": 4, "float": 4,
    "longlong": 8, "int64": 8, "uint64": 8, "int64_t": 8, "uint64_t": 8, "ulonglong": 8, "double": 8,
}  # fmt: skip

#: A text header longer than this is no header.
_MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ItkGeometry:
    """Spacing, origin and direction of an ITK image as stored, in LPS millimetres."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextHeader:
    """What the text in front of the voxels, or in a file beside them, claims.

    Attributes:
        sizes: Number of voxels along each stored axis.
        spacing: Voxel size along each axis, in millimetres.
        itemsize: Bytes per value.
        num_values: Values per voxel; more than one for colours and vectors.
        encoding: "raw", "gzip", "zlib", or "other" for what SimpleITK has to check itself.
        packed_bytes: Number of compressed bytes, where the header says so, else 0.
        data_path: File of the voxels; None for voxels in several files.
        data_offset: Byte of that file where the voxels start.
    """

    sizes: tuple[int, ...]
    spacing: tuple[float, ...]
    itemsize: int
    num_values: int
    encoding: str
    packed_bytes: int = 0
    data_path: str | None
    data_offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ItkScan:
    """An NRRD or MetaImage file whose header has been checked.

    Attributes:
        grid: Grid of the scan.
        header: The text header.
    """

    grid: Grid
    header: TextHeader

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in stored axis order, (i, j, some k), slab by slab along the last axis, in the type of the file.

        All voxels are unpacked at the first slab, as SimpleITK has no other way; the slabs are views of them.

        Raises:
            DataError: The voxels cannot be unpacked.
        """
        path, header = self.grid.path, self.header
        if header.data_path is not None and header.encoding in ("gzip", "zlib"):
            # SimpleITK hands over garbage where a compressed stream is damaged.
            files.check_packed(header.data_path, header.data_offset, math.prod(header.sizes) * header.itemsize)
        try:
            image = _reader(path).Execute()
        except RuntimeError as error:
            raise DataError(
                f"{path}: the voxels cannot be read ({_reason(error)}); copy the file again from its source."
            ) from error
        # The view is valid for as long as the image is referred to: as long as this function has not ended.
        stored = simple_itk().GetArrayViewFromImage(image).T.reshape(self.grid.shape, order="F")
        for slab in self.grid.slabs():
            yield stored[..., slab]


def open_itk(path: str) -> ItkScan:
    """Read and check the header of an .nrrd, .nhdr, .mha or .mhd file; no voxel is unpacked into memory.

    Raises:
        DataError: The file is not of this format, truncated or without its detached voxels; it holds colours or vectors
            or is not 3-D; its geometry is impossible, or it has more voxels than the file or the memory can hold.
    """
    files.check_file(path)
    header = _nrrd_header(path) if _is_nrrd(path) else _meta_header(path)
    _check_header(header, path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path}: the header cannot be read ({_reason(error)}); export the scan again.") from error
    _require_one_value(reader.GetNumberOfComponents(), path)
    shape = volume_shape(reader.GetSize(), path)
    num_axes = reader.GetDimension()
    direction = np.array(reader.GetDirection()).reshape(num_axes, num_axes)[:3, :3]
    geometry = ItkGeometry(
        spacing=tuple(reader.GetSpacing()[:3]),
        origin=tuple(reader.GetOrigin()[:3]),
        direction=tuple(float(value) for value in direction.ravel()),
    )
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array(geometry.spacing)
    affine[:3, 3] = geometry.origin
    affine = LPS_TO_RAS @ affine
    check_affine(affine, path)
    return ItkScan(grid=Grid(shape=shape, affine=affine, path=path, source=geometry), header=header)


def write_itk(path: str, array: npt.NDArray[Any], grid: Grid) -> None:
    """Write voxels in stored axis order, compressed, as the format that the suffix of `path` names."""
    geometry = grid.source
    if not isinstance(geometry, ItkGeometry):
        lps = LPS_TO_RAS @ grid.affine
        spacing = spacing_of(lps)
        geometry = ItkGeometry(
            spacing=spacing,
            origin=tuple(float(value) for value in lps[:3, 3]),
            direction=tuple(float(value) for value in (lps[:3, :3] / np.array(spacing)).ravel()),
        )
    sitk = simple_itk()
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        sitk.WriteImage(image, path, True)
    except RuntimeError as error:
        raise OSError(_reason(error)) from error


def simple_itk() -> Any:
    """The SimpleITK module, imported at the first scan that needs it; it has no types."""
    import SimpleITK

    return SimpleITK


def _is_nrrd(path: str) -> bool:
    return path.lower().endswith((".nrrd", ".nhdr"))


def _reader(path: str) -> Any:
    reader = simple_itk().ImageFileReader()
    # Named, so that content of another format under this suffix is not handed to another decoder.
    reader.SetImageIO("NrrdImageIO" if _is_nrrd(path) else "MetaImageIO")
    reader.SetFileName(path)
    return reader


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _require_one_value(num_values: int, path: str) -> None:
    if num_values != 1:
        raise DataError(
            f"{path}: every voxel holds {num_values} values (a colour, a vector or a displacement), but one "
            "value per voxel is needed; save one component as a file of its own."
        )


def _check_header(header: TextHeader, path: str) -> None:
    """Refuse a header that the file of the voxels cannot keep, before anything is allocated."""
    _require_one_value(header.num_values, path)
    volume_shape(header.sizes, path)
    check_spacing(header.spacing, path)
    size_bytes = files.check_memory(path, header.sizes, header.itemsize)
    if header.data_path is None:
        return
    if not os.path.isfile(header.data_path):
        raise DataError(f"{path}: its voxels, {header.data_path}, are missing; put them there.")
    held = os.path.getsize(header.data_path) - header.data_offset
    if header.encoding == "raw":
        files.check_raw(header.data_path, header.data_offset, size_bytes)
    elif header.encoding == "gzip":
        files.check_gzip(header.data_path, header.data_offset, size_bytes)
    elif header.encoding == "zlib":
        files.check_deflate(header.data_path, held, size_bytes)
        if held < header.packed_bytes:
            raise DataError(
                f"{path}: the header claims {header.packed_bytes} compressed bytes, but the file holds {held}; it is "
                "truncated, so copy it again from its source."
            )


def _nrrd_header(path: str) -> TextHeader:
    with open(path, "rb") as stream:
        if stream.read(4) != b"NRRD":
            raise DataError(f"{path}: this is not an NRRD file (its first bytes say otherwise).")
    fields, end = _read_fields(path, ":", None)
    missing = [name for name in ("sizes", "type", "encoding") if name not in fields]
    if missing:
        raise DataError(f"{path}: the header lacks '{missing[0]}'; it is truncated or damaged.")
    sizes = list(_integers(fields["sizes"], path, "sizes"))
    kinds = fields.get("kinds", "").split()
    num_values = 1
    if kinds and len(kinds) == len(sizes) and kinds[0] not in ("domain", "space", "???", "none"):
        num_values = sizes.pop(0)
    vectors = re.findall(r"\(([^)]*)\)", fields.get("space directions", ""))
    spacing = [math.hypot(*_numbers(vector, path, "space directions")) for vector in vectors]
    if "spacings" in fields:
        spacing = list(_numbers(fields["spacings"], path, "spacings"))[-len(sizes) :]
    name = fields.get("data file", fields.get("datafile"))
    encoding = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}.get(fields["encoding"].lower(), "other")
    if any(fields.get(skip, "0") != "0" for skip in ("line skip", "lineskip", "byte skip", "byteskip")):
        encoding = "other"
    return TextHeader(
        sizes=tuple(sizes),
        spacing=tuple(spacing),
        itemsize=_itemsize(fields["type"].lower(), path),
        num_values=num_values,
        encoding=encoding,
        data_path=path if name is None else _beside(path, name),
        data_offset=end if name is None else 0,
    )


def _meta_header(path: str) -> TextHeader:
    fields, end = _read_fields(path, "=", "elementdatafile")
    missing = [name for name in ("dimsize", "elementtype", "elementdatafile") if name not in fields]
    if missing:
        raise DataError(f"{path}: this is not a MetaImage file, or its header is truncated (no '{missing[0]}').")
    name = fields["elementdatafile"]
    zipped = fields.get("compresseddata", "False").lower() == "true"
    kind = fields["elementtype"].lower().removeprefix("met_").removesuffix("_array")
    spacing = fields.get("elementspacing", fields.get("elementsize", ""))
    return TextHeader(
        sizes=_integers(fields["dimsize"], path, "DimSize"),
        spacing=_numbers(spacing, path, "ElementSpacing"),
        itemsize=_itemsize(kind.replace("long_long", "longlong").replace("ulong", "longlong"), path),
        num_values=_integers(fields.get("elementnumberofchannels", "1"), path, "ElementNumberOfChannels")[0],
        packed_bytes=_integers(fields.get("compresseddatasize", "0"), path, "CompressedDataSize")[0],
        encoding="zlib" if zipped else "raw" if "headersize" not in fields else "other",
        data_path=path if name.upper() == "LOCAL" else _beside(path, name),
        data_offset=end if name.upper() == "LOCAL" else 0,
    )


def _read_fields(path: str, separator: str, last_field: str | None) -> tuple[dict[str, str], int]:
    """Fields of a text header (names in lower case) up to a blank line or `last_field`, and its end."""
    fields: dict[str, str] = {}
    with open(path, "rb") as stream:
        while line := stream.readline(_MAX_HEADER_BYTES):
            text = line.decode("latin-1").strip()
            if not text and last_field is None:
                break
            name, found, value = text.partition(separator)
            if found and not text.startswith("#") and not value.startswith("="):
                fields[name.strip().lower()] = value.strip()
            if name.strip().lower() == last_field or stream.tell() > _MAX_HEADER_BYTES:
                break
        return fields, stream.tell()


def _numbers(text: str, path: str, field: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError as error:
        raise DataError(f"{path}: the header has '{field}: {text}', not numbers; correct the header.") from error


def _integers(text: str, path: str, field: str) -> tuple[int, ...]:
    numbers = _numbers(text, path, field)
    if not numbers or not all(number.is_integer() for number in numbers):
        raise DataError(f"{path}: the header has '{field}: {text}', not whole numbers; correct the header.")
    return tuple(int(number) for number in numbers)


def _itemsize(kind: str, path: str) -> int:
    word = kind.removeprefix("unsigned ").removeprefix("signed ").replace("long long", "longlong").split(" ")[0]
    if word not in _ITEMSIZES:
        raise DataError(f"{path}: the header has the unknown voxel type '{kind}'; export the scan again.")
    return _ITEMSIZES[word]


def _beside(path: str, name: str) -> str | None:
    """Path of detached voxels in one file; None for a list or a pattern, which SimpleITK checks itself."""
    return None if "%" in name or name.upper().startswith("LIST") else os.path.join(os.path.dirname(path), name)
