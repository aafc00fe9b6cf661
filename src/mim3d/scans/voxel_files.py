"""Files that hold voxels, raw, packed or as text: held against what a header claims, then unpacked slab by slab."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.types import Triple
from mim3d.scans import files
from mim3d.scans.grids import Grid, times

Encoding = Literal["raw", "gzip", "zlib", "text", "hex"]

#: No number in text is longer.
_MAX_WORD_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class VoxelFile:
    """A file, or the part of one, that holds voxels.

    Attributes:
        path: Path of the file.
        offset: Byte of the file where the voxels, or what they are packed in, start.
        skip: Bytes before the first voxel in what is unpacked; -1 where the voxels are the last bytes of it.
        size_bytes: Number of bytes of its voxels, unpacked.
        packed_bytes: Number of bytes that they are packed in, where the header says so, else 0.
        behind_bytes: Number of bytes behind its voxels, unpacked, that the header claims for something else.
    """

    path: str
    offset: int = 0
    skip: int = 0
    size_bytes: int
    packed_bytes: int = 0
    behind_bytes: int = 0

    def check(self, encoding: Encoding, dtype: np.dtype[Any]) -> int:
        """Refuse a file that cannot hold the voxels that a header claims, before anything is allocated.

        Returns:
            Bytes that follow the voxels, unpacked; 0 where that is not known before they are read.

        Raises:
            DataError: It is truncated, or the header is wrong.
        """
        held = os.path.getsize(self.path) - self.offset
        size_bytes = self.size_bytes + self.behind_bytes
        if encoding == "raw":
            surplus_bytes = files.check_raw(self.path, self.offset + max(self.skip, 0), size_bytes)
            return 0 if self.skip == -1 else surplus_bytes
        if encoding == "gzip" and self.skip >= 0:
            return files.check_gzip(self.path, self.offset, size_bytes + self.skip)
        if encoding == "hex":
            files.check_raw(self.path, self.offset, 2 * size_bytes)
        elif encoding == "text":
            # A digit and a blank for each voxel but the last.
            files.check_raw(self.path, self.offset, 2 * size_bytes // dtype.itemsize - 1)
        else:
            files.check_deflate(self.path, held, size_bytes)
        if held < self.packed_bytes:
            raise DataError(
                f"{self.path}: the header claims {self.packed_bytes} compressed bytes, but the file holds {held}; it "
                "is truncated, so copy it again from its source."
            )
        return 0

    def blocks(self, encoding: Encoding, dtype: np.dtype[Any]) -> Iterator[bytes]:
        """The bytes of its voxels, block by block, without what lies before and behind them.

        A compressed stream is read to its end, where its checksum is compared.

        Raises:
            DataError: The file ends too early, or holds something else.
        """
        skip, left = self.skip, self.size_bytes
        if skip == -1:
            # The voxels are the last bytes.
            skip = max(0, sum(map(len, self._unpacked(encoding, dtype))) - left)
        for block in self._unpacked(encoding, dtype):
            wanted = block[skip : skip + left]
            skip -= min(skip, len(block))
            left -= len(wanted)
            if wanted:
                yield wanted
            if not left and encoding not in ("gzip", "zlib"):
                return
        if left:
            raise DataError(f"{self.path}: it ends {left} bytes before its last voxel; copy it again from its source.")

    def _unpacked(self, encoding: Encoding, dtype: np.dtype[Any]) -> Iterator[bytes]:
        """What the file holds from the start of its voxels, block by block."""
        if encoding in ("gzip", "zlib"):
            yield from files.unpacked(self.path, self.offset, max(self.skip, 0) + self.size_bytes + self.behind_bytes)
            return
        rest = b""
        with open(self.path, "rb") as stream:
            stream.seek(self.offset)
            while block := stream.read(2**20):
                if encoding == "raw":
                    yield block
                elif encoding == "hex":
                    digits = rest + b"".join(block.split())
                    even = len(digits) // 2 * 2
                    rest = digits[even:]
                    yield self._from_text([digits[:even]], encoding, dtype)
                else:
                    words = (rest + block.replace(b",", b" ")).split()
                    # The last word may go on in the next block.
                    rest = b"" if block[-1:].isspace() or not words else words.pop()
                    yield self._from_text(words, encoding, dtype)
            if encoding == "text":
                yield self._from_text([rest] if rest else [], encoding, dtype)

    def _from_text(self, words: list[bytes], encoding: Encoding, dtype: np.dtype[Any]) -> bytes:
        """Bytes of the voxels that words of text stand for, or their hexadecimal digits."""
        try:
            if encoding == "hex":
                return b"".join(bytes.fromhex(word.decode("ascii")) for word in words)
            if max(map(len, words), default=0) > _MAX_WORD_BYTES:
                raise ValueError("a number has too many digits")
            return np.array(words, dtype=f"S{_MAX_WORD_BYTES}").astype(dtype).tobytes()
        except (ValueError, OverflowError) as error:
            raise DataError(
                f"{self.path}: its voxels are no {encoding} of {dtype.name} numbers ({error}); export it again."
            ) from error


def of_surplus(num_bytes: int, shape: Triple, dtype: np.dtype[Any]) -> tuple[str, ...]:
    """A phrase where a slice or more follows the voxels that a header claims: it may be wrong."""
    columns, rows, _ = shape
    if num_bytes < columns * rows * dtype.itemsize:
        return ()
    return (
        f"{num_bytes} bytes follow the {times(shape)} voxels of {dtype.name} that the header claims; "
        "it may name a wrong size or type, and the first voxels are taken",
    )


def read_slabs(
    grid: Grid, parts: Sequence[VoxelFile], encoding: Encoding, dtype: np.dtype[Any]
) -> Iterator[npt.NDArray[Any]]:
    """Voxels in stored axis order, (i, j, some k), slab by slab along the last axis, in one buffer used again.

    Args:
        grid: Grid of the scan.
        parts: Files of its voxels, in order.
        encoding: How they hold them.
        dtype: Type of the voxels as stored; they are given in the byte order of the machine.

    Raises:
        DataError: The voxels cannot be unpacked, or their checksum is wrong.
    """
    columns, rows, _ = grid.shape
    slabs = list(grid.slabs())
    buffer = np.empty(columns * rows * slabs[0].stop, dtype=dtype)
    blocks = (block for part in parts for block in part.blocks(encoding, dtype))
    block = memoryview(b"")
    for slab in slabs:
        flat = buffer[: columns * rows * (slab.stop - slab.start)]
        plain_bytes: Any = flat.view(np.uint8)
        rest = memoryview(plain_bytes)
        while rest:
            block = block or memoryview(next(blocks))
            rest[: len(block)] = block[: len(rest)]
            rest, block = rest[len(block) :], block[len(rest) :]
        raw = flat.reshape((columns, rows, -1), order="F")
        yield raw.astype(raw.dtype.newbyteorder("="), copy=False)
    # The checksum is compared where a compressed stream ends.
    for _ in blocks:
        pass
