"""A case's files as arrays on the grid that is wanted, one file at a time: besides the result no more than one."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.resampling import Taps, plan_resampling, resample_labels, resample_linear, target_grid
from mim3d.core.errors import DataError, listed
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import require_same_grid, times
from mim3d.scans.volumes import Grid, read_grid, read_volume

#: Integer types in order of preference: the first that holds every value is kept.
_INTEGER_TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Where a case's voxels lie and where they are to lie.

    Attributes:
        grid: Of the first image, as stored.
        spacing_mm: Of the voxels wanted, along X, Y, Z.
        affine: (4, 4) float64, index of the voxels wanted to RAS millimetres.
        taps: From the RAS+ form of ``grid`` to what is wanted.
    """

    grid: Grid
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    taps: tuple[Taps, ...]

    @classmethod
    def of(cls, case: Case, wanted_mm: Spacing | None) -> "Plan":
        """The plan of a case from the header of its first image, with a voxel size wanted or its own.

        Raises:
            DataError: An image that cannot be read, or one larger than memory once it is resampled.
        """
        grid = read_grid(case.images[0])
        shape, spacing_mm, affine = grid.ras_shape, grid.spacing_mm, grid.ras_affine
        if wanted_mm is not None:
            shape, spacing_mm, affine = target_grid(shape, affine, spacing_mm, wanted_mm)
            _check_memory(case, shape, spacing_mm)
        taps = plan_resampling(grid.ras_shape, grid.spacing_mm, shape, spacing_mm)
        return cls(grid=grid, spacing_mm=spacing_mm, affine=affine, taps=taps)


def read_label(path: str, plan: Plan, labels: Mapping[int, str]) -> npt.NDArray[Any]:
    """(X, Y, Z) label map on the planned grid, in the smaller of 8 and 16 bits that holds its values.

    Args:
        path: The file.
        plan: Of its case.
        labels: Declared values; empty allows all.

    Raises:
        DataError: It lies on another grid than the image, holds no whole numbers from 0 to 65535, or values that
            are not declared.
    """
    volume = read_volume(path, label=True, narrow=True)
    require_same_grid(plan.grid, volume.grid)
    label = _checked_label(volume.array, path, labels)
    return label if all(axis.is_identity for axis in plan.taps) else resample_labels(label, plan.taps)


def _checked_label(label: npt.NDArray[Any], path: str, labels: Mapping[int, str]) -> npt.NDArray[Any]:
    low, high = int(label.min()), int(label.max())
    if low < 0 or high > 65535:
        raise DataError(f"{path}: label values run from {low} to {high}; they must lie between 0 and 65535.")
    label = label.astype(np.uint8 if high < 256 else np.uint16, copy=False)
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


def _check_memory(case: Case, shape: Triple, spacing_mm: Spacing) -> None:
    """Refuse a resampled scan whose channels, 2 bytes per voxel at least, and label would not fit."""
    bytes_per_voxel = 2 * len(case.images) + (case.label is not None)
    needed_bytes = math.prod(shape) * bytes_per_voxel
    if needed_bytes > available_memory_bytes():
        spacing = " x ".join(f"{value:g}" for value in spacing_mm)
        raise DataError(
            f"{case.images[0]}: at {spacing} mm it has {times(shape)} voxels ({needed_bytes / 2**30:.1f} GiB when "
            "resampled), more than the memory available; use a larger spacing_mm, or check its header."
        )


def read_images(case: Case, plan: Plan) -> npt.NDArray[Any]:
    """(C, X, Y, Z) on the planned grid in one type that holds every channel: integers without loss, else float32.

    Raises:
        DataError: An image that cannot be read, lies on another grid, or holds numbers beyond single precision.
    """
    num_channels = len(case.images)
    image = np.empty(0)
    low, high = math.inf, -math.inf
    for place, path in enumerate(case.images):
        channel = _read_channel(path, plan)
        low, high = min(low, channel.min().item()), max(high, channel.max().item())
        dtype = _type_for(channel.dtype, low, high)
        if num_channels == 1:
            return _as_type(channel, dtype)[None]
        if place == 0:
            image = np.empty((num_channels, *channel.shape), dtype=dtype)
        elif image.dtype.kind != "f":
            image = _as_type(image, dtype)
        image[place] = channel
        del channel
    return image


def _read_channel(path: str, plan: Plan) -> npt.NDArray[Any]:
    """One image on the planned grid: integers keep their type, all else is float32."""
    volume = read_volume(path)
    require_same_grid(plan.grid, volume.grid)
    array, taps = volume.array, plan.taps
    dtype = array.dtype if array.dtype.kind in "iu" else np.dtype(np.float32)
    # Numbers beyond single precision become infinite, and infinities NaN where they are averaged.
    with np.errstate(over="ignore", invalid="ignore"):
        is_kept = all(axis.is_identity for axis in taps)
        channel = array.astype(dtype, copy=False) if is_kept else resample_linear(array, taps, dtype)
    if dtype.kind == "f" and not (np.isfinite(channel.min()) and np.isfinite(channel.max())):
        raise DataError(f"{path}: holds values beyond 3.4e38, which single precision cannot; rescale it.")
    return channel


def _type_for(dtype: np.dtype[Any], low: float, high: float) -> np.dtype[Any]:
    """What values of a type between two ends are kept in."""
    if dtype.kind in "iu":
        for kept in _INTEGER_TYPES:
            if np.iinfo(kept).min <= low and high <= np.iinfo(kept).max:
                return np.dtype(kept)
    return np.dtype(np.float32)


def _as_type(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The array in a type that holds its values; integers of the same size look the same in both."""
    if array.dtype.kind in "iu" and dtype.kind in "iu" and array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)
    return array.astype(dtype, copy=False)
