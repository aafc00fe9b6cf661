"""NIfTI files: headers checked against the file before a voxel is read, and geometry written back bit by bit.

Class probabilities of a scan, whatever their size, become one file of several volumes.
"""

import gzip
import logging
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.files import atomic_file, explained_write
from mim3d.core.types import Triple
from mim3d.scans import files
from mim3d.scans.grids import (
    TOLERANCE_VOXELS,
    Grid,
    check_affine,
    check_spacing,
    largest_shift,
    smallest_integer,
    spacing_of,
    split_channel,
    times,
    volume_shape,
)
from mim3d.scans.voxel_files import VoxelFile, of_surplus, read_slabs

# Without types, so that mypy does not check calls into them.
nib: Any = nibabel

#: nibabel writes of small faults without the name of the file; what matters of them is said here.
_SILENT = logging.Logger("nibabel", level=logging.CRITICAL + 1)

#: Millimetres per unit of length, by the lowest three bits of xyzt_units; 0 (unknown) counts as mm.
UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}

#: First bytes of the mark of a header before its voxels in one file, and of a header of a pair of files.
_SINGLE, _PAIR = (b"n+1", b"n+2"), (b"ni1", b"ni2")
_PAIR_SUFFIXES = (".hdr", ".hdr.gz")

#: Fields of a header that hold the geometry; they are written back as they were read.
_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d",
    "qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class NiftiScan:
    """One volume of a NIfTI file whose header has been checked.

    Attributes:
        grid: Grid of the volume; its path is the address that was asked for.
        voxels: The file of its voxels.
        is_zipped: Whether that is a gzip stream, whatever its name.
        dtype: Type of the voxels as stored.
        slope: Factor of the rescaling.
        intercept: Offset of the rescaling, added after the factor.
    """

    grid: Grid
    voxels: VoxelFile
    is_zipped: bool
    dtype: np.dtype[Any]
    slope: float
    intercept: float

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in stored axis order, slab by slab along the last axis: (i, j, some k), in one buffer used again.

        Integers stay integers where the rescaling keeps them whole; all else that is rescaled becomes float32.

        Raises:
            DataError: The voxels cannot be unpacked, or their checksum is wrong.
        """
        is_scaled = (self.slope, self.intercept) != (1.0, 0.0)
        for raw in read_slabs(self.grid, (self.voxels,), "gzip" if self.is_zipped else "raw", self.dtype):
            yield rescaled(raw, self.slope, self.intercept) if is_scaled else raw


def open_nifti(address: str) -> NiftiScan:
    """Read and check the header of a .nii or .nii.gz file; no voxel is unpacked into memory.

    Args:
        address: The file, or ``file::channel=2`` for one volume of a file of four axes.

    Raises:
        DataError: The file is no NIfTI, damaged or truncated; it holds colours or complex numbers, is not 3-D and no
            channel is named, or lacks the channel; its geometry is impossible, or it has more voxels than the file or
            the memory can hold.
    """
    path, channel = split_channel(address)
    header, is_zipped = _read_header(path)
    dtype = _dtype_of(header, path)
    stored, whole, is_zipped, surplus_bytes = _extent(header, is_zipped, dtype, path)
    number = math.prod(stored[3:])
    if channel is None and number > 1:
        raise DataError(
            f"{path}: the image has {len(stored)} axes ({times(stored)}), but one volume of three is needed; name one "
            f"channel or time point as {os.path.basename(path)}::channel=0, or save each as a 3-D file of its own."
        )
    if channel is not None and channel >= number:
        raise DataError(
            f"{path}: channel {channel} was asked for, but the file has {number}; count the channels from 0."
        )
    shape = volume_shape(stored[:3] if number > 1 else stored, path)
    slope, intercept = _rescaling(header, dtype, path)
    grid = _grid_of(header, shape, path, address, of_surplus(surplus_bytes, shape, dtype))
    size_bytes = whole.size_bytes // number
    if number > 1:
        # A single volume was held against the memory with its extent.
        files.check_memory(path, shape, dtype.itemsize)
    before_bytes = (channel or 0) * size_bytes
    voxels = replace(
        whole,
        offset=whole.offset + (0 if is_zipped else before_bytes),
        skip=whole.skip + before_bytes if is_zipped else 0,
        size_bytes=size_bytes,
        behind_bytes=whole.size_bytes - before_bytes - size_bytes,
    )
    return NiftiScan(grid=grid, voxels=voxels, is_zipped=is_zipped, dtype=dtype, slope=slope, intercept=intercept)


def num_channels(path: str) -> int:
    """Volumes in a file: the sizes of the axes after the third, multiplied; 1 for a file of three axes.

    Raises:
        DataError: The file is no NIfTI, damaged, or too small for what it claims.
    """
    header, is_zipped = _read_header(path)
    stored, *_ = _extent(header, is_zipped, _dtype_of(header, path), path)
    return math.prod(stored[3:])


def _extent(
    header: Any, is_zipped: bool, dtype: np.dtype[Any], path: str
) -> tuple[tuple[int, ...], VoxelFile, bool, int]:
    """Sizes of all axes, the file with the voxels of all channels, whether it is packed, and the bytes behind them."""
    dims = [int(size) for size in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise DataError(f"{path}: the header claims {dims[0]} axes, but NIfTI has 1 to 7; it is damaged.")
    stored = tuple(dims[1 : dims[0] + 1])
    if any(size < 1 for size in stored):
        volume_shape(stored, path)
    is_single = bytes(header["magic"])[:3] in _SINGLE
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**62 or (is_single and 0 < offset < header.sizeof_hdr):
        raise DataError(f"{path}: the header puts the voxels at byte {offset:g}; it is damaged.")
    start = int(offset) or (header.single_vox_offset if is_single else 0)
    size_bytes = math.prod(stored) * dtype.itemsize
    if math.prod(stored[3:]) == 1:
        files.check_memory(path, stored[:3], dtype.itemsize)
    file = path
    if not is_single:
        file = pair_files(path)[1]
        files.check_file(file)
        is_zipped = _is_gzip(file)
    voxels = VoxelFile(
        path=file, offset=0 if is_zipped else start, skip=start if is_zipped else 0, size_bytes=size_bytes
    )
    surplus_bytes = voxels.check("gzip" if is_zipped else "raw", dtype)
    return stored, voxels, is_zipped, surplus_bytes


def pair_files(path: str) -> list[str]:
    """The header of a NIfTI pair and the file beside it that holds its voxels: ``scan.hdr`` and ``scan.img``.

    Raises:
        DataError: It is no header of a pair, or there is no such file.
    """
    _read_header(path)
    stem = path[: path.lower().rindex(".hdr")]
    for suffix in (".img", ".img.gz", ".IMG"):
        if os.path.lexists(stem + suffix):
            return [path, stem + suffix]
    raise DataError(f"{path}: its voxels, {os.path.basename(stem)}.img, are missing; put them beside it.")


def _is_gzip(path: str) -> bool:
    with open(path, "rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


def _rescaling(header: Any, dtype: np.dtype[Any], path: str) -> tuple[float, float]:
    """Factor and offset of the stored numbers; a factor of 0, NaN or infinity means that there is none."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not math.isfinite(slope) or slope == 0:
        return 1.0, 0.0
    # The largest change of the result that any two stored numbers can make.
    span = abs(slope) * (float(np.iinfo(dtype).max) - float(np.iinfo(dtype).min) if dtype.kind in "iu" else 1e30)
    # Single precision has 24 digits, so beside a larger offset all voxels become the same.
    if not math.isfinite(intercept) or abs(intercept) * 2**-24 > span:
        raise DataError(
            f"{path}: the header rescales voxels by {slope:g} and adds {intercept:g}, which leaves nothing of them; "
            "correct scl_slope and scl_inter, or export the scan again."
        )
    return slope, intercept


