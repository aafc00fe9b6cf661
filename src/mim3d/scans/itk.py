"""NRRD and MetaImage files: the text header checked against the files, the voxels unpacked slab by slab.

No native library sees such a file: what a damaged or hostile one does to SimpleITK takes the process along. SimpleITK
writes them.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.grids import LPS_TO_RAS, Grid, check_affine, spacing_of, times
from mim3d.scans.metaimage import read_meta_header
from mim3d.scans.nrrd import read_nrrd_header
from mim3d.scans.text_headers import ItkGeometry, TextHeader, VoxelFile

#: No number in text is longer.
_MAX_WORD_BYTES = 64


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
        """Voxels in stored axis order, (i, j, some k), slab by slab along the last axis, in one buffer used again.

        Raises:
            DataError: The voxels cannot be unpacked, or their checksum is wrong.
        """
        columns, rows, _ = self.grid.shape
        header = self.header
        slabs = list(self.grid.slabs())
        buffer = np.empty(columns * rows * slabs[0].stop, dtype=header.dtype)
        blocks = (block for part in header.parts for block in _blocks(part, header.encoding, header.dtype))
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


def open_itk(path: str) -> ItkScan:
    """Read and check the header of an .nrrd, .nhdr, .mha or .mhd file; no voxel is unpacked into memory.

    Raises:
        DataError: The file is not of this format, truncated or without its detached voxels; it holds colours or vectors
            or is not 3-D; its geometry is impossible, or it has more voxels than the file or the memory can hold.
    """
    header = _read_header(path)
    for part in header.parts:
        _check_part(part, header)
    assumed = header.assumed + _surplus(header)
    geometry = header.geometry
    affine = np.eye(4)
    affine[:3, :3] = np.array(geometry.direction).reshape(3, 3) * np.array(geometry.spacing)
    affine[:3, 3] = geometry.origin
    affine = LPS_TO_RAS @ affine
    check_affine(affine, header.shape, path)
    files.warn_of_assumptions(path, assumed)
    grid = Grid(shape=header.shape, affine=affine, path=path, source=geometry, assumed=assumed)
    return ItkScan(grid=grid, header=header)


def itk_files(path: str) -> list[str]:
    """Every file that an NRRD or MetaImage file is read from: itself, then those of its voxels that it names.

    Raises:
        DataError: The header cannot be read, or names files that may not be.
    """
    return list(dict.fromkeys([path, *(part.path for part in _read_header(path).parts)]))


def write_itk(path: str, array: npt.NDArray[Any], grid: Grid) -> None:
    """Write voxels in stored axis order, compressed, as the format that the suffix of `path` names."""
    import SimpleITK

    # Without types, so that mypy does not check calls into it.
    sitk: Any = SimpleITK
    geometry = grid.source
    if not isinstance(geometry, ItkGeometry):
        lps = LPS_TO_RAS @ grid.affine
        spacing = spacing_of(lps)
        geometry = ItkGeometry(
            spacing=spacing,
            origin=tuple(float(value) for value in lps[:3, 3]),
            direction=tuple(float(value) for value in (lps[:3, :3] / np.array(spacing)).ravel()),
        )
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        sitk.WriteImage(image, path, True)
    except RuntimeError as error:
        raise OSError((str(error).strip() or type(error).__name__).splitlines()[-1].strip()) from error


def _read_header(path: str) -> TextHeader:
    files.check_file(path)
    with open(path, "rb") as stream:
        start = stream.read(132)
    is_nrrd = path.lower().endswith((".nrrd", ".nhdr"))
    if not is_nrrd or not start.startswith(b"NRRD"):
        files.require_no_other_kind(path, start)
    return read_nrrd_header(path) if is_nrrd else read_meta_header(path)


def _check_part(part: VoxelFile, header: TextHeader) -> None:
    """Refuse a file that cannot hold the voxels that the header claims, before anything is allocated."""
    held = os.path.getsize(part.path) - part.offset
    if header.encoding == "raw":
        files.check_raw(part.path, part.offset + max(part.skip, 0), part.size_bytes)
    elif header.encoding == "hex":
        files.check_raw(part.path, part.offset, 2 * part.size_bytes)
    elif header.encoding == "text":
        # A digit and a blank for each voxel but the last.
        files.check_raw(part.path, part.offset, 2 * part.size_bytes // header.dtype.itemsize - 1)
    elif header.encoding == "gzip" and part.skip >= 0:
        files.check_gzip(part.path, part.offset, part.size_bytes + part.skip)
    else:
        files.check_deflate(part.path, held, part.size_bytes)
    if held < part.packed_bytes:
        raise DataError(
            f"{part.path}: the header claims {part.packed_bytes} compressed bytes, but the file holds {held}; it is "
            "truncated, so copy it again from its source."
        )


def _surplus(header: TextHeader) -> tuple[str, ...]:
    """A phrase where uncompressed files hold a slice or more beyond what the header claims: it may be wrong."""
    if header.encoding != "raw" or header.parts[0].skip == -1:
        return ()
    held = sum(os.path.getsize(part.path) - part.offset - part.skip - part.size_bytes for part in header.parts)
    columns, rows, _ = header.shape
    if held < columns * rows * header.dtype.itemsize:
        return ()
    return (
        f"{held} bytes follow the {times(header.shape)} voxels of {header.dtype.name} that the header claims; "
        "it may name a wrong size or type, and the first voxels are taken",
    )


def _blocks(part: VoxelFile, encoding: str, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """The bytes of the voxels of one file, block by block, without what lies before and behind them.

    Raises:
        DataError: The file ends too early, or holds something else.
    """
    skip, left = part.skip, part.size_bytes
    if skip == -1:
        # The voxels are the last bytes.
        whole = sum(map(len, _unpacked(part, encoding, dtype)))
        skip = max(0, whole - left)
    for block in _unpacked(part, encoding, dtype):
        wanted = block[skip : skip + left]
        skip -= min(skip, len(block))
        left -= len(wanted)
        if wanted:
            yield wanted
        if not left and encoding not in ("gzip", "zlib"):
            return
    if left:
        raise DataError(f"{part.path}: it ends {left} bytes before its last voxel; copy it again from its source.")


def _unpacked(part: VoxelFile, encoding: str, dtype: np.dtype[Any]) -> Iterator[bytes]:
    """What a file holds from the start of its voxels, block by block."""
    if encoding in ("gzip", "zlib"):
        yield from files.unpacked(part.path, part.offset, part.size_bytes + max(part.skip, 0))
        return
    rest = b""
    with open(part.path, "rb") as stream:
        stream.seek(part.offset)
        while block := stream.read(2**20):
            if encoding == "raw":
                yield block
            elif encoding == "hex":
                digits = rest + b"".join(block.split())
                even = len(digits) // 2 * 2
                rest = digits[even:]
                yield bytes.fromhex(digits[:even].decode("ascii"))
            else:
                words = (rest + block.replace(b",", b" ")).split()
                # The last word may go on in the next block.
                rest = b"" if block[-1:].isspace() or not words else words.pop()
                yield _from_text(words, dtype)
        if encoding == "text":
            yield _from_text([rest] if rest else [], dtype)


def _from_text(words: list[bytes], dtype: np.dtype[Any]) -> bytes:
    if max(map(len, words), default=0) > _MAX_WORD_BYTES:
        raise ValueError("a number has too many digits")
    return np.array(words, dtype=f"S{_MAX_WORD_BYTES}").astype(dtype).tobytes()
