"""The resolution pyramid of a scan: each level the average of 2 x 2 x 2 voxels of the one before."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Triple

#: About so many voxels are averaged at a time: their sums stay in the processor's cache, whatever the scan's size.
_SLAB_VOXELS = 2**18


def level_shapes(shape: Triple, num_levels: int) -> tuple[Triple, ...]:
    """Shape of each level, full resolution first; an odd axis keeps its last voxel in a block of its own."""
    shapes = [shape]
    for _ in range(num_levels - 1):
        x, y, z = (-(-voxels // 2) for voxels in shapes[-1])
        shapes.append((x, y, z))
    return tuple(shapes)


def reduction_of(footprint: Triple, size: Triple) -> int:
    """The power of two by which ``footprint`` voxels are shown as ``size`` along every axis; 1 where there is none."""
    factor = footprint[0] // size[0]
    is_power = factor > 0 and factor & (factor - 1) == 0
    fits = all(voxels == shown * factor for voxels, shown in zip(footprint, size, strict=True))
    return factor if is_power and fits else 1


def levels_of(image_CXYZ: npt.NDArray[Any], num_levels: int) -> Iterator[npt.NDArray[Any]]:
    """Each level of the pyramid of integers, full resolution first."""
    yield image_CXYZ
    for _ in range(num_levels - 1):
        image_CXYZ = halved(image_CXYZ)
        yield image_CXYZ


def halved(image_CXYZ: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Average integers of at most 32 bits over blocks of 2 x 2 x 2, rounded half to even.

    Returns:
        (C, ceil(X / 2), ceil(Y / 2), ceil(Z / 2)) of the same type; a block at an odd edge is averaged over what is
        there.
    """
    shape = image_CXYZ.shape[1:]
    half = np.empty((len(image_CXYZ), *(-(-voxels // 2) for voxels in shape)), dtype=image_CXYZ.dtype)
    # Sums of eight: 32 bits hold those of 16-bit voxels.
    wide = np.int32 if image_CXYZ.dtype.itemsize <= 2 else np.int64
    step = 2 * max(1, _SLAB_VOXELS // (2 * math.prod(shape[1:])))
    for channel, target in zip(image_CXYZ, half, strict=True):
        for start in range(0, shape[0], step):
            sums = channel[start : start + step].astype(wide)
            for axis in range(3):
                sums = _pair_sums(sums, axis)
            # Shifting right rounds down; adding 3, or 4 where the result would be odd, rounds half to even.
            target[start // 2 : start // 2 + len(sums)] = (sums + 3 + ((sums >> 3) & 1)) >> 3
    return half


def _pair_sums(array: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Sums of neighbours along an axis. A last one without a neighbour counts twice: the average is its own."""
    array = np.moveaxis(array, axis, 0)
    sums = array[0::2].copy()
    pairs = len(array) // 2
    sums[:pairs] += array[1::2]
    sums[pairs:] *= 2
    return np.moveaxis(sums, 0, axis)