def _read_header(path: str) -> tuple[Any, bool]:
    """The header, and whether the file is a gzip stream: its first bytes say so, not its name."""
    files.check_file(path)
    is_zipped = _is_gzip(path)
    try:
        with gzip.open(path, "rb") if is_zipped else open(path, "rb") as stream:
            block = stream.read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream is truncated or damaged ({error}); copy it again from its source."
        ) from error
    allowed = _PAIR if path.lower().endswith(_PAIR_SUFFIXES) else _SINGLE
    for header_class, magic in ((nib.Nifti1Header, 344), (nib.Nifti2Header, 4)):
        if block[magic : magic + 3] in allowed and len(block) >= header_class.sizeof_hdr:
            header = header_class(block[: header_class.sizeof_hdr], check=False)
            if int(header["sizeof_hdr"]) == header_class.sizeof_hdr:
                return header, is_zipped
    if allowed is _SINGLE and (block[344:347] in _PAIR or block[4:7] in _PAIR):
        raise DataError(f"{path}: one half of a NIfTI pair; name the header .hdr and its voxels .img, side by side.")
    if allowed is _PAIR and 348 in (int.from_bytes(block[:4], order) for order in ("little", "big")):
        raise DataError(
            f"{path}: an Analyze header, which does not say where left and right are; convert it to NIfTI with a "
            "program that knows how it was written."
        )
    files.require_no_other_kind(path, block)
    raise DataError(f"{path}: this is no NIfTI file (its first bytes say otherwise), or it is damaged.")


