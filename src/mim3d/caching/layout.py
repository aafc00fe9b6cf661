"""The files of a cache folder, and where the bytes of each case lie.

::

    cache.json        the settings, written first
    manifest.parquet  every cached case with its card and its place, written last; a cache without it is unfinished
    failed.csv        scans that could not be used, each with the reason
    failed_tracebacks.txt   where errors that nobody foresaw were raised; only if there are some
    summary.json      what all of it was understood to be, for people and other programs
    digests.json      SHA-256 of source files by size and times, so that a second run need not read them
    cases/ID.KEY/     one folder per case, KEY being the digest of its sources and settings: a zarr group of
                      image/0, image/1, ... (each resolution) and label, with locations.npz and card.json
    packs/            instead of cases/ where asked for: such folders in files of some GB
    unfinished/       cases being written; renamed into place when complete
    lock              held while a build runs

Packs are for file systems that suffer from millions of small files. A pack is a ZIP file whose members are stored as
they are, uncompressed and with fixed times: the same cases make the same bytes. The zarr library opens it as a group of
one group per case. mim3d reads ranges of its bytes, whose places the manifest lists, and never its directory. Cases are
packed in the order of their digests, and a pack's name is the digest of what it holds: a pack of the right name need
not be made again.
"""

import hashlib
import json
import os
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mim3d.core import files, left_out
from mim3d.core.errors import DataError

FORMAT = "mim3d-cache"
VERSION = 3
SETTINGS = "cache.json"
MANIFEST = "manifest.parquet"
FAILED = "failed.csv"
SUMMARY = "summary.json"
TRACEBACKS = "failed_tracebacks.txt"
FAILED_COLUMNS = left_out.COLUMNS
DIGESTS = "digests.json"
CASES = "cases"
PACKS = "packs"
UNFINISHED = "unfinished"
IMAGE = "image"
LABEL = "label"
LOCATIONS = "locations.npz"
CARD = "card.json"
LOCK = "lock"
#: The metadata of an array or a group, as zarr names them.
METADATA = "zarr.json"
PACK_SUFFIX = ".zip"

#: Largest number of files that a process keeps open.
MAX_OPEN_FILES = 128
#: Bytes that no file reaches: systems refuse to read there.
_LARGEST_PLACE = 2**60
#: The earliest time that ZIP knows.
_PACK_TIME = (1980, 1, 1, 0, 0, 0)
#: Signature, nine fields that the directory holds too, and the lengths of name and extra field.
_LOCAL_HEADER = struct.Struct("<4s22sHH")
_COPY_BYTES = 8 * 2**20


def json_text(content: Any) -> str:
    """Text of one of the cache's own JSON files; the same content makes the same bytes."""
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def write_json(path: str, content: Any) -> None:
    """Write one of the cache's own JSON files, whole or not at all.

    Raises:
        OSError: The disk is full or not writable.
    """
    files.write_text(path, json_text(content), remedy=None)


def read_json(path: str) -> Any:
    """Read one of the cache's own JSON files.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return files.load_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); run `mim3d cache` again to rebuild it.") from error


def is_damaged_cache(path: str) -> bool:
    """Whether a folder is a cache whose settings cannot be read: it holds cases and nothing else than a cache has."""
    settings = os.path.join(path, SETTINGS)
    if not os.path.isfile(settings) or not {CASES, PACKS} & (names := set(os.listdir(path))):
        return False
    own = {SETTINGS, MANIFEST, FAILED, SUMMARY, TRACEBACKS, DIGESTS, CASES, PACKS, UNFINISHED, LOCK}
    try:
        files.load_json(settings)
    except (OSError, ValueError):
        return names <= own
    return False


def remove_case(path: str) -> None:
    """Remove a case's folder. What is left of it after a power cut does not pass for finished; no link is followed."""
    if os.path.islink(path):
        os.remove(path)
        return
    with suppress(OSError):
        os.remove(os.path.join(path, CARD))
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a cache folder for one build; the lock falls with the process, however it ends.

    Raises:
        DataError: Another build holds it.
    """
    with files.lock_file(os.path.join(path, LOCK)) as descriptor:
        if not files.try_lock(descriptor):
            raise DataError(f"{path}: another process is building this cache; wait for it to end.")
        yield


@dataclass(frozen=True)
class FileRange:
    """A file, or a range of bytes inside one; opened at the first read in each process.

    Any number of threads and processes may read it at once.

    Attributes:
        path: Path of the file.
        offset: First byte that counts.
        length: Number of bytes that count; None for all that follow.
    """

    path: str
    offset: int = 0
    length: int | None = None

    @property
    def size(self) -> int:
        """Number of bytes. Raises OSError where the file is missing."""
        rest = max(0, os.fstat(_opened(self.path, os.getpid()).number).st_size - self.offset)
        return rest if self.length is None else min(rest, self.length)

    def will_need(self, offset: int, length: int) -> None:
        """Begin to fetch bytes that are about to be read, where the system can; nothing is waited for."""
        if hasattr(os, "posix_fadvise"):
            file = _opened(self.path, os.getpid())
            os.posix_fadvise(file.number, self.offset + offset, length, os.POSIX_FADV_WILLNEED)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on. Raises OSError where they are missing."""
        if offset < 0 or length < 0 or (self.length is not None and offset + length > self.length):
            raise OSError(f"bytes {offset} to {offset + length} are not in it")
        # Held here, the file stays open until this read is done, whatever other threads open in the meantime.
        file = _opened(self.path, os.getpid())
        start = self.offset + offset
        data = os.pread(file.number, length, start)
        while len(data) < length:
            # The system reads at most 2 GiB at a time, and a network file system sometimes less than asked for.
            more = os.pread(file.number, length - len(data), start + len(data))
            if not more:
                raise OSError(f"it ends before byte {offset + length}")
            data += more
        return data


