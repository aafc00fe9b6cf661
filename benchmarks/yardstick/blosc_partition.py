"""nnU-Net's and nnssl's rule for the partition of a blosc2 array, written from its description.

Blocks (what is compressed as one) fill most of a first-level cache, chunks (what is stored together) most of one core's
share of the third level. The sizes of the caches are the rule's own: those of an old processor, so that every machine
writes the same files.
"""

import math
from collections.abc import Sequence

L1_BYTES = 32768
L3_BYTES = 1441792
FILLED = 0.8
#: Chunks may not be longer than this many patches, averaged over the axes.
MAX_PATCHES = 1.5


def blosc_partition(
    shape_CXYZ: Sequence[int], patch: Sequence[int], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and of chunks.

    Args:
        shape_CXYZ: of the array.
        patch: voxels along X, Y, Z of the crops that training draws.
        itemsize: bytes per voxel.
    """
    channels, *shape = shape_CXYZ
    block = [1 << (edge - 1).bit_length() for edge in patch]
    while channels * math.prod(block) * itemsize > FILLED * L1_BYTES:
        # The axis that covers most of the patch is cut to the next smaller power of two.
        axis = max((axis for axis in range(3) if block[axis] > 1), key=lambda axis: (block[axis] / patch[axis], axis))
        block[axis] = min(1 << ((block[axis] - 1).bit_length() - 1), shape[axis])
    block = [min(edge, voxels) for edge, voxels in zip(block, shape, strict=True)]
    chunk = list(block)
    while channels * math.prod(chunk) * itemsize < FILLED * L3_BYTES and chunk != shape:
        growing = [axis for axis in range(3) if chunk[axis] < shape[axis]]
        axis = min(growing, key=lambda axis: (chunk[axis] / block[axis], axis))
        longer = list(chunk)
        longer[axis] = min(chunk[axis] + block[axis], shape[axis])
        if sum(edge / voxels for edge, voxels in zip(longer, patch, strict=True)) / 3 > MAX_PATCHES:
            break
        chunk = longer
    return (channels, *block), (channels, *chunk)
