"""Resampling on voxel centres, axis by axis: linear with anti-aliasing for images and scores, voting for labels."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing, Triple

#: An axis is left alone where no voxel would move by more than this part of a voxel.
TOLERANCE_VOXELS = 0.01

#: About this many voxels of the input are resampled at a time.
_SLAB_VOXELS = 2**20


@dataclass(frozen=True)
class AxisResampling:
    """How one axis is resampled: for each output voxel the input voxels that it is a weighted mean of.

    Attributes:
        index: Input voxels, (num_out, K). Those beyond the edge are the edge voxel.
        weight: Their weights, (num_out, K) float32, each row summing to 1.
        num_in: Number of voxels of the input axis.
        zoom: Output voxels per input voxel. Where this is a part of an axis, the zoom is that of the whole axis.
    """

    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    num_in: int
    zoom: float

    @property
    def is_identity(self) -> bool:
        """Whether the axis stays as it is."""
        return self.index.shape == (self.num_in, 1)


#: How the three axes of an array are resampled.
Axes = tuple[AxisResampling, ...]


def plan_axis(num_in: int, num_out: int, step: float, shift: float = 0.0) -> AxisResampling:
    """How an axis is resampled whose output voxels lie ``step`` input voxels apart.

    Linear interpolation. Where voxels grow (``step > 1``) it is averaged over a window of ``sqrt(step^2 - 1)`` voxels,
    about the extent of the new voxel, so that nothing finer than the new grid aliases into it. A ramp stays a ramp.

    Args:
        num_in: Number of input voxels.
        num_out: Number of output voxels.
        step: Distance of two output voxels in input voxels.
        shift: Distance from the centre of the input to that of the output in input voxels.
    """
    if num_in == num_out and step == 1.0 and shift == 0.0:
        return AxisResampling(np.arange(num_in)[:, None], np.ones((num_in, 1), np.float32), num_in, 1.0)
    position = (np.arange(num_out) - (num_out - 1) / 2) * step + (num_in - 1) / 2 + shift
    window = float(np.sqrt(max(step**2 - 1, 0.0)))
    reach = 1 + window / 2
    first = np.floor(position - reach).astype(np.int64) + 1
    index = first[:, None] + np.arange(int(np.ceil(2 * reach)))
    distance = index - position[:, None]
    if window < 1e-3:
        weight = np.clip(1 - np.abs(distance), 0, None)
    else:
        weight = _hat_integral(distance + window / 2) - _hat_integral(distance - window / 2)
    weight /= weight.sum(axis=1, keepdims=True)
    return AxisResampling(np.clip(index, 0, num_in - 1), weight.astype(np.float32), num_in, num_out / num_in)


def _hat_integral(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Integral of the linear interpolation kernel ``1 - |x|`` from minus infinity."""
    x = np.clip(x, -1, 1)
    return np.where(x < 0, (x + 1) ** 2 / 2, 1 - (1 - x) ** 2 / 2)


def target_grid(
    shape: Triple, affine: npt.NDArray[np.float64], spacing_mm: Spacing, wanted_mm: Spacing
) -> tuple[Triple, Spacing, npt.NDArray[np.float64]]:
    """Shape, spacing and affine of a grid of another spacing around the same centre.

    An axis whose spacing already fits within rounding keeps it exactly.
    """
    sizes, steps = [], []
    for size, have, want in zip(shape, spacing_mm, wanted_mm, strict=True):
        step = want / have
        new_size = max(1, round(size / step))
        fits = new_size == size and abs(step - 1) * size / 2 < TOLERANCE_VOXELS
        sizes.append(new_size)
        steps.append(1.0 if fits else step)
    scaled = np.diag([*steps, 1.0])
    scaled[:3, 3] = [(size - 1) / 2 - (new - 1) / 2 * step for size, new, step in zip(shape, sizes, steps, strict=True)]
    x, y, z = (step * have for step, have in zip(steps, spacing_mm, strict=True))
    return (sizes[0], sizes[1], sizes[2]), (x, y, z), affine @ scaled


def plan_resampling(shape: Triple, spacing_mm: Spacing, new_shape: Triple, new_mm: Spacing) -> Axes:
    """How the three axes are resampled between two grids around the same centre."""
    return tuple(
        plan_axis(size, new, 1.0 if have == want else want / have)
        for size, have, new, want in zip(shape, spacing_mm, new_shape, new_mm, strict=True)
    )


