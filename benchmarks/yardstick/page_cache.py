"""What of a file the system holds in memory, and making it forget that."""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np


def files_below(place: Path) -> list[Path]:
    """A file itself, or all files of a folder."""
    return [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())


def size_bytes(place: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(path.stat().st_size for path in files_below(place))


def drop(files: Iterable[Path]) -> float:
    """Make the system forget the contents of files that are written to the disk and not mapped; seconds it took."""
    start_s = time.perf_counter()
    for path in files:
        number = os.open(path, os.O_RDONLY)
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(number)
    return time.perf_counter() - start_s


def load(files: Iterable[Path]) -> None:
    """Bring the contents of files into the system's memory."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def share_in_memory(files: Iterable[Path]) -> float:
    """Share of the files' pages that the system holds in memory."""
    held = total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in files:
        if not path.stat().st_size:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as pages:
            view = np.frombuffer(pages, dtype=np.uint8)
            state = np.zeros(-(-len(pages) // mmap.PAGESIZE), dtype=np.uint8)
            address, target = ctypes.c_void_p(view.ctypes.data), ctypes.c_void_p(state.ctypes.data)
            failed = libc.mincore(address, ctypes.c_size_t(len(pages)), target)
            del view
        if failed:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        held += int((state & 1).sum())
        total += len(state)
    return held / max(total, 1)
