"""The files of a cache folder, and where the bytes of each case lie.

::

    cache.json        the settings, written first
    manifest.parquet  every cached case with its card and its place, written last; a cache without it is unfinished
    failed.csv        scans that could not be used, each with the reason
    digests.json      SHA-256 of source files by size and times, so that a second run need not read them
    cases/ID.KEY/     one folder per case, KEY being the digest of its sources and settings: a zarr group of
                      image/0, image/1, ... (each resolution) and label, with locations.npz and card.json
    packs/            instead of cases/ where asked for: such folders in files of some GB, see mim3d.caching.packs
    unfinished/       cases being written; renamed into place when complete
    lock              held while a build runs
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mim3d.core import files
from mim3d.core.errors import DataError

FORMAT = "mim3d-cache"
VERSION = 3
SETTINGS = "cache.json"
MANIFEST = "manifest.parquet"
FAILED = "failed.csv"
FAILED_COLUMNS = ("id", "images", "label", "reason")
DIGESTS = "digests.json"
CASES = "cases"
PACKS = "packs"
UNFINISHED = "unfinished"
IMAGE = "image"
LABEL = "label"
LOCATIONS = "locations.npz"
CARD = "card.json"
LOCK = "lock"

#: Largest number of files that a process keeps open.
MAX_OPEN_FILES = 128


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
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); run `mim3d cache` again to rebuild it.") from error


def remove_case(path: str) -> None:
    """Remove a case's folder. What is left of it after a power cut does not pass for finished."""
    with suppress(OSError):
        os.remove(os.path.join(path, CARD))
    shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a cache folder for one build; the lock falls with the process, however it ends.

    Raises:
        DataError: Another build holds it.
    """
    with open(os.path.join(path, LOCK), "a") as file:
        if not files.try_lock(file.fileno()):
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
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _opened(path: str, _pid: int) -> _OpenFile:
    """The file as opened by the process ``_pid``: a forked process opens its own."""
    return _OpenFile(path)