def _dtype_of(header: Any, path: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(header.get_data_dtype())
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        raise DataError(
            f"{path}: the header has the unknown voxel type {int(header['datatype'])}; export the scan again."
        ) from error
    if dtype.names is not None:
        raise DataError(
            f"{path}: this is a colour image ({'/'.join(dtype.names)} in every voxel), but one value per "
            "voxel is needed; give the scan it was drawn from."
        )
    if dtype.itemsize == 0:
        raise DataError(f"{path}: voxels of the type {int(header['datatype'])} are not read; save them as integers.")
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: the voxels are of type {dtype}, not real numbers; save the magnitude.")
    return dtype


def _grid_of(header: Any, shape: Triple, path: str, address: str, assumed: tuple[str, ...]) -> Grid:
    """The grid of one volume, with the header whose fields hold it."""
    if int(header["sform_code"]) <= 0:
        # Their signs mean nothing. With an sform they are not used at all.
        check_spacing(np.abs(header["pixdim"][1:4]).tolist(), path)
    unit_mm = UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    try:
        # A copy, because the check mends small faults (a qfac of 0) that are to be written back as they were.
        mended = header.copy()
        mended.check_fix(logger=_SILENT)
        affine = np.array(mended.get_best_affine(), dtype=np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise DataError(f"{path}: the header is damaged ({error}); export the scan again.") from error
    affine[:3] *= unit_mm
    check_affine(affine, shape, path)
    assumed += _assumed(header, mended, shape, affine, unit_mm)
    files.warn_of_assumptions(path, assumed)
    return Grid(shape=shape, affine=affine, path=address, source=header, assumed=assumed)


def _assumed(
    header: Any, mended: Any, shape: Triple, affine: npt.NDArray[np.float64], unit_mm: float
) -> tuple[str, ...]:
    """What of the geometry is left open or said twice, with what is assumed."""
    qform, sform = int(mended["qform_code"]), int(mended["sform_code"])
    if qform <= 0 and sform <= 0:
        return (
            f"the header does not say how the patient lies (qform_code and sform_code are {int(header['qform_code'])} "
            f"and {int(header['sform_code'])}); voxels are taken to run to the left, the front and the head, so left "
            "and right may be the wrong way round",
        )
    declared, used = np.array(header["pixdim"][1:4], dtype=np.float64) * unit_mm, np.array(spacing_of(affine))
    if not np.allclose(declared, used, rtol=0.01):
        return (
            f"the header has two voxel sizes, {times(np.round(declared, 4).tolist())} mm (pixdim) and "
            f"{times(np.round(used, 4).tolist())} mm ({'sform' if sform > 0 else 'without signs'}); the latter is used",
        )
    if qform > 0 and sform > 0:
        try:
            other = np.array(mended.get_qform(), dtype=np.float64)
        except (nib.spatialimages.HeaderDataError, ValueError):
            other = np.full((4, 4), np.nan)
        if not np.isfinite(other).all():
            return ("the header places voxels by an sform, and by a qform that is no rotation; the sform is used",)
        other[:3] *= unit_mm
        shift_mm, shift_voxels = largest_shift(affine, other, shape)
        if not shift_voxels <= TOLERANCE_VOXELS:
            return (
                f"the header places voxels twice, by qform and sform, up to {shift_mm:.4g} mm or {shift_voxels:.3g} "
                "voxels apart; the sform is used, and other programs may use the qform",
            )
    return ()


def rescaled(raw: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[Any]:
    """`raw * slope + intercept`: whole numbers stay integers that hold them, all else becomes float32."""
    dtype: np.dtype[Any] = np.dtype(np.float32)
    if whole := raw.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer():
        ends = [int(end) * int(slope) + int(intercept) for end in (raw.min(), raw.max())]
        if whole := min(ends) >= -(2**63) and max(ends) < 2**63:
            dtype = smallest_integer(min(ends), max(ends))
    out = np.empty_like(raw, dtype=dtype)
    for index in range(raw.shape[-1]):
        slab = raw[..., index].astype(np.int64 if whole else np.float64)
        out[..., index] = slab * (int(slope) if whole else slope) + (int(intercept) if whole else intercept)
    return out


def write_nifti(path: str, array: npt.NDArray[Any], grid: Grid) -> None:
    """Write voxels in stored axis order; the geometry of a NIfTI source is copied field by field.

    A grid of another format gets its affine as both sform and qform, code 1 (scanner), in millimetres.
    """
    kept = grid.source
    # The class of a NIfTI-2 header is derived from that of NIfTI-1.
    if isinstance(kept, nib.Nifti1Header):
        # Without an affine nibabel leaves the geometry fields alone; after construction it does not mend them.
        image = (nib.Nifti2Image if isinstance(kept, nib.Nifti2Header) else nib.Nifti1Image)(array, None)
        for name in _GEOMETRY:
            image.header[name] = kept[name]
    else:
        image = nib.Nifti1Image(array, grid.affine)
        image.set_sform(grid.affine, code=1)
        image.set_qform(grid.affine, code=1)
        image.header.set_xyzt_units("mm")
    nib.save(image, path)


class ProbabilityFile:
    """A 4-D NIfTI file that is filled part by part: float32, one volume per channel, on a scan's own grid.

    Until it is saved the numbers lie in a file beside it, not in memory: 4 bytes per voxel and channel of disk.

    Args:
        path: File to be written; it ends in .nii or .nii.gz. Missing folders are made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._stored: npt.NDArray[np.float32] | None = None
        self._grid: Grid | None = None

    def __enter__(self) -> "ProbabilityFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._stored = None
        if self._scratch is not None:
            self._scratch.cleanup()

    def target(self, grid: Grid, num_channels: int) -> npt.NDArray[np.float32]:
        """(X, Y, Z, K) zeros along RAS+ axes, to be filled.

        Raises:
            DataError: The folder cannot be written to, or its disk has not enough room.
        """
        size_bytes = 4 * math.prod(grid.shape) * num_channels
        with explained_write(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self._path.parent).free
            if size_bytes > free_bytes:
                raise DataError(
                    f"{self._path}: the probabilities of {num_channels} channels need {size_bytes / 2**30:.1f} GiB of "
                    f"disk, and {free_bytes / 2**30:.1f} GiB are free; choose another disk, or --probabilities false."
                )
            self._scratch = tempfile.TemporaryDirectory(
                prefix=".", suffix=".partial", dir=self._path.parent, ignore_cleanup_errors=True
            )
            self._stored = np.memmap(
                os.path.join(self._scratch.name, "probabilities"),
                dtype=np.float32,
                mode="w+",
                shape=(*grid.shape, num_channels),
                order="F",
            )
        self._grid = grid
        # Reorientation concerns the first three axes; the channels stay last.
        view: Any = grid.to_ras(self._stored)
        return view

    def save(self) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
            DataError: The disk is full.
        """
        assert self._stored is not None and self._grid is not None
        with atomic_file(self._path) as part:
            write_nifti(str(part), self._stored, self._grid)
