"""What of a scan is body and what is background: intensity statistics, the body's box, places of each class.

The rule for foreground, chosen to need no knowledge of the modality:

* A scan whose darkest voxel lies below -200 is taken for CT in Hounsfield units: foreground is above -950 HU, which
  leaves out air and the padding outside the field of view but keeps lungs.
* Any other scan (MRI, whose scale differs from file to file) is cut 5 % of the way from its darkest voxel to its 99.5th
  percentile: that leaves out zero background and its noise, and next to nothing of a crop that is all tissue.
* Where less than one voxel in a thousand is left, all of the scan is foreground.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.types import Triple

HU_BELOW = -200.0
CT_FOREGROUND_HU = -950.0
#: The padding value of CT is never below air, even where the scanner filled its corners with -3024.
CT_LOWEST_PADDING_HU = -1024.0
BACKGROUND_RATIO = 0.05
MIN_FOREGROUND_RATIO = 1e-3
MAX_LOCATIONS = 2000
#: Percentiles are taken over at most about this many evenly spaced voxels.
MAX_PERCENTILE_VOXELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Intensities of one channel, in stored units (HU for CT).

    Attributes:
        minimum: Of all voxels.
        maximum: Of all voxels.
        mean: Of the foreground.
        std: Of the foreground.
        percentile_00_5: Of the foreground.
        percentile_99_5: Of the foreground.
        low: What stands for "nothing there" outside the scan: its darkest value, for CT at least -1024 HU.
    """

    minimum: float
    maximum: float
    mean: float
    std: float
    percentile_00_5: float
    percentile_99_5: float
    low: float


def foreground_of(channel: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Boolean (X, Y, Z) foreground of a channel by the rule above."""
    minimum = float(channel.min())
    if minimum < HU_BELOW:
        threshold = CT_FOREGROUND_HU
    else:
        high = float(np.percentile(thinned(channel.ravel()), 99.5))
        threshold = minimum + BACKGROUND_RATIO * (high - minimum)
    foreground = np.asarray(channel > threshold)
    if np.count_nonzero(foreground) < MIN_FOREGROUND_RATIO * channel.size:
        return np.ones(channel.shape, dtype=np.bool_)
    return foreground


def statistics_of(channel: npt.NDArray[Any], foreground: npt.NDArray[np.bool_]) -> Statistics:
    """Statistics of one (X, Y, Z) channel, given its foreground."""
    minimum = float(channel.min())
    voxels = channel[foreground]
    low_high = np.percentile(thinned(voxels).astype(np.float64), (0.5, 99.5))
    return Statistics(
        minimum=minimum,
        maximum=float(channel.max()),
        mean=float(voxels.mean(dtype=np.float64)),
        std=float(voxels.std(dtype=np.float64)),
        percentile_00_5=float(low_high[0]),
        percentile_99_5=float(low_high[1]),
        low=max(minimum, CT_LOWEST_PADDING_HU) if minimum < HU_BELOW else minimum,
    )


def thinned(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """At most about ``MAX_PERCENTILE_VOXELS`` of the values, evenly spaced: enough for percentiles."""
    return values[:: max(1, values.size // MAX_PERCENTILE_VOXELS)]


def body_box_of(foreground: npt.NDArray[np.bool_]) -> tuple[Triple, Triple]:
    """Box around the foreground, (start, stop) with stop excluded.

    Blocks of 4 voxels a side count where half of their voxels are foreground, so that noise in the air and thin
    tables do not stretch the box; where no block counts the box is the whole scan.
    """
    edge = 4
    counts = foreground.astype(np.int32)
    for axis, size in enumerate(foreground.shape):
        counts = np.add.reduceat(counts, np.arange(0, size, edge), axis=axis)
    x, y, z = (np.minimum(edge, size - np.arange(0, size, edge)) for size in foreground.shape)
    body = counts * 2 >= x[:, None, None] * y[None, :, None] * z[None, None, :]
    start, stop = [], []
    for axis, size in enumerate(foreground.shape):
        places = np.flatnonzero(body.any(axis=tuple(other for other in range(3) if other != axis)))
        start.append(int(places[0]) * edge if len(places) else 0)
        stop.append(min((int(places[-1]) + 1) * edge, size) if len(places) else size)
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def class_counts_of(label: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(X, V) voxels of each value 0 .. V - 1 in each plane along X of an (X, Y, Z) label map."""
    num_values = int(label.max(initial=0)) + 1
    return np.array([np.bincount(plane.ravel(), minlength=num_values) for plane in label], dtype=np.int64)


def class_locations_of(label: npt.NDArray[Any], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Places of each class: (N, 4) rows ``value, x, y, z`` sorted by value, at most 2000 per value above 0.

    Drawn evenly over a class's voxels, the same for the same label map.

    Args:
        label: (X, Y, Z) label map.
        counts: Its ``class_counts_of``.
    """
    rows = [np.zeros((0, 4), dtype=np.int64)]
    for value in range(1, counts.shape[1]):
        before = np.concatenate([[0], np.cumsum(counts[:, value])])
        ranks = np.arange(before[-1])
        if len(ranks) > MAX_LOCATIONS:
            ranks = np.sort(np.random.default_rng(value).choice(before[-1], MAX_LOCATIONS, replace=False))
        first = np.searchsorted(ranks, before)
        for x in np.flatnonzero(np.diff(first)):
            places = np.flatnonzero(label[x] == value)[ranks[first[x] : first[x + 1]] - before[x]]
            y, z = np.unravel_index(places, label.shape[1:])
            rows.append(np.stack([np.full(len(places), value), np.full(len(places), x), y, z], axis=1))
    return np.concatenate(rows).astype(np.int32)
