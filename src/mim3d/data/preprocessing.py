"""From a case's files to arrays a network can read, and from a network's scores back to the scan's grid."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.data.case_records import Case, listed
from mim3d.data.files import available_memory_bytes
from mim3d.data.foreground import Statistics, foreground_of, statistics_of
from mim3d.data.grid_checks import require_same_grid
from mim3d.data.grids import times
from mim3d.data.resampling import Taps, plan_resampling, resample_labels, resample_linear, target_grid
from mim3d.data.volumes import Grid, Volume, read_volume
from mim3d.errors import ConfigError, DataError
from mim3d.types import Spacing, Triple

__all__ = ["Prepared", "Preprocessing", "Statistics", "prepare", "restore"]

#: Integer types in order of preference: the first that holds every value is stored.
_INTEGER_TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.int64)


#: Resolutions that a cache can hold: the coarsest voxel of eight is 128 voxels a side.
MAX_LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How scans are prepared and stored; intensities are mapped to network input when they are loaded.

    Attributes:
        spacing_mm: Voxel size along X, Y, Z that every scan is resampled to; None keeps each scan's own.
        intensities: How the cache stores them: ``lossless``; ``8-bit``, a third of the size and twice as fast to
            read; or ``auto``, lossless where the data set has labels, else 8-bit.
        window: What 8 bits of a CT cover, HU; values beyond are clipped.
        num_levels: Resolutions stored, full resolution first, each half the one before; 1 for full resolution alone.
    """

    spacing_mm: Spacing | None = None
    intensities: Literal["auto", "lossless", "8-bit"] = "auto"
    window: tuple[float, float] = (-1000.0, 1000.0)
    num_levels: int = 3

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not (
            len(self.spacing_mm) == 3 and all(math.isfinite(value) and value > 0 for value in self.spacing_mm)
        ):
            raise ConfigError(f"spacing_mm {self.spacing_mm} must be three positive numbers, such as 1.5 1.5 2.0.")
        if self.intensities not in ("auto", "lossless", "8-bit"):
            raise ConfigError(f"intensities {self.intensities!r} is unknown; use auto, lossless or 8-bit.")
        rising = len(self.window) == 2 and -math.inf < self.window[0] < self.window[1] < math.inf
        if not rising:
            raise ConfigError(f"window {self.window} must be two rising numbers, such as -1000 1000.")
        if not 1 <= self.num_levels <= MAX_LEVELS:
            raise ConfigError(f"num_levels {self.num_levels} must be between 1 (full resolution) and {MAX_LEVELS}.")

    def settled(self, has_labels: bool) -> "Preprocessing":
        """These settings with ``auto`` replaced by what it means for a data set with or without labels."""
        if self.intensities != "auto":
            return self
        return replace(self, intensities="lossless" if has_labels else "8-bit")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case in memory, on its RAS+ grid or resampled.

    Attributes:
        image: (C, X, Y, Z); integers stay integers (in the smallest type that holds them), floats are float32.
        label: (X, Y, Z) uint8 or uint16, or None.
        affine: (4, 4) float64, voxel index to RAS millimetres.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Of each channel, after resampling.
        grid: Of the first image, as stored.
    """

    image: npt.NDArray[Any]
    label: npt.NDArray[Any] | None
    affine: npt.NDArray[np.float64]
    spacing_mm: Spacing
    statistics: tuple[Statistics, ...]
    grid: Grid


def prepare(
    case: Case, preprocessing: Preprocessing, *, with_label: bool = True, labels: Mapping[int, str] | None = None
) -> Prepared:
    """Read a case, check it, and resample it where asked.

    Images are resampled linearly, with anti-aliasing where voxels grow, and integers are rounded to integers again;
    labels take the class with the largest share of a voxel.

    Args:
        case: The files.
        preprocessing: The voxel size wanted.
        with_label: Read the label too, where the case has one.
        labels: Declared label values; empty or None allows all.

    Raises:
        DataError: A file that cannot be used, grids that disagree, label values that are not declared, or a
            resampled scan larger than memory.
    """
    volumes = [read_volume(path) for path in case.images]
    grid = volumes[0].grid
    for volume in volumes[1:]:
        require_same_grid(grid, volume.grid)
    label = None
    if with_label and case.label is not None:
        label_volume = read_volume(case.label, label=True)
        require_same_grid(grid, label_volume.grid)
        label = _checked_label(label_volume, case.label, labels or {})
    shape, spacing_mm, affine = grid.ras_shape, grid.spacing_mm, grid.ras_affine
    if preprocessing.spacing_mm is not None:
        shape, spacing_mm, affine = target_grid(shape, affine, spacing_mm, preprocessing.spacing_mm)
        _check_memory(case, shape, spacing_mm, len(volumes))
    taps = plan_resampling(grid.ras_shape, grid.spacing_mm, shape, spacing_mm)
    image = _stacked([_resampled(volume.array, taps) for volume in volumes], case)
    return Prepared(
        image=image,
        label=None if label is None else resample_labels(label, taps),
        affine=affine,
        spacing_mm=spacing_mm,
        statistics=tuple(statistics_of(channel, foreground_of(channel)) for channel in image),
        grid=grid,
    )


def restore(scores_KXYZ: npt.NDArray[Any], prepared: Prepared) -> npt.NDArray[np.float32]:
    """Bring scores from the prepared grid to the scan's own.

    Args:
        scores_KXYZ: (K, X, Y, Z) scores or probabilities on the grid of ``prepared``.
        prepared: What the scores were computed from.

    Returns:
        (K, X, Y, Z) float32 on the RAS+ form of ``prepared.grid``: interpolated linearly where the spacing was
        changed, else the scores themselves.

    Raises:
        DataError: The scores do not have the shape of the prepared scan.
    """
    shape = prepared.image.shape[1:]
    if scores_KXYZ.ndim != 4 or scores_KXYZ.shape[1:] != shape:
        raise DataError(
            f"scores of shape {times(scores_KXYZ.shape)} do not fit the prepared scan {prepared.grid.path}: expected "
            f"classes x {times(shape)}."
        )
    grid = prepared.grid
    taps = plan_resampling((shape[0], shape[1], shape[2]), prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)
    if all(axis.is_identity for axis in taps):
        return np.asarray(scores_KXYZ, dtype=np.float32)
    restored = np.empty((len(scores_KXYZ), *grid.ras_shape), dtype=np.float32)
    for channel, scores in zip(restored, scores_KXYZ, strict=True):
        channel[...] = resample_linear(scores, taps)
    return restored


def _checked_label(volume: Volume, path: str, labels: Mapping[int, str]) -> npt.NDArray[Any]:
    label = volume.array
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: label values run from {low} to {high}; they must lie between 0 and 65535.")
    label = label.astype(np.uint8 if high < 256 else np.uint16)
    if labels:
        counts = np.zeros(high + 1, dtype=np.int64)
        for plane in label:
            counts += np.bincount(plane.ravel(), minlength=high + 1)
        unknown = [int(value) for value in np.flatnonzero(counts) if int(value) not in labels]
        if unknown:
            declared = ", ".join(f"{value} {name}" for value, name in labels.items())
            raise DataError(
                f"{path}: label values {listed(unknown)} are not declared (declared: {declared}); correct the label "
                "map or the declaration."
            )
    return label


def _check_memory(case: Case, shape: Triple, spacing_mm: Spacing, num_channels: int) -> None:
    needed_bytes = math.prod(shape) * 4 * (num_channels + 2)
    if needed_bytes > available_memory_bytes():
        spacing = " x ".join(f"{value:g}" for value in spacing_mm)
        raise DataError(
            f"{case.images[0]}: at {spacing} mm it has {times(shape)} voxels ({needed_bytes / 2**30:.1f} GiB while "
            "being resampled), more than the memory available; use a larger spacing_mm, or check its header."
        )


def _resampled(array: npt.NDArray[Any], taps: tuple[Taps, ...]) -> npt.NDArray[Any]:
    if all(axis.is_identity for axis in taps):
        return array
    resampled = resample_linear(array, taps)
    return np.rint(resampled).astype(array.dtype) if array.dtype.kind in "iu" else resampled


def _stacked(channels: list[npt.NDArray[Any]], case: Case) -> npt.NDArray[Any]:
    """(C, X, Y, Z) in one type that holds every channel: integers without loss, else float32."""
    if any(channel.dtype.kind not in "biu" for channel in channels):
        with np.errstate(over="ignore"):
            image = np.stack(channels).astype(np.float32)
        if not np.isfinite(image).all():
            raise DataError(f"{case.images[0]}: holds values beyond 3.4e38, which single precision cannot; rescale it.")
        return image
    low = min(int(channel.min()) for channel in channels)
    high = max(int(channel.max()) for channel in channels)
    for dtype in _INTEGER_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.stack([channel.astype(dtype) for channel in channels])
    return np.stack(channels).astype(np.float32)