def resample_linear(array: npt.NDArray[Any], axes: Axes, dtype: npt.DTypeLike = np.float32) -> Any:
    """Resample an (X, Y, Z) array linearly; it is not copied where nothing is resampled and the type is its own.

    Computed in float32, slab by slab of the output: besides it no more than some planes are held.

    Args:
        array: The array, of the input shape.
        axes: How its three axes are resampled.
        dtype: Type of the result. Integers are rounded half to even.

    Returns:
        (X, Y, Z) of ``dtype`` and the output shape.
    """
    if all(axis.is_identity for axis in axes):
        return array.astype(dtype, copy=False)
    result = np.empty([len(axis.index) for axis in axes], dtype=dtype)
    # The axis that shrinks most goes first: less work for the others. In parts of a scan the order is that of the
    # whole, so that sums round in the same way.
    order = sorted(range(3), key=lambda number: axes[number].zoom)
    for rows, region, cut in _slabs(array.shape, axes):
        slab = array[region].astype(np.float32)
        for number in order:
            if not cut[number].is_identity:
                slab = _resampled_along(slab, cut[number], number)
        result[rows] = np.rint(slab, out=slab) if result.dtype.kind in "iu" else slab
    return result


def _slabs(shape: Sequence[int], axes: Axes) -> Iterator[tuple[slice, slice, Axes]]:
    """Slabs of the output along X: its planes, the planes of the input they need, and the resampling between these."""
    first = axes[0]
    num_out, num_weights = first.index.shape
    plane = max(math.prod(shape[1:]), math.prod(len(axis.index) for axis in axes[1:]))
    # Neighbouring slabs share as many planes of the input as an output voxel has weights: a small part of each.
    wanted = max(_SLAB_VOXELS // plane, 4 * num_weights)
    step = max(1, wanted * num_out // first.num_in)
    for start in range(0, num_out, step):
        rows = slice(start, min(start + step, num_out))
        if first.is_identity:
            yield rows, rows, (plan_axis(rows.stop - start, rows.stop - start, 1.0), *axes[1:])
            continue
        index = first.index[rows]
        low, high = int(index.min()), int(index.max()) + 1
        part = AxisResampling(index - low, first.weight[rows], high - low, first.zoom)
        yield rows, slice(low, high), (part, *axes[1:])


def _resampled_along(array: npt.NDArray[np.float32], axis: AxisResampling, number: int) -> npt.NDArray[np.float32]:
    shape = [1, 1, 1]
    shape[number] = -1
    total: npt.NDArray[np.float32] | None = None
    for index, weight in zip(axis.index.T, axis.weight.T, strict=True):
        part = np.take(array, index, axis=number)
        part *= weight.reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def resample_labels(labels: npt.NDArray[Any], axes: Axes) -> npt.NDArray[Any]:
    """Resample an (X, Y, Z) label map: each class linearly, then the class with the largest share of a voxel.

    Unlike nearest neighbour this shifts no border by half a voxel. Where background and a class share a voxel
    evenly the class wins; among classes the lower value does. Where nothing is resampled the map itself is returned.
    """
    from scipy.ndimage import find_objects

    if all(axis.is_identity for axis in axes):
        return labels
    result = np.zeros([len(axis.index) for axis in axes], dtype=labels.dtype)
    for rows, planes, cut in _slabs(labels.shape, axes):
        slab, voted = labels[planes], result[rows]
        best, total = np.zeros(voted.shape, dtype=np.float32), np.zeros(voted.shape, dtype=np.float32)
        for value, box in enumerate(find_objects(slab), start=1):
            if box is None:
                continue
            parts = [_restrict(axis, span.start, span.stop) for axis, span in zip(cut, box, strict=True)]
            region, part, where = zip(*parts, strict=True)
            if not all(reached.stop for reached in where):
                continue
            share = resample_linear(slab[region] == value, part)
            total[where] += share
            wins = share > best[where]
            best[where][wins] = share[wins]
            voted[where][wins] = value
        voted[1 - total > best + 1e-6] = 0
    return result


def _restrict(axis: AxisResampling, start: int, stop: int) -> tuple[slice, AxisResampling, slice]:
    """The part of an axis that input voxels ``start`` to ``stop`` reach: input range, its resampling, output range.

    Where they reach nothing, as their weight is 0 everywhere, the output range is empty.
    """
    reached = ((axis.index >= start) & (axis.index < stop) & (axis.weight > 0)).any(axis=1)
    rows = np.flatnonzero(reached)
    if not len(rows):
        return slice(start, stop), axis, slice(0, 0)
    where = slice(int(rows[0]), int(rows[-1]) + 1)
    index = axis.index[where]
    low, high = int(index.min()), int(index.max()) + 1
    return slice(low, high), AxisResampling(index - low, axis.weight[where], high - low, axis.zoom), where
