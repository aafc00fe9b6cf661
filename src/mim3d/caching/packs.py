"""Packs: many cases in files of some GB, for file systems that suffer from millions of small files.

A pack is a ZIP file whose members are stored as they are, uncompressed and with fixed times: the same cases make the
same bytes. The zarr library opens it as a group of one group per case. mim3d reads ranges of its bytes, whose places
the manifest lists, and never its directory.

Cases are packed in the order of their digests, and a pack's name is the digest of what it holds: a pack of the right
name need not be made again.
"""

import hashlib
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping

from mim3d.caching.layout import ByteSource, FileRange, names_in, open_bytes
from mim3d.caching.shards import METADATA

#: The earliest time that ZIP knows.
_TIME = (1980, 1, 1, 0, 0, 0)

#: Signature, nine fields that the directory holds too, and the lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22sHH")

SUFFIX = ".zip"

_COPY_BYTES = 8 * 2**20

#: The group that makes a pack one for zarr.
_ROOT = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1)


class PackedCase(Mapping[str, FileRange]):
    """The files of one case inside a pack, by their names below the case's folder.

    Args:
        path: Path of the pack.
        places: Name of each file -> its first byte and number of bytes in the pack.

    Raises:
        ValueError: A place is negative.
    """

    def __init__(self, path: str, places: Mapping[str, tuple[int, int]]) -> None:
        if any(offset < 0 or length < 0 for offset, length in places.values()):
            raise ValueError(f"negative places in {path}")
        self.path = path
        self._places = dict(places)

    def __getitem__(self, name: str) -> FileRange:
        """The bytes of a file."""
        offset, length = self._places[name]
        return FileRange(self.path, offset, length)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __str__(self) -> str:
        return self.path

    def members(self) -> list[dict[str, str | int]]:
        """Name, first byte and number of bytes of each file, for the manifest."""
        return [{"name": name, "offset": at, "length": length} for name, (at, length) in self._places.items()]


def pack_plan(sizes: Mapping[str, int], pack_bytes: int) -> dict[str, tuple[str, ...]]:
    """Which cases go into which pack: name of the pack -> case folders.

    Args:
        sizes: Case folder -> bytes, in the order in which they are packed.
        pack_bytes: Size at which a pack is closed.
    """
    packs: list[list[str]] = []
    filled = pack_bytes
    for folder, size in sizes.items():
        if filled >= pack_bytes:
            packs.append([])
            filled = 0
        packs[-1].append(folder)
        filled += size
    return {f"{hashlib.sha256(json.dumps(held).encode()).hexdigest()[:24]}{SUFFIX}": tuple(held) for held in packs}


def write_pack(path: str | os.PathLike[str], sources: Mapping[str, ByteSource]) -> None:
    """Write finished cases into a pack, one after the other.

    Args:
        path: Path of the file, which is written in place.
        sources: Case folder -> where its files lie now.

    Raises:
        OSError: The disk is full, or a source cannot be read.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as pack:
        pack.writestr(_member(METADATA), _ROOT)
        for folder, source in sources.items():
            for name in names_in(source):
                _copy(open_bytes(source, name), pack, f"{folder}/{name}")


def find_packed(packs_dir: str) -> dict[str, PackedCase]:
    """Every case in the packs of a folder: case folder -> its files. Damaged packs are removed with a warning.

    Raises:
        OSError: A pack cannot be read.
    """
    found: dict[str, PackedCase] = {}
    for name in sorted(os.listdir(packs_dir)) if os.path.isdir(packs_dir) else ():
        if not name.endswith(SUFFIX):
            continue
        path = os.path.join(packs_dir, name)
        try:
            found.update(cases_in(path))
        except (zipfile.BadZipFile, ValueError, struct.error) as error:
            warnings.warn(f"{path}: damaged ({error}); its cases are made again.", stacklevel=2)
            os.remove(path)
    return found


def cases_in(path: str) -> dict[str, PackedCase]:
    """Every case in a pack, read from its directory.

    Raises:
        OSError, ValueError, zipfile.BadZipFile, struct.error: The pack is damaged or cannot be read.
    """
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with zipfile.ZipFile(path) as pack, open(path, "rb") as file:
        members = pack.infolist()
        if not members or (members[0].filename, members[0].header_offset) != (METADATA, 0):
            # Cases hold ZIP files of their own, whose directory may stand where a truncated pack ends.
            raise zipfile.BadZipFile("it is truncated")
        for member in members:
            folder, _, name = member.filename.partition("/")
            if not name:
                continue
            file.seek(member.header_offset)
            _, _, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
            first = member.header_offset + _LOCAL_HEADER.size + name_length + extra_length
            places.setdefault(folder, {})[name] = (first, member.file_size)
    return {folder: PackedCase(path, members) for folder, members in places.items()}


def _member(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _TIME)
    member.create_system = 3
    member.external_attr = 0o644 << 16
    return member


def _copy(source: FileRange, pack: zipfile.ZipFile, name: str) -> None:
    member = _member(name)
    member.file_size = source.size
    with pack.open(member, "w") as target:
        for start in range(0, member.file_size, _COPY_BYTES):
            target.write(source.pread(start, min(_COPY_BYTES, member.file_size - start)))
