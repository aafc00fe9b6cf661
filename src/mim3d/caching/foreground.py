"""What of a scan is body and what is background: intensity statistics, the body's box, locations of each class.

The rule for foreground:

* In a scan that is CT in Hounsfield units (:mod:`mim3d.scans.modality`), foreground is above -950 HU, which leaves out
  air and the padding outside the field of view but keeps lungs.
* Any other scan (MRI, whose scale differs from file to file) is cut 5 % of the way from its darkest voxel to its 99.5th
  percentile: that leaves out zero background and its noise, and next to nothing of a crop that is all tissue.
* Where less than one voxel in a thousand is left, all of the scan is foreground.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.shards import BLOCK
from mim3d.core.types import Triple
from mim3d.scans.modality import sign_of

CT_FOREGROUND_HU = -950.0
#: The padding value of CT is never below air, even where the scanner filled its corners with -3024.
CT_LOWEST_PADDING_HU = -1024.0
BACKGROUND_RATIO = 0.05
MIN_FOREGROUND_RATIO = 1e-3
MAX_LOCATIONS = 2000
#: Edge of the blocks that the body's box is made of; it divides the edge of stored blocks.
BOX_BLOCK = 4
#: Percentiles are taken over at most about this many evenly spaced voxels.
MAX_PERCENTILE_VOXELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Intensities of one channel, in stored units (HU for CT).

    Attributes:
        minimum: Smallest value of all voxels.
        maximum: Largest value of all voxels.
        mean: Mean of the foreground.
        std: Standard deviation of the foreground.
        percentile_00_1: The 0.1 percentile of the foreground, over evenly spaced voxels of it like all percentiles.
        percentile_00_5: The 0.5 percentile of the foreground.
        percentile_99_5: The 99.5 percentile of the foreground.
        percentile_99_9: The 99.9 percentile of the foreground.
        low: Padding value outside the scan: its darkest value, for CT at least -1024 HU.
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    percentile_00_1: float
    percentile_00_5: float
    percentile_99_5: float
    percentile_99_9: float
    low: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreground:
    """Where the foreground of a scan lies, which is foreground in any of its channels.

    Attributes:
        blocks: (ceil(X / 4), ceil(Y / 4), ceil(Z / 4)) bool, whether at least half of the voxels of a block of 4 voxels
            a side are foreground, so that noise in the air and thin tables do not count.
        box: The box around those blocks, (start, stop) in voxels with stop excluded; the whole scan without any.
        shares: (ceil(X / 32), ceil(Y / 32), ceil(Z / 32)) uint8, in each block of 32 voxels a side the share of its
            voxels inside the scan that are foreground, in 255ths, rounded.
    """

    blocks: npt.NDArray[np.bool_]
    box: tuple[Triple, Triple]
    shares: npt.NDArray[np.uint8]


def threshold_of(channel: npt.NDArray[Any], in_hu: bool | None = None) -> float:
    """The threshold of an (X, Y, Z) channel's foreground by the rule above; minus infinity where all of it is.

    The foreground lies above the threshold.

    Args:
        channel: Intensities in source units.
        in_hu: Whether they are HU; None where its voxels decide.
    """
    if sign_of(channel) == "HU" if in_hu is None else in_hu:
        threshold = CT_FOREGROUND_HU
    else:
        minimum = float(channel.min())
        values = channel.ravel()
        high = float(np.percentile(values[:: max(1, values.size // MAX_PERCENTILE_VOXELS)], 99.5))
        threshold = minimum + BACKGROUND_RATIO * (high - minimum)
    is_enough = _num_above(channel, threshold) >= MIN_FOREGROUND_RATIO * channel.size
    return threshold if is_enough else -math.inf


def statistics_of(channel: npt.NDArray[Any], threshold: float, in_hu: bool | None = None) -> Statistics:
    """Statistics of one (X, Y, Z) channel whose foreground lies above a threshold.

    Sums are in double precision and taken plane by plane: nothing as large as the channel is made.

    Args:
        channel: Intensities in source units.
        threshold: What ``threshold_of`` returns for it.
        in_hu: Whether they are HU; None where its voxels decide.
    """
    in_hu = sign_of(channel) == "HU" if in_hu is None else in_hu
    minimum, maximum = float(channel.min()), float(channel.max())
    stride = max(1, _num_above(channel, threshold) // MAX_PERCENTILE_VOXELS)
    # Sums of differences from a value of the foreground's own size: their squares cancel nothing.
    origin = threshold if math.isfinite(threshold) else minimum
    seen, total, squares = 0, 0.0, 0.0
    picked = []
    for plane in channel:
        voxels = plane[_above(plane, threshold)]
        # A copy, as a view would keep all of the plane's foreground.
        picked.append(voxels[-seen % stride :: stride].copy())
        seen += voxels.size
        differences = voxels.astype(np.float64)
        differences -= origin
        total += float(differences.sum())
        squares += float(differences @ differences)
    percentiles = np.percentile(np.concatenate(picked).astype(np.float64), (0.1, 0.5, 99.5, 99.9))
    return Statistics(
        minimum=minimum,
        maximum=maximum,
        mean=origin + total / seen,
        std=math.sqrt(max(squares / seen - (total / seen) ** 2, 0.0)),
        percentile_00_1=float(percentiles[0]),
        percentile_00_5=float(percentiles[1]),
        percentile_99_5=float(percentiles[2]),
        percentile_99_9=float(percentiles[3]),
        low=max(minimum, CT_LOWEST_PADDING_HU) if in_hu else minimum,
    )


def foreground_of(image_CXYZ: npt.NDArray[Any], thresholds: Sequence[float]) -> Foreground:
    """Where the foreground of an image lies: voxels that are above the threshold of at least one channel."""
    shape = image_CXYZ.shape[1:]
    counts = np.empty([-(-size // BOX_BLOCK) for size in shape], dtype=np.uint8)
    for place in range(len(counts)):
        planes = slice(place * BOX_BLOCK, (place + 1) * BOX_BLOCK)
        inside = _above(image_CXYZ[0, planes], thresholds[0])
        for channel, threshold in zip(image_CXYZ[1:], thresholds[1:], strict=True):
            inside |= _above(channel[planes], threshold)
        counts[place] = _block_sums(inside.view(np.uint8), BOX_BLOCK)[0]
    voxels = _block_sums(counts.astype(np.uint16), BLOCK // BOX_BLOCK)
    shares = np.rint(255 * (voxels / _block_sizes(shape, BLOCK))).astype(np.uint8)
    blocks = counts * 2 >= _block_sizes(shape, BOX_BLOCK)
    start, stop = [0, 0, 0], list(shape)
    if blocks.any():
        for axis, others in enumerate(((1, 2), (0, 2), (0, 1))):
            places = np.flatnonzero(blocks.any(axis=others))
            start[axis] = int(places[0]) * BOX_BLOCK
            stop[axis] = min((int(places[-1]) + 1) * BOX_BLOCK, shape[axis])
    box = (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])
    return Foreground(blocks=blocks, box=box, shares=shares)


def _above(voxels: npt.NDArray[Any], threshold: float) -> npt.NDArray[np.bool_]:
    if threshold == -math.inf:
        return np.ones(voxels.shape, dtype=np.bool_)
    # Integers are above a number where they are above the whole number below it; comparing integers is fast.
    return np.asarray(voxels > (math.floor(threshold) if voxels.dtype.kind in "iu" else threshold))


def _num_above(channel: npt.NDArray[Any], threshold: float) -> int:
    return sum(int(np.count_nonzero(_above(plane, threshold))) for plane in channel)


def _block_sums(array: npt.NDArray[Any], edge: int) -> npt.NDArray[Any]:
    """Sums over blocks of ``edge`` voxels a side, in the array's own type; at the far edges over what is there."""
    for axis in range(array.ndim):
        array = np.moveaxis(array, axis, 0)
        sums = array[0::edge].copy()
        for place in range(1, edge):
            part = array[place::edge]
            sums[: len(part)] += part
        array = np.moveaxis(sums, 0, axis)
    return array


