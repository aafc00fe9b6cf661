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

#: About so many voxels of the input are resampled at a time.
_SLAB_VOXELS = 2**20


@dataclass(frozen=True)
class Taps:
    """For each output voxel of one axis the input voxels it is a weighted mean of.

    Attributes:
        index: (num_out, num_taps) input voxels; those beyond the edge are the edge voxel.
        weight: (num_out, num_taps) float32, each row summing to 1.
        num_in: Voxels of the input axis.
        zoom: Output voxels per input voxel; that of the whole axis where these are taps of a part of it.
    """

    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float32]
    num_in: int
    zoom: float

    @property
    def is_identity(self) -> bool:
        """Whether the axis stays as it is."""
        return self.index.shape == (self.num_in, 1)


def plan_taps(num_in: int, num_out: int, step: float, shift: float = 0.0) -> Taps:
    """Taps of an axis whose output voxels lie ``step`` input voxels apart.

    The centre of the output lies ``shift`` input voxels beyond that of the input: both grids share it where it is 0.

    Linear interpolation; where voxels grow (``step > 1``) it is averaged over a window of ``sqrt(step^2 - 1)``
    voxels, about the extent of the new voxel, so that nothing finer than the new grid aliases into it. A ramp stays
    a ramp.
    """
    if num_in == num_out and step == 1.0 and shift == 0.0:
        return Taps(np.arange(num_in)[:, None], np.ones((num_in, 1), np.float32), num_in, 1.0)
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
    return Taps(np.clip(index, 0, num_in - 1), weight.astype(np.float32), num_in, num_out / num_in)


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


def plan_resampling(shape: Triple, spacing_mm: Spacing, new_shape: Triple, new_mm: Spacing) -> tuple[Taps, ...]:
    """Taps of the three axes between two grids around the same centre."""
    return tuple(
        plan_taps(size, new, 1.0 if have == want else want / have)
        for size, have, new, want in zip(shape, spacing_mm, new_shape, new_mm, strict=True)
    )


def resample_linear(array: npt.NDArray[Any], taps: tuple[Taps, ...], dtype: npt.DTypeLike = np.float32) -> Any:
    """Resample an (X, Y, Z) array to the output shape of ``taps``.

    Computed in float32, slab by slab of the output: besides it no more than some planes are held.

    Args:
        array: Of the input shape.
        taps: Of the three axes.
        dtype: Of the result; integers are rounded half to even.

    Returns:
        (X, Y, Z) of ``dtype``.
    """
    result = np.empty([len(axis.index) for axis in taps], dtype=dtype)
    # The axis that shrinks most goes first: less work for the others. In parts of a scan the order is that of the
    # whole, so that sums round in the same way.
    order = sorted(range(3), key=lambda axis: taps[axis].zoom)
    for rows, region, cut in _slabs(array.shape, taps):
        slab = array[region].astype(np.float32)
        for axis in order:
            if not cut[axis].is_identity:
                slab = _apply(slab, cut[axis], axis)
        result[rows] = np.rint(slab, out=slab) if result.dtype.kind in "iu" else slab
    return result


def _slabs(shape: Sequence[int], taps: tuple[Taps, ...]) -> Iterator[tuple[slice, slice, tuple[Taps, ...]]]:
    """Slabs of the output along X: its planes, the planes of the input that they need, and the taps between the two."""
    first = taps[0]
    num_out, num_taps = first.index.shape
    plane = max(math.prod(shape[1:]), math.prod(len(axis.index) for axis in taps[1:]))
    # Neighbouring slabs share planes of the input, as many as there are taps: a small part of each.
    wanted = max(_SLAB_VOXELS // plane, 4 * num_taps)
    step = max(1, wanted * num_out // first.num_in)
    for start in range(0, num_out, step):
        rows = slice(start, min(start + step, num_out))
        if first.is_identity:
            yield rows, rows, (plan_taps(rows.stop - start, rows.stop - start, 1.0), *taps[1:])
            continue
        index = first.index[rows]
        low, high = int(index.min()), int(index.max()) + 1
        yield rows, slice(low, high), (Taps(index - low, first.weight[rows], high - low, first.zoom), *taps[1:])


def _apply(array: npt.NDArray[np.float32], taps: Taps, axis: int) -> npt.NDArray[np.float32]:
    shape = [1, 1, 1]
    shape[axis] = -1
    total: npt.NDArray[np.float32] | None = None
    for tap in range(taps.index.shape[1]):
        part = np.take(array, taps.index[:, tap], axis=axis)
        part *= taps.weight[:, tap].reshape(shape)
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total


def resample_labels(labels: npt.NDArray[Any], taps: tuple[Taps, ...]) -> npt.NDArray[Any]:
    """Resample an (X, Y, Z) label map: each class linearly, then the class with the largest share of a voxel.

    Unlike nearest neighbour this shifts no border by half a voxel. Where background and a class share a voxel
    evenly the class wins; among classes the lower value does.
    """
    if all(axis.is_identity for axis in taps):
        return labels.copy()
    result = np.zeros([len(axis.index) for axis in taps], dtype=labels.dtype)
    for rows, region, cut in _slabs(labels.shape, taps):
        _vote(labels[region], cut, result[rows])
    return result


def _vote(labels: npt.NDArray[Any], taps: tuple[Taps, ...], result: npt.NDArray[Any]) -> None:
    """Write the winners over zeros."""
    best = np.zeros(result.shape, dtype=np.float32)
    total = np.zeros(result.shape, dtype=np.float32)
    for value, box in _label_boxes(labels):
        parts = [_restrict(axis, *span) for axis, span in zip(taps, box, strict=True)]
        region, cut, where = zip(*parts, strict=True)
        if not all(rows.stop for rows in where):
            continue
        share = resample_linear(labels[region] == value, cut)
        total[where] += share
        wins = share > best[where]
        best[where][wins] = share[wins]
        result[where][wins] = value
    result[1 - total > best + 1e-6] = 0


def _restrict(taps: Taps, start: int, stop: int) -> tuple[slice, Taps, slice]:
    """The part of an axis that input voxels ``start`` to ``stop`` reach: input range, its taps, output range.

    Where they reach nothing, as their weight is 0 everywhere, the output range is empty.
    """
    reached = ((taps.index >= start) & (taps.index < stop) & (taps.weight > 0)).any(axis=1)
    rows = np.flatnonzero(reached)
    if not len(rows):
        return slice(start, stop), taps, slice(0, 0)
    where = slice(int(rows[0]), int(rows[-1]) + 1)
    index = taps.index[where]
    low, high = int(index.min()), int(index.max()) + 1
    return slice(low, high), Taps(index - low, taps.weight[where], high - low, taps.zoom), where


def _label_boxes(labels: npt.NDArray[Any]) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
    """Each label value above 0 with its bounding box, [start, stop) per axis."""
    from scipy.ndimage import find_objects

    for value, box in enumerate(find_objects(labels), start=1):
        if box is not None:
            yield value, tuple((axis.start, axis.stop) for axis in box)
