"""Where the bytes of a case's arrays lie: in files of its folder, or in ranges of a larger file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

#: Files that a process keeps open at most.
MAX_OPEN_FILES = 128


class ArrayBytes(Protocol):
    """Bytes that any number of threads and processes may read at once; equal and hashed by where they lie."""

    def __hash__(self) -> int: ...

    @property
    def path(self) -> str:
        """The file they lie in, for messages."""
        ...

    @property
    def size(self) -> int:
        """How many there are. Raises OSError where the file is not there."""
        ...

    def will_need(self, offset: int, length: int) -> None:
        """Begin to fetch bytes that are about to be read, where the system can; nothing is waited for."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on. Raises OSError where they are not there."""
        ...


@dataclass(frozen=True)
class FileRange:
    """A file, or a range of bytes inside one; opened at the first read in each process.

    Attributes:
        path: the file.
        offset: its first byte that counts.
        length: bytes that count; None for all that follow.
    """

    path: str
    offset: int = 0
    length: int | None = None

    @property
    def size(self) -> int:
        """How many bytes there are. Raises OSError where the file is not there."""
        rest = max(0, os.fstat(_opened(self.path, os.getpid()).number).st_size - self.offset)
        return rest if self.length is None else min(rest, self.length)

    def will_need(self, offset: int, length: int) -> None:
        """Begin to fetch bytes that are about to be read, where the system can; nothing is waited for."""
        if hasattr(os, "posix_fadvise"):
            file = _opened(self.path, os.getpid())
            os.posix_fadvise(file.number, self.offset + offset, length, os.POSIX_FADV_WILLNEED)

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset`` on. Raises OSError where they are not there."""
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


#: A case's folder; or, for a case inside a larger file, each of its files' names -> its bytes.
ByteSource = str | Mapping[str, ArrayBytes]


def open_bytes(source: ByteSource, name: str) -> ArrayBytes:
    """The bytes of a case's file ``name`` (with ``/`` between folders); nothing is opened before it is read.

    Raises:
        OSError: A case inside a larger file has no such member.
    """
    if isinstance(source, str):
        return FileRange(os.path.join(source, *name.split("/")))
    if name not in source:
        raise OSError(f"{name} is not in it")
    return source[name]


def forget_open_files() -> None:
    """Close the files that no read is using: what was damaged may be replaced."""
    _opened.cache_clear()


class _OpenFile:
    """A file that is closed when nobody holds it any more."""

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
