"""Checks of scan files before their voxels are read: the file is complete, and its voxels fit into memory."""

import math
import multiprocessing
import os
import sys
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from isal import isal_zlib as _isal_zlib

from mim3d.core import resources
from mim3d.core.errors import DataError, TooLargeError
from mim3d.scans.grids import times

# Without types, so that mypy does not check calls into it.
isal_zlib: Any = _isal_zlib

#: Bytes that may follow the last voxel in a compressed stream, at least: nobody unpacks a bomb to its end.
MAX_SURPLUS_BYTES = 2**28

#: File that `mim3d predict` lays into a folder before it writes anything there.
PREDICTIONS_MARK = ".predict.lock"

#: Sentences that were said.
_said: set[str] = set()
_is_silent = False

#: First bytes of files that are often found where a scan belongs -> what they are, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS and not the scan itself; fetch it with `git lfs pull`"),
    (b"/annex/objects", "a pointer of git-annex and not the scan itself; fetch it with `datalad get`"),
    (b"<", "a web page or XML and not a scan; download the file again, logged in where that is needed"),
    (b"PK\3\4", "a ZIP archive; unpack it"),
    (b"BZh", "packed by bzip2; unpack it"),
    (b"\xfd7zXZ", "packed by xz; unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd; unpack it"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (b"\x1f\x8b", "packed by gzip, once more or against its name; unpack it"),
    (b"\x89HDF", "an HDF5 file (MINC or MATLAB); convert it to NIfTI"),
    (b"NRRD0", "an NRRD file; let its name end in .nrrd"),
    (b"\x89PNG", "a PNG image; give the scan it was drawn from"),
    (b"\xff\xd8\xff", "a JPEG image; give the scan it was drawn from"),
)

#: DEFLATE cannot shrink data further than this, so a smaller file cannot hold what its header claims.
MAX_DEFLATE_RATIO = 1032


def check_file(path: str) -> None:
    """Refuse a path that is no readable file.

    Raises:
        DataError: The file is missing, a folder, a device or pipe, empty, or not readable.
    """
    if os.path.isdir(path):
        raise DataError(f"{path}: a folder where an image file is needed; name a file inside it.")
    if not os.path.exists(path):
        if os.path.islink(path):
            raise DataError(
                f"{path}: no such file: this is a link to {os.readlink(path)}, which is not there; fetch it (from "
                "DataLad by `datalad get`), or correct the link."
            )
        raise DataError(f"{path}: no such file; check the path and that the disk is mounted.")
    if not os.path.isfile(path):
        raise DataError(f"{path}: a device, pipe or socket where an image file is needed; name a regular file.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: this file may not be read by you; change its permissions.")
    if os.path.getsize(path) == 0:
        raise DataError(f"{path}: the file is empty; copy it again from its source.")


def require_no_other_kind(path: str, start: bytes) -> None:
    """Refuse a file whose first bytes are those of something else that is known.

    Raises:
        DataError: They are; the sentence says what it is, and what to do.
    """
    if start[128:132] == b"DICM":
        raise DataError(f"{path}: a DICOM file; give the folder of its series, or let its name end in .dcm.")
    for magic, what in _OTHERS:
        if start.lstrip().startswith(magic):
            raise DataError(f"{path}: this is {what}.")


def walk(root: str, *, with_predictions: bool = False) -> Iterator[str]:
    """Every file below a folder in a fixed order; links are followed, hidden files and folders are not.

    One warning each names the folders that cannot be read.

    Args:
        root: The folder.
        with_predictions: Whether folders of predictions below it are entered: what is made of scans and lies among them
            is no scan.
    """

    def tell(error: OSError) -> None:
        warnings.warn(
            f"{error.filename}: this folder cannot be read ({error.strerror}); what is in it is left out.", stacklevel=1
        )

    seen: set[str] = set()
    for folder, names, found in os.walk(root, followlinks=True, onerror=tell):
        real = os.path.realpath(folder)
        is_left_out = PREDICTIONS_MARK in found and folder != root and not with_predictions
        if real in seen or is_left_out:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (os.path.join(folder, name) for name in sorted(found) if not name.startswith("."))


def available_memory_bytes() -> int:
    """Memory that this process can still get; no bound where the system does not say."""
    known = resources.available_memory_bytes()
    return sys.maxsize if known is None else known


def check_memory(path: str, shape: Sequence[int], itemsize: int) -> int:
    """Bytes of the voxels that a header claims, refused before anything is allocated for them.

    Args:
        path: Name of the scan, for messages.
        shape: Number of voxels along each axis.
        itemsize: Bytes per voxel.

    Raises:
        TooLargeError: The voxels do not fit into the memory that is available.
    """
    size_bytes = math.prod(shape) * itemsize
    available = available_memory_bytes()
    if 2 * size_bytes > available:
        raise TooLargeError(
            f"{path}: the header claims {times(shape)} voxels ({size_bytes / 2**30:.1f} GiB, up to twice that while "
            f"they are prepared), and {available / 2**30:.1f} GiB are available; check the header or crop the scan."
        )
    return size_bytes