@dataclass(frozen=True, eq=False)
class PackedCase(Mapping[str, FileRange]):
    """The files of one case inside a pack, by their names below the case's folder.

    Attributes:
        path: Path of the pack.
        places: Name of each file -> its first byte and number of bytes in the pack.

    Raises:
        ValueError: A place is negative, or lies where no file reaches.
    """

    path: str
    places: Mapping[str, tuple[int, int]]

    def __post_init__(self) -> None:
        if not all(0 <= number <= _LARGEST_PLACE for place in self.places.values() for number in place):
            raise ValueError(f"negative or too large places in {self.path}")

    def __getitem__(self, name: str) -> FileRange:
        """The bytes of a file."""
        offset, length = self.places[name]
        return FileRange(self.path, offset, length)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __str__(self) -> str:
        return self.path


#: Where the files of a case lie: the case's folder; or, for a case inside a pack, name of each file -> its bytes.
ByteSource = str | Mapping[str, FileRange]


def open_bytes(source: ByteSource, name: str) -> FileRange:
    """The bytes of a case's file ``name`` (with ``/`` between folders); nothing is opened before it is read.

    Raises:
        OSError: The case lies inside a pack and has no such file.
    """
    if isinstance(source, str):
        return FileRange(os.path.join(source, *name.split("/")))
    if name not in source:
        raise OSError(f"{name} is not in it")
    return source[name]


def names_in(source: ByteSource) -> list[str]:
    """Names of a case's files, with ``/`` between folders, in a fixed order."""
    if not isinstance(source, str):
        return sorted(source)
    return sorted(
        os.path.relpath(os.path.join(folder, name), source).replace(os.sep, "/")
        for folder, _, names in os.walk(source)
        for name in names
    )


def size_of(source: ByteSource) -> int:
    """Bytes of all files of a case.

    Raises:
        OSError: A file is missing.
    """
    if isinstance(source, str):
        return sum(os.path.getsize(os.path.join(source, name)) for name in names_in(source))
    return sum(source[name].size for name in source)


def forget_open_files() -> None:
    """Close the files that no read is using: what was damaged may be replaced."""
    _opened.cache_clear()


class _OpenFile:
    """A file that is closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self.number = -1
        # A pipe in its place must not be waited for.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _opened(path: str, _pid: int) -> _OpenFile:
    """The file as opened by the process ``_pid``: a forked process opens its own."""
    return _OpenFile(path)


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
    return {f"{hashlib.sha256(json.dumps(held).encode()).hexdigest()[:24]}{PACK_SUFFIX}": tuple(held) for held in packs}


def write_pack(path: str | os.PathLike[str], sources: Mapping[str, ByteSource]) -> None:
    """Write finished cases into a pack, one after the other.

    Args:
        path: Path of the file, which is written in place.
        sources: Case folder -> where its files lie now.

    Raises:
        OSError: The disk is full, or a source cannot be read.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as pack:
        # The group that makes a pack one for zarr.
        root = json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}, indent=1)
        pack.writestr(_member(METADATA), root)
        for folder, source in sources.items():
            for name in names_in(source):
                content, member = open_bytes(source, name), _member(f"{folder}/{name}")
                member.file_size = content.size
                with pack.open(member, "w") as target:
                    for start in range(0, member.file_size, _COPY_BYTES):
                        target.write(content.pread(start, min(_COPY_BYTES, member.file_size - start)))


def find_packed(packs_dir: str) -> dict[str, PackedCase]:
    """Every case in the packs of a folder: case folder -> its files. Damaged packs are removed with a warning.

    Raises:
        OSError: A pack cannot be read.
    """
    found: dict[str, PackedCase] = {}
    for name in sorted(os.listdir(packs_dir)) if os.path.isdir(packs_dir) else ():
        if not name.endswith(PACK_SUFFIX):
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
    member = zipfile.ZipInfo(name, _PACK_TIME)
    member.create_system = 3
    member.external_attr = 0o644 << 16
    return member
