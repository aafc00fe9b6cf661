"""The text in front of the voxels of an NRRD or MetaImage file (or beside them), as its own words tell it."""

import math
import os
import re
from dataclasses import dataclass

from mim3d.core.errors import DataError

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
class TextHeader:
    """What the text in front of the voxels (or beside them) claims."""

    sizes: tuple[int, ...]
    spacing: tuple[float, ...]
    itemsize: int
    num_values: int
    encoding: str
    packed_bytes: int = 0
    data_path: str | None
    data_offset: int


def read_text_header(path: str) -> TextHeader:
    """Parse the header of an .nrrd, .nhdr, .mha or .mhd file, told apart by suffix.

    Raises:
        DataError: not of that format, or a field that is missing or makes no sense.
    """
    return _nrrd_header(path) if is_nrrd(path) else _meta_header(path)


def is_nrrd(path: str) -> bool:
    """Whether the suffix is that of NRRD."""
    return path.lower().endswith((".nrrd", ".nhdr"))


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
