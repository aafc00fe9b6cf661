"""The grid of a scan: where its voxels lie, as the file stores it and as RAS+ arrays see it."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from nibabel import orientations as _orientations

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.types import Spacing, Triple

# Without types, so that mypy does not check calls into it.
orientations: Any = _orientations

#: Turns LPS millimetres (DICOM, ITK) into RAS millimetres (NIfTI, mim3d) and back.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

#: How one channel of a file with several is addressed.
_CHANNEL = re.compile(r"(?P<file>.+)::channel=(?P<channel>\d+)", re.DOTALL)

#: How one series of a folder with several is addressed. Names of files may hold colons, too.
_SERIES = re.compile(r"(?P<folder>.+)::(?P<series>[0-9a-f]{8})", re.DOTALL)

#: Axes count as perpendicular up to this cosine (0.06 degrees): headers in single precision stay far below. Beyond it
#: they do while no voxel lies further than ``TOLERANCE_VOXELS`` from a rectangular grid: headers of few digits.
MAX_SHEAR_COSINE = 1e-3

#: Voxel sizes that a scan can have, from a cell to a field.
MIN_SPACING_MM, MAX_SPACING_MM = 1e-6, 1e6

#: Largest voxel along an axis that scans are brought to, in millimetres: beyond it a scan is a voxel or two.
LARGEST_VOXEL_MM = 1000.0

#: Voxels of two grids may lie apart by this share of a voxel anywhere, from rounding in their headers.
TOLERANCE_VOXELS = 0.1

#: Slices read at a time, at least: then every piece of a line that is written to an array is a full cache line.
_MIN_SLICES = 32

#: Voxels read at a time, about, where slices are small.
_SLAB_VOXELS = 2**20


def require_spacing(spacing_mm: Spacing | None) -> None:
    """Refuse a voxel size that no scan can be brought to; None keeps each scan's own.

    Raises:
        ConfigError: It is not above 0 along each axis, or too large.
    """
    if spacing_mm is None or (len(spacing_mm) == 3 and all(0 < value <= LARGEST_VOXEL_MM for value in spacing_mm)):
        return
    raise ConfigError(
        f"spacing_mm {tuple(spacing_mm)} must be three positive numbers of at most {LARGEST_VOXEL_MM:g}, such as "
        "1.5 1.5 2.0."
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """A scan's grid exactly as stored.

    Attributes:
        shape: Number of voxels along each stored axis.
        affine: (4, 4) float64, stored index to RAS millimetres.
        path: File or DICOM series that it was read from.
        source: Geometry as its format stores it, so that a file of the same format gets it back bit by bit, or None.
        assumed: A phrase for each thing of the geometry that the file leaves open or says twice, with what is assumed.
    """

    shape: Triple
    affine: npt.NDArray[np.float64]
    path: str
    source: object | None = None
    assumed: tuple[str, ...] = ()

    @property
    def orientation(self) -> npt.NDArray[np.float64]:
        """(3, 2): for each stored axis the RAS axis nearest to it and the sign of its direction."""
        return np.asarray(orientations.io_orientation(self.affine), dtype=np.float64)

    @property
    def ras_shape(self) -> Triple:
        """Voxels along the RAS+ axes."""
        placed = {int(axis): size for (axis, _), size in zip(self.orientation, self.shape, strict=True)}
        return placed[0], placed[1], placed[2]

    @property
    def ras_affine(self) -> npt.NDArray[np.float64]:
        """(4, 4) float64, RAS+ index to RAS millimetres; an oblique scan keeps its direction."""
        back = orientations.inv_ornt_aff(self.orientation, self.shape)
        return np.asarray(self.affine @ back, dtype=np.float64)

    @property
    def spacing_mm(self) -> Spacing:
        """Voxel size along the RAS+ axes."""
        return spacing_of(self.ras_affine)

    def to_ras(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View of an array in stored axis order along RAS+ axes: axes swapped and flipped, nothing else."""
        return np.asarray(orientations.apply_orientation(array, self.orientation))

    def from_ras(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """View of an array along RAS+ axes in the stored axis order.

        Raises:
            DataError: The array does not have the shape of this grid.
        """
        if array.shape != self.ras_shape:
            raise DataError(
                f"An array of {times(array.shape)} voxels does not fit the grid of {self.path}, which has "
                f"{times(self.ras_shape)} voxels along its RAS+ axes."
            )
        identity = np.array([[0, 1], [1, 1], [2, 1]])
        undo = orientations.ornt_transform(identity, self.orientation)
        return np.asarray(orientations.apply_orientation(array, undo))

    def slabs(self) -> Iterator[slice]:
        """Ranges of slices along the last stored axis that are worth reading before they are copied into an array."""
        columns, rows, num_slices = self.shape
        num_at_once = max(_MIN_SLICES, _SLAB_VOXELS // (columns * rows))
        for start in range(0, num_slices, num_at_once):
            yield slice(start, min(start + num_at_once, num_slices))

    def describe(self) -> str:
        """One phrase for a message: size, spacing, orientation and first voxel of the stored grid."""
        spacing = " x ".join(f"{value:.4g}" for value in spacing_of(self.affine))
        codes = "".join(str(code) for code in orientations.aff2axcodes(self.affine))
        origin = ", ".join(f"{value:.2f}" for value in self.affine[:3, 3])
        return f"{times(self.shape)} voxels of {spacing} mm, {codes}, first voxel at ({origin}) mm"


def split_channel(address: str) -> tuple[str, int | None]:
    """``scan.nii.gz::channel=2`` as the file and the channel, counted from 0; None for any other address."""
    match = _CHANNEL.fullmatch(address)
    return (match["file"], int(match["channel"])) if match else (address, None)


def split_series(address: str) -> tuple[str, str]:
    """``folder::1a2b3c4d`` as the folder and what names the series in it; empty for any other address."""
    match = _SERIES.fullmatch(address)
    return (match["folder"], match["series"]) if match else (address, "")


def file_of(address: str) -> str:
    """The file or folder that the address of a scan leads to, without the channel or series in it."""
    return split_series(split_channel(address)[0])[0]


def resolved(images: Sequence[str]) -> tuple[str, ...]:
    """Addresses of channels with links resolved: the same for one scan, however it is reached."""
    return tuple(f"{os.path.realpath(file)}{image[len(file) :]}" for image in images if (file := file_of(image)))


def is_there(address: str) -> bool:
    """Whether the file or folder of a scan's address exists."""
    return os.path.exists(file_of(address))


def times(shape: Sequence[int]) -> str:
    """`(4, 5, 6)` as "4 x 5 x 6"."""
    return " x ".join(str(size) for size in shape)


def spacing_of(affine: npt.NDArray[np.float64]) -> Spacing:
    """Lengths of the three axes of a (4, 4) affine, in millimetres."""
    x, y, z = (float(length) for length in np.linalg.norm(affine[:3, :3], axis=0))
    return x, y, z


def volume_shape(shape: Sequence[int], path: str) -> Triple:
    """The three sizes of a volume; trailing axes of size 1 are dropped.

    Raises:
        DataError: There are fewer or more axes than three, or an axis has no voxels.
    """
    sizes = tuple(int(size) for size in shape)
    if any(size < 1 for size in sizes):
        raise DataError(f"{path}: the header claims {times(sizes)} voxels; every axis needs at least 1.")
    kept = sizes
    while len(kept) > 3 and kept[-1] == 1:
        kept = kept[:-1]
    if len(kept) < 3:
        raise DataError(
            f"{path}: the image is {len(kept)}-D ({times(kept)}), but a volume with three axes is needed; "
            "stack the slices into one 3-D file first."
        )
    if len(kept) > 3:
        raise DataError(
            f"{path}: the image has {len(kept)} axes ({times(kept)}), but one volume of three is needed; "
            "save each time point or channel as a 3-D file of its own."
        )
    return kept[0], kept[1], kept[2]


def check_spacing(spacing_mm: Sequence[float], path: str) -> None:
    """Refuse a voxel size that no scan can have.

    Raises:
        DataError: A value is zero, negative, NaN, infinite, or of no plausible size.
    """
    if not all(MIN_SPACING_MM <= value <= MAX_SPACING_MM for value in spacing_mm):
        shown = ", ".join(f"{value:g}" for value in spacing_mm)
        raise DataError(
            f"{path}: the voxel spacing is ({shown}) mm, but every value must be a positive number from "
            f"{MIN_SPACING_MM:g} to {MAX_SPACING_MM:g}; correct the header or export the scan again."
        )


def check_affine(affine: npt.NDArray[np.float64], shape: Triple, path: str) -> None:
    """Refuse a grid that permutation and flips cannot bring to RAS+.

    Raises:
        DataError: Values are not finite, or axes have no length, are parallel or sheared.
    """
    if not np.all(np.isfinite(affine)):
        raise DataError(f"{path}: the affine of the header holds NaN or infinite values; correct the header.")
    check_spacing(spacing_of(affine), path)
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosine = float(np.max(np.abs(axes.T @ axes - np.eye(3))))
    if cosine <= MAX_SHEAR_COSINE:
        return
    # The nearest grid with axes at right angles, about the same middle.
    left, _, right = np.linalg.svd(axes)
    square = affine.copy()
    square[:3, :3] = left @ right * np.linalg.norm(affine[:3, :3], axis=0)
    square[:3, 3] += (affine - square)[:3, :3] @ ((np.array(shape) - 1) / 2)
    shift_mm, shift_voxels = largest_shift(square, affine, shape)
    if shift_voxels > TOLERANCE_VOXELS:
        angle = np.degrees(np.arccos(min(cosine, 1.0)))
        raise DataError(
            f"{path}: the axes of the grid meet at {angle:.2f} degrees instead of 90 (sheared or singular), and voxels "
            f"lie up to {shift_mm:.3g} mm or {shift_voxels:.3g} voxels off a rectangular grid; resample the scan to "
            "one first."
        )


def largest_shift(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], shape: Triple
) -> tuple[float, float]:
    """How far apart two affines place a voxel of a volume, at most: in millimetres, and in voxels of the first.

    It is largest at a corner, as the difference grows along straight lines. Of several axes the worst counts.
    """
    corners = np.array([*itertools.product(*[(0, size - 1) for size in shape])], dtype=np.float64)
    difference = second - first
    shift_mm = corners @ difference[:3, :3].T + difference[:3, 3]
    shift_voxels = np.linalg.solve(first[:3, :3], shift_mm.T)
    return float(np.linalg.norm(shift_mm, axis=1).max()), float(np.abs(shift_voxels).max())


def require_same_grid(first: Grid, second: Grid) -> None:
    """Check that two files lie on one grid once both are brought to RAS+, up to the rounding of their headers.

    Raises:
        DataError: They do not; names both files, both grids, and how far apart they are.
    """
    apart = "the numbers of voxels differ"
    if first.ras_shape == second.ras_shape:
        shift_mm, shift_voxels = largest_shift(first.ras_affine, second.ras_affine, first.ras_shape)
        if shift_voxels <= TOLERANCE_VOXELS:
            return
        apart = f"voxels lie up to {shift_mm:.4g} mm or {shift_voxels:.3g} voxels apart"
    raise DataError(
        f"{second.path} ({second.describe()}) does not lie on the grid of {first.path} ({first.describe()}): {apart}; "
        "resample one onto the other's grid."
    )


def smallest_integer(
    low: float,
    high: float,
    types: Sequence[type[np.integer[Any]]] = (np.int16, np.int32),
    otherwise: npt.DTypeLike = np.int64,
) -> np.dtype[Any]:
    """The first of some integer types that holds both ends, by default as CT is kept; another where none does."""
    for dtype in types:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    return np.dtype(otherwise)