def _block_sizes(shape: Sequence[int], edge: int) -> npt.NDArray[np.uint16]:
    """Voxels of each block inside a scan of a shape."""
    x, y, z = (np.minimum(edge, size - np.arange(0, size, edge)).astype(np.uint16) for size in shape)
    return np.asarray(x[:, None, None] * y[None, :, None] * z[None, None, :])


def class_counts_of(label: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(X, V) number of voxels of each value 0 .. V - 1 in each plane along X of an (X, Y, Z) label map."""
    num_values = int(label.max(initial=0)) + 1
    return np.array([np.bincount(plane.ravel(), minlength=num_values) for plane in label], dtype=np.int64)


def class_locations_of(label: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Locations of each class: (N, 4) rows ``value, x, y, z`` sorted by value, at most 2000 per value above 0.

    They are drawn evenly over a class's voxels, and are the same for the same label map.

    Args:
        label: (X, Y, Z) label map.
        counts: What ``class_counts_of`` returns for it.
    """
    rows = [np.zeros((0, 4), dtype=np.int64)]
    for value in range(1, counts.shape[1]):
        before = np.concatenate([[0], np.cumsum(counts[:, value])])
        if before[-1] > MAX_LOCATIONS:
            ranks = np.sort(np.random.default_rng(value).choice(before[-1], MAX_LOCATIONS, replace=False))
        else:
            ranks = np.arange(before[-1])
        first = np.searchsorted(ranks, before)
        for x in np.flatnonzero(np.diff(first)):
            places = np.flatnonzero(label[x] == value)[ranks[first[x] : first[x + 1]] - before[x]]
            y, z = np.unravel_index(places, label.shape[1:])
            rows.append(np.stack([np.full(len(places), value), np.full(len(places), x), y, z], axis=1))
    return np.concatenate(rows).astype(np.int32)
