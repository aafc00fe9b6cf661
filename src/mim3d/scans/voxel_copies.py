"""Voxels from the order of a file into the order of an array, without a second array as large."""

from itertools import product
from typing import Any

import numpy.typing as npt

#: Voxels copied at a time along each axis: what is read and what is written of them stays in the processor's cache.
_TILE = (128, 8, 64)

#: With so many slices at once every piece of a line that is written is a full cache line.
_MIN_SLICES = 32

#: About so many voxels are read at a time where slices are small.
_SLAB_VOXELS = 2**20


def slices_at_once(slice_voxels: int) -> int:
    """How many slices of a file are worth reading before they are copied into place."""
    return max(_MIN_SLICES, _SLAB_VOXELS // slice_voxels)


def copy_tiled(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy between two views of equal (X, Y, Z) shape whatever the order of their axes in memory.

    Several times faster than plain assignment where one runs fast along X and the other along Z.
    """
    spans = (range(0, size, edge) for size, edge in zip(target.shape, _TILE, strict=True))
    for corner in product(*spans):
        tile = tuple(slice(start, start + edge) for start, edge in zip(corner, _TILE, strict=True))
        target[tile] = source[tile]
