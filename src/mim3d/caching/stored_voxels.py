"""The voxels that a cache stores of an image: integers of 8 to 32 bits, in several resolutions.

How intensities in source units become integers:

* ``lossless``: integers are stored as they are, bit by bit. So are floating point numbers that are all whole. Others
  (PET in SUV, maps, images normalised before) are *not* kept bit by bit: they are stored in 65,536 even steps from the
  channel's least to its greatest value, at most half a step off, with the scale and offset that lead back.
* ``8-bit``: CT is clipped to a window of Hounsfield units. Any other scan, whose scale differs from file to file, is
  clipped to the 0.1 to 99.9 percentiles of each channel's foreground: the darkest thousandth of the foreground and all
  of the background become one value, and so does the brightest thousandth. Where whole numbers span at most 256 values,
  as in images made from 8 bits, they are stored exactly.

What is CT is decided in :mod:`mim3d.scans.modality`, what is foreground in :mod:`mim3d.caching.foreground`. Each
further resolution averages 2 x 2 x 2 voxels of the one before *as a network is shown them*: clipped to the channel's
window first, with the padding value beyond the scan's edge. A network's window does not commute with an average, so it
is settled when the levels are made; where a network has another one, coarse crops are averaged from full resolution
(:mod:`mim3d.loading.samples`).
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import Statistics
from mim3d.caching.shards import write_array, write_group
from mim3d.core.types import Triple

#: Integer types that are stored, in order of preference: the first that holds every value.
INTEGER_TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.uint32)

#: About this many voxels are converted at a time: they stay in the processor's cache, whatever the scan's size.
_SLAB_VOXELS = 2**18


@dataclass(frozen=True)
class StoredIntensity:
    """What the stored numbers of one channel mean: ``value = stored * scale + offset`` in source units.

    Attributes:
        scale: Source units per step, above 0.
        offset: Source units at a stored 0.
    """

    scale: float = 1.0
    offset: float = 0.0

    @classmethod
    def over(cls, low: float, high: float, dtype: np.dtype[Any]) -> "StoredIntensity":
        """All numbers of an integer type spread over ``[low, high]``."""
        limits = np.iinfo(dtype)
        if low == high:
            return cls(1.0, low)
        scale = high / (limits.max - limits.min) - low / (limits.max - limits.min)
        return cls(scale, low - limits.min * scale)

    def nearest(self, value: float, dtype: np.dtype[Any]) -> int:
        """The stored number of a type whose value lies nearest to ``value``."""
        limits = np.iinfo(dtype)
        return min(max(round((value - self.offset) / self.scale), int(limits.min)), int(limits.max))


@dataclass(frozen=True)
class Shown:
    """What a network is shown of one channel's stored numbers: this is what reduced levels are averages of.

    Attributes:
        low: Numbers below it are shown as it.
        high: Numbers above it are shown as it.
        outside: The number shown beyond the edges of the scan, within the two.
    """

    low: int
    high: int
    outside: int

    @classmethod
    def within(
        cls, window: tuple[float, float], meaning: StoredIntensity, stats: Statistics, dtype: np.dtype[Any]
    ) -> "Shown":
        """What a channel shows within a window of source units."""
        low, high = (meaning.nearest(bound, dtype) for bound in window)
        return cls(low, high, min(max(meaning.nearest(stats.low, dtype), low), high))


def level_windows(
    statistics: Sequence[Statistics], window: tuple[float, float], in_hu: Sequence[bool]
) -> tuple[tuple[float, float], ...]:
    """The range of source units to which each channel is clipped before reduced levels are made.

    Args:
        statistics: Statistics of each channel.
        window: Range of a CT, HU. Other modalities are shown by their z-score, which clips nothing.
        in_hu: Whether each channel is CT in HU.
    """
    return tuple(
        window if is_ct else (stats.minimum, stats.maximum) for stats, is_ct in zip(statistics, in_hu, strict=True)
    )


def to_stored(
    image_CXYZ: npt.NDArray[Any],
    statistics: Sequence[Statistics],
    intensities: Literal["lossless", "8-bit"],
    window: tuple[float, float],
    in_hu: Sequence[bool],
) -> tuple[npt.NDArray[Any], tuple[StoredIntensity, ...]]:
    """The integers to store of an image, and what they mean in each channel.

    Args:
        image_CXYZ: Intensities in source units, integers or finite floating point numbers.
        statistics: Statistics of each channel.
        intensities: The rule, see above.
        window: Range that 8 bits of a CT cover, HU.
        in_hu: Whether each channel is CT in HU.
    """
    if intensities == "lossless":
        low, high = min(stats.minimum for stats in statistics), max(stats.maximum for stats in statistics)
        exact = [kept for kept in INTEGER_TYPES if np.iinfo(kept).min <= low and high <= np.iinfo(kept).max]
        if exact and all(_is_whole(channel) for channel in image_CXYZ):
            return image_CXYZ.astype(exact[0], copy=False), tuple(StoredIntensity() for _ in image_CXYZ)
        dtype: np.dtype[Any] = np.dtype(np.int16)
        meanings = [_sixteen_bits(channel, stats) for channel, stats in zip(image_CXYZ, statistics, strict=True)]
    else:
        dtype = np.dtype(np.uint8)
        meanings = [
            StoredIntensity.over(window[0], window[1], dtype) if is_ct else _eight_bits(channel, stats)
            for channel, stats, is_ct in zip(image_CXYZ, statistics, in_hu, strict=True)
        ]
    stored = np.empty(image_CXYZ.shape, dtype=dtype)
    limits = np.iinfo(dtype)
    for channel, target, meaning in zip(image_CXYZ, stored, meanings, strict=True):
        for slab, place in zip(_slabs(channel), _slabs(target), strict=True):
            steps = slab.astype(np.float64)
            steps -= meaning.offset
            steps /= meaning.scale
            np.rint(steps, out=steps)
            place[...] = np.clip(steps, limits.min, limits.max, out=steps)
    return stored, tuple(meanings)


def _eight_bits(channel: npt.NDArray[Any], stats: Statistics) -> StoredIntensity:
    if stats.maximum - stats.minimum <= 255 and _is_whole(channel):
        return StoredIntensity(1.0, stats.minimum)
    low, high = stats.percentile_00_1, stats.percentile_99_9
    if low == high:
        low, high = stats.minimum, stats.maximum
    return StoredIntensity.over(low, high, np.dtype(np.uint8))


def _sixteen_bits(channel: npt.NDArray[Any], stats: Statistics) -> StoredIntensity:
    low, high = stats.minimum, stats.maximum
    limits = np.iinfo(np.int16)
    if high - low <= limits.max - limits.min and _is_whole(channel):
        return StoredIntensity(1.0, 0.0 if limits.min <= low and high <= limits.max else low - limits.min)
    return StoredIntensity.over(low, high, np.dtype(np.int16))


def _is_whole(channel: npt.NDArray[Any]) -> bool:
    return channel.dtype.kind in "biu" or all(bool((np.rint(slab) == slab).all()) for slab in _slabs(channel))


def _slabs(channel: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    planes = max(1, _SLAB_VOXELS // max(1, math.prod(channel.shape[1:])))
    return (channel[start : start + planes] for start in range(0, len(channel), planes))


def write_image(
    path: str,
    stored_CXYZ: npt.NDArray[Any],
    meanings: Sequence[StoredIntensity],
    num_levels: int,
    shown: Sequence[Shown],
) -> None:
    """Store an image as a group of arrays ``0``, ``1``, ...: full resolution, and each level half the one before.

    Args:
        path: Folder of the group.
        stored_CXYZ: Integers.
        meanings: What they mean in each channel; written beside them for other programs.
        num_levels: Number of arrays.
        shown: What of each channel the reduced levels are averages of.

    Raises:
        OSError: The disk is full or not writable.
    """
    write_group(path, {"stored_intensities": [asdict(meaning) for meaning in meanings]})
    for level, image in enumerate(levels_of(stored_CXYZ, num_levels, shown)):
        write_array(os.path.join(path, str(level)), image, fast=image.dtype.itemsize == 1)


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


def levels_of(image_CXYZ: npt.NDArray[Any], num_levels: int, shown: Sequence[Shown]) -> Iterator[npt.NDArray[Any]]:
    """Each level of an image of integers, full resolution as it is first, then reduced what is shown of it."""
    yield image_CXYZ
    for _ in range(num_levels - 1):
        image_CXYZ = halved(image_CXYZ, shown)
        yield image_CXYZ


def halved(image_CXYZ: npt.NDArray[Any], shown: Sequence[Shown]) -> npt.NDArray[Any]:
    """Average integers of at most 32 bits, as they are shown, over blocks of 2 x 2 x 2, rounded half to even.

    Args:
        image_CXYZ: The integers.
        shown: What is shown of each channel. A block that reaches over an odd edge holds the number outside there, as
            a crop does.

    Returns:
        (C, ceil(X / 2), ceil(Y / 2), ceil(Z / 2)) of the same type.
    """
    shape = image_CXYZ.shape[1:]
    half = np.empty((len(image_CXYZ), *(-(-voxels // 2) for voxels in shape)), dtype=image_CXYZ.dtype)
    # Sums of eight: 32 bits hold those of 16-bit voxels.
    wide = np.int32 if image_CXYZ.dtype.itemsize <= 2 else np.int64
    step = 2 * max(1, _SLAB_VOXELS // (2 * math.prod(shape[1:])))
    for channel, target, seen in zip(image_CXYZ, half, shown, strict=True):
        for start in range(0, shape[0], step):
            sums = np.clip(channel[start : start + step], seen.low, seen.high, dtype=wide)
            for axis in range(3):
                sums = _pair_sums(sums, axis, seen.outside << axis)
            # Shifting right rounds down; adding 3, or 4 where the result would be odd, rounds half to even.
            target[start // 2 : start // 2 + len(sums)] = (sums + 3 + ((sums >> 3) & 1)) >> 3
    return half


def _pair_sums(array: npt.NDArray[Any], axis: int, outside: int) -> npt.NDArray[Any]:
    """Sums of neighbours along an axis; the neighbour of a last one that has none is ``outside``."""
    array = np.moveaxis(array, axis, 0)
    sums = array[0::2].copy()
    pairs = len(array) // 2
    sums[:pairs] += array[1::2]
    sums[pairs:] += outside
    return np.moveaxis(sums, 0, axis)
