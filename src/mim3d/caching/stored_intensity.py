"""From intensities in source units to the integers of 8 to 32 bits that are stored, and the line that leads back.

* ``lossless``: integers are stored as they are, bit by bit. So are floating point numbers that are all whole. Others
  (PET in SUV, maps, images normalised before) are *not* kept bit by bit: they are stored in 65,536 even steps from the
  channel's least to its greatest value, at most half a step off, with the scale and offset that lead back.
* ``8-bit``: CT is clipped to a window of Hounsfield units. Any other scan, whose scale differs from file to file, is
  clipped to the 0.1 to 99.9 percentiles of each channel's foreground: the darkest thousandth of the foreground and all
  of the background become one value, and so does the brightest thousandth. Where whole numbers span at most 256 values,
  as in images made from 8 bits, they are stored exactly.

What is CT and what is foreground is decided in :mod:`mim3d.caching.foreground`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import HU_BELOW, Statistics

#: Integer types that are stored, in order of preference: the first that holds every value.
INTEGER_TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.uint32)

#: About so many voxels are converted at a time, in double precision.
_SLAB_VOXELS = 2**18


@dataclass(frozen=True)
class StoredIntensity:
    """What the stored numbers of one channel mean: ``value = stored * scale + offset`` in source units.

    Attributes:
        scale: source units per step, above 0.
        offset: source units at a stored 0.
    """

    scale: float = 1.0
    offset: float = 0.0

    def nearest(self, value: float, dtype: np.dtype[Any]) -> int:
        """The stored number of a type whose value lies nearest to ``value``."""
        limits = np.iinfo(dtype)
        return min(max(round((value - self.offset) / self.scale), int(limits.min)), int(limits.max))


def to_stored(
    image_CXYZ: npt.NDArray[Any],
    statistics: Sequence[Statistics],
    intensities: Literal["lossless", "8-bit"],
    window: tuple[float, float],
) -> tuple[npt.NDArray[Any], tuple[StoredIntensity, ...]]:
    """The integers to store of an image, and what they mean in each channel.

    Args:
        image_CXYZ: source units; integers or finite floating point numbers.
        statistics: of each channel.
        intensities: the rule, see above.
        window: what 8 bits of a CT cover, HU.
    """
    if intensities == "8-bit":
        lines = tuple(
            _eight_bits(channel, stats, window) for channel, stats in zip(image_CXYZ, statistics, strict=True)
        )
        return _converted(image_CXYZ, lines, np.dtype(np.uint8)), lines
    dtype = _exact_type(image_CXYZ, statistics)
    if dtype is not None:
        return image_CXYZ.astype(dtype, copy=False), tuple(StoredIntensity() for _ in image_CXYZ)
    lines = tuple(_sixteen_bits(channel, stats) for channel, stats in zip(image_CXYZ, statistics, strict=True))
    return _converted(image_CXYZ, lines, np.dtype(np.int16)), lines


def _eight_bits(channel: npt.NDArray[Any], stats: Statistics, window: tuple[float, float]) -> StoredIntensity:
    if stats.minimum < HU_BELOW:
        return _line(window[0], window[1], np.dtype(np.uint8))
    if stats.maximum - stats.minimum <= 255 and _is_whole(channel):
        return StoredIntensity(1.0, stats.minimum)
    low, high = stats.percentile_00_1, stats.percentile_99_9
    if low == high:
        low, high = stats.minimum, stats.maximum
    return _line(low, high, np.dtype(np.uint8))


def _sixteen_bits(channel: npt.NDArray[Any], stats: Statistics) -> StoredIntensity:
    low, high = stats.minimum, stats.maximum
    limits = np.iinfo(np.int16)
    if high - low <= limits.max - limits.min and _is_whole(channel):
        return StoredIntensity(1.0, 0.0 if limits.min <= low and high <= limits.max else low - limits.min)
    return _line(low, high, np.dtype(np.int16))


def _line(low: float, high: float, dtype: np.dtype[Any]) -> StoredIntensity:
    """All numbers of a type over ``[low, high]``."""
    limits = np.iinfo(dtype)
    if low == high:
        return StoredIntensity(1.0, low)
    scale = high / (limits.max - limits.min) - low / (limits.max - limits.min)
    return StoredIntensity(scale, low - limits.min * scale)


def _exact_type(image: npt.NDArray[Any], statistics: Sequence[Statistics]) -> np.dtype[Any] | None:
    """The smallest type that holds every value; None where some are not whole, or beyond 32 bits."""
    low, high = min(stats.minimum for stats in statistics), max(stats.maximum for stats in statistics)
    for dtype in INTEGER_TYPES:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return np.dtype(dtype) if all(_is_whole(channel) for channel in image) else None
    return None


def _is_whole(channel: npt.NDArray[Any]) -> bool:
    return channel.dtype.kind in "biu" or all(bool((np.rint(slab) == slab).all()) for slab in _slabs(channel))


def _converted(image: npt.NDArray[Any], lines: Sequence[StoredIntensity], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    stored = np.empty(image.shape, dtype=dtype)
    limits = np.iinfo(dtype)
    for channel, target, line in zip(image, stored, lines, strict=True):
        for slab, place in zip(_slabs(channel), _slabs(target), strict=True):
            steps = slab.astype(np.float64)
            steps -= line.offset
            steps /= line.scale
            np.rint(steps, out=steps)
            place[...] = np.clip(steps, limits.min, limits.max, out=steps)
    return stored


def _slabs(channel: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    planes = max(1, _SLAB_VOXELS // max(1, math.prod(channel.shape[1:])))
    return (channel[start : start + planes] for start in range(0, len(channel), planes))