def check_raw(path: str, offset: int, size_bytes: int) -> int:
    """Refuse an uncompressed file that ends before its last voxel; the number of bytes behind it.

    Raises:
        DataError: The file holds fewer bytes than its header claims.
    """
    held = os.path.getsize(path) - offset
    if held < size_bytes:
        raise DataError(
            f"{path}: the header claims {size_bytes} bytes of voxels, but the file holds {max(held, 0)}; "
            "it is truncated or its header is wrong, so copy it again from its source."
        )
    return held - size_bytes


def check_deflate(path: str, compressed_bytes: int, size_bytes: int) -> None:
    """Refuse a compressed file too small to hold what its header claims, without unpacking it.

    Raises:
        DataError: The file cannot hold that many bytes.
    """
    if size_bytes > (compressed_bytes + 64) * MAX_DEFLATE_RATIO:
        raise DataError(
            f"{path}: the header claims {size_bytes} bytes of voxels, which {max(compressed_bytes, 0)} "
            "compressed bytes cannot hold; it is truncated or its header is wrong, so copy it again."
        )


def check_gzip(path: str, offset: int, size_bytes: int) -> int:
    """Refuse a truncated or damaged gzip stream of `size_bytes` that starts at `offset` of a file; the bytes behind.

    The last four bytes of a stream are its unpacked length: where they agree, nothing is unpacked. Where they do not
    (truncated, or joined from several streams), the stream is unpacked once without keeping it.

    Raises:
        DataError: The stream is damaged or ends too early.
    """
    check_deflate(path, os.path.getsize(path) - offset, size_bytes)
    with open(path, "rb") as stream:
        stream.seek(max(offset, os.path.getsize(path) - 4))
        unpacked_bytes = int.from_bytes(stream.read(4), "little")
    if unpacked_bytes == size_bytes % 2**32:
        return 0
    unpacked_bytes = sum(map(len, unpacked(path, offset, size_bytes)))
    if unpacked_bytes < size_bytes:
        raise DataError(
            f"{path}: the header claims {size_bytes} bytes of voxels, but unpacking gives {unpacked_bytes}; "
            "the file is truncated or its header is wrong, so copy it again from its source."
        )
    return unpacked_bytes - size_bytes


def unpacked(path: str, offset: int, size_bytes: int) -> Iterator[bytes]:
    """Unpack a gzip or zlib stream that starts at `offset` of a file, block by block; its checksum is compared.

    Raises:
        DataError: The stream is damaged, ends too early, or goes on far beyond `size_bytes`.
    """
    left = size_bytes + max(size_bytes, MAX_SURPLUS_BYTES)
    try:
        with open(path, "rb") as stream:
            stream.seek(offset)
            block = stream.read(2**20)
            while True:
                # Window bits of 32 + 15 take a gzip or a zlib stream; its first bytes say which.
                packed = isal_zlib.decompressobj(32 + zlib.MAX_WBITS)
                while block and not packed.eof:
                    plain = packed.decompress(block, 2**22)
                    if not plain and len(packed.unconsumed_tail) == len(block):
                        raise EOFError("it cannot be unpacked further")
                    left -= len(plain)
                    if left < 0:
                        raise DataError(
                            f"{path}: its compressed stream goes on far behind the last voxel; the header is wrong, or "
                            "it is no scan."
                        )
                    yield plain
                    block = packed.unconsumed_tail or packed.unused_data or stream.read(2**20)
                if not packed.eof:
                    raise EOFError("it ends too early")
                if not block.startswith(b"\x1f\x8b"):
                    break
    except (EOFError, isal_zlib.error) as error:
        raise DataError(
            f"{path}: the compressed stream is truncated or damaged ({error}); copy it again from its source."
        ) from error


def require_one_value(num_values: int, path: str) -> None:
    """Refuse colours and vectors.

    Raises:
        DataError: There is more or less than one value per voxel.
    """
    if num_values != 1:
        raise DataError(
            f"{path}: every voxel holds {num_values} values (a colour, a vector or a displacement), but one "
            "value per voxel is needed; save one component as a file of its own."
        )


@contextmanager
def nothing_said() -> Iterator[None]:
    """Look into files without a warning: what is to be said of a file is said when it is used."""
    global _is_silent
    before, _is_silent = _is_silent, True
    try:
        yield
    finally:
        _is_silent = before


def warn_of_assumptions(path: str, assumed: Sequence[str]) -> None:
    """Warn of what a file leaves open and what is assumed, once, however often it is read."""
    for phrase in assumed:
        warn_once(f"{path}: {phrase}.")


def warn_once(sentence: str) -> None:
    """Warn of something once, however often it comes up.

    A process of a pool says nothing: its results carry what it found to the process that the user watches.
    """
    if sentence not in _said and not _is_silent and multiprocessing.parent_process() is None:
        _said.add(sentence)
        warnings.warn(sentence, stacklevel=2)
