"""Features of whole scans and of regions in them: the tokens of windows, pooled as they come, each counted once.

A scan is covered with windows that lie a whole number of tokens apart. Where windows overlap, each place belongs to the
window in which it lies deepest, so that every token is counted once and sees as much around it as there is. Besides one
batch of windows, sums and maxima are held, whatever the size of the scan.

Shape suffixes: B windows, R regions, T tokens of a window, D channels of a feature map.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.backbones.contract import Encoder, check_multiple
from mim3d.caching.foreground import BOX_BLOCK, Foreground
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.inference.scan_input import ScanInput
from mim3d.inference.windows import MAX_OVERLAP

Counts = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

#: Share of a token that must lie in a region for its maximum, as far as there are such tokens.
MOSTLY = 0.5


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a scan is covered with windows whose tokens are pooled.

    Attributes:
        size: Voxels of a window along X, Y, Z. A smaller scan is padded on both sides.
        overlap: Least share of a window that its neighbour along an axis sees too.
        batch_size: Windows per call of the encoder.

    Raises:
        ConfigError: A value cannot work.
    """

    size: Triple
    overlap: float = 0.25
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ConfigError(f"overlap is {self.overlap}; it must lie between 0 and {MAX_OVERLAP}, such as 0.25.")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be at least 1.")

    def windows(self, shape: Triple, step: int) -> Iterator["Tile"]:
        """The windows over a scan, each with what belongs to it.

        Args:
            shape: Voxels of the scan.
            step: Voxels along each axis that windows lie a multiple apart, such as the stride of the deepest tokens.

        Raises:
            ConfigError: A window is no multiple of the step.
        """
        check_multiple(self.size, (step, step, step), "window_size")
        axes = [self._axis(voxels, edge, step) for voxels, edge in zip(shape, self.size, strict=True)]
        for x, y, z in itertools.product(*axes):
            yield Tile((x[0], y[0], z[0]), (x[1], y[1], z[1]), (x[2], y[2], z[2]))

    def _axis(self, voxels: int, edge: int, step: int) -> list[tuple[int, int, int]]:
        """First voxel of each window along an axis, and the first and last voxel (excluded) that belong to it."""
        if voxels <= edge:
            origin = -((edge - voxels) // 2)
            return [(origin, origin, origin + edge)]
        held = edge // step
        room = -(-voxels // step) - held
        count = math.ceil(room / max(1, int(held * (1 - self.overlap))))
        starts = [round(index * room / count) for index in range(count + 1)]
        cuts = [0, *((one + other + held) // 2 for one, other in itertools.pairwise(starts)), starts[-1] + held]
        parts = zip(starts, itertools.pairwise(cuts), strict=True)
        return [(start * step, first * step, last * step) for start, (first, last) in parts]


@dataclass(frozen=True)
class Tile:
    """A window over a scan.

    Attributes:
        origin: First voxel along X, Y, Z; negative where the scan is padded.
        start: First voxel that belongs to this window.
        stop: Voxel behind the last that belongs to it.
    """

    origin: Triple
    start: Triple
    stop: Triple

    @property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """First voxel and the one behind the last that belong to it, along X, Y, Z."""
        return tuple(zip(self.start, self.stop, strict=True))

    def num_tokens(self, stride: int) -> Triple:
        """Tokens that belong to it along X, Y, Z, of a feature map of a stride."""
        x, y, z = ((last - first) // stride for first, last in self.ends)
        return x, y, z

    def tokens(self, stride: int) -> tuple[slice, slice, slice]:
        """The tokens of this window that belong to it, of a feature map of a stride."""
        x, y, z = (
            slice((first - at) // stride, (last - at) // stride)
            for at, first, last in zip(self.origin, self.start, self.stop, strict=True)
        )
        return x, y, z


class Regions(Protocol):
    """Parts of a scan whose tokens are pooled."""

    @property
    def num_regions(self) -> int:
        """R."""

    def counts(self, tile: Tile, stride: int) -> tuple[Counts, Counts]:
        """How much of the tokens that belong to a window lies in each region.

        Args:
            tile: The window.
            stride: Voxels from one token to the next.

        Returns:
            ``(R, T)`` samples of each region in each token, in raster order, and their share of all samples there.
        """


@dataclass(frozen=True)
class SampledAxis:
    """Samples along an axis of a scan.

    Attributes:
        place: Place of each sample in its array.
        voxel: Voxel of the prepared scan that each sample lies in, rising.
    """

    place: Places
    voxel: Places

    @classmethod
    def between(cls, num_samples: int, sample_mm: float, num_voxels: int, voxel_mm: float) -> "SampledAxis":
        """The axis of an array and that of a scan around the same centre."""
        place = np.arange(num_samples)
        at = (place - (num_samples - 1) / 2) * (sample_mm / voxel_mm) + (num_voxels - 1) / 2
        return cls(place, np.clip(np.floor(at + 0.5), 0, num_voxels - 1).astype(np.int64))

    def within(self, first: int, last: int, stride: int) -> tuple[slice, Places]:
        """The samples whose voxels lie from ``first`` to ``last`` (excluded), and the token of each from there on."""
        low, high = np.searchsorted(self.voxel, (first, last))
        return slice(int(low), int(high)), (self.voxel[low:high] - first) // stride


@dataclass(frozen=True, eq=False)
class LabelRegions:
    """The values of an array whose samples lie in a scan, each value a region.

    Attributes:
        array: (X, Y, Z) whole numbers from 0, along RAS+ axes.
        values: Those that are regions.
        axes: Samples along X, Y, Z.
    """

    array: npt.NDArray[np.unsignedinteger]
    values: tuple[int, ...]
    axes: tuple[SampledAxis, SampledAxis, SampledAxis]

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.values)

    @cached_property
    def _row_of_value(self) -> Places:
        """Row of each value; R of those that are no region."""
        rows = np.full(1 + max(int(self.array.max(initial=0)), *self.values), self.num_regions)
        rows[list(self.values)] = np.arange(self.num_regions)
        return rows

    def counts(self, tile: Tile, stride: int) -> tuple[Counts, Counts]:
        """See :class:`Regions`."""
        sizes = tile.num_tokens(stride)
        parts, tokens = zip(
            *(axis.within(*ends, stride) for axis, ends in zip(self.axes, tile.ends, strict=True)), strict=True
        )
        token = np.ravel_multi_index(np.ix_(*tokens), sizes)
        held = self.array[np.ix_(*(axis.place[part] for axis, part in zip(self.axes, parts, strict=True)))]
        total = math.prod(sizes)
        cells = self._row_of_value[held] * total + token
        counts = np.bincount(cells.ravel(), minlength=(self.num_regions + 1) * total).reshape(-1, total)
        return _with_shares(counts[:-1], counts.sum(0))


@dataclass(frozen=True, eq=False)
class BoxRegions:
    """Boxes in an array whose samples lie in a scan; they may overlap.

    Attributes:
        boxes: (R, 3, 2) first and last sample (excluded) along X, Y, Z.
        axes: Samples along X, Y, Z.
    """

    boxes: Places
    axes: tuple[SampledAxis, SampledAxis, SampledAxis]

    @property
    def num_regions(self) -> int:
        """R."""
        return len(self.boxes)

    def counts(self, tile: Tile, stride: int) -> tuple[Counts, Counts]:
        """See :class:`Regions`."""
        along = []
        for number, (axis, ends, size) in enumerate(zip(self.axes, tile.ends, tile.num_tokens(stride), strict=True)):
            part, token = axis.within(*ends, stride)
            place = axis.place[part]
            inside = (place >= self.boxes[:, number, :1]) & (place < self.boxes[:, number, 1:])
            rows = [np.bincount(token[row], minlength=size) for row in (np.ones_like(place, dtype=bool), *inside)]
            along.append(np.stack(rows))
        counts = np.einsum("rx,ry,rz->rxyz", *along).reshape(1 + self.num_regions, -1)
        return _with_shares(counts[1:], counts[0])


def _with_shares(counts_RT: npt.NDArray[np.integer], every_T: npt.NDArray[np.integer]) -> tuple[Counts, Counts]:
    return counts_RT.astype(np.float64), counts_RT / np.maximum(every_T, 1)


def body_region(foreground: Foreground, shape: Triple) -> LabelRegions:
    """The body of a scan as one region: blocks of 4 voxels a side that are foreground by half or more; all without any.

    Args:
        foreground: Where its foreground lies.
        shape: Its voxels along X, Y, Z.
    """
    blocks = foreground.blocks if foreground.blocks.any() else np.ones_like(foreground.blocks)
    x, y, z = (SampledAxis(np.arange(size) // BOX_BLOCK, np.arange(size)) for size in shape)
    return LabelRegions(blocks.view(np.uint8), (1,), (x, y, z))


@dataclass(eq=False)
class Pooled:
    """Running sums and maxima of one feature map over regions.

    Attributes:
        weight_R: Samples of each region so far.
        sum_RD: Features, each weighted by the samples that its token holds.
        mostly_RD: Maxima over tokens of which at least half lies in the region; minus infinity without any.
        touched_RD: Maxima over all tokens that it touches.
    """

    weight_R: Counts
    sum_RD: Counts
    mostly_RD: npt.NDArray[np.float32]
    touched_RD: npt.NDArray[np.float32]

    @classmethod
    def empty(cls, num_regions: int, width: int) -> "Pooled":
        """Nothing yet."""
        low = np.full((num_regions, width), -np.inf, dtype=np.float32)
        return cls(np.zeros(num_regions), np.zeros((num_regions, width)), low, low.copy())

    def add(self, features_TD: npt.NDArray[np.float32], counts_RT: Counts, shares_RT: Counts) -> None:
        """Add the tokens of a window, with what :class:`Regions` says of them."""
        self.weight_R += counts_RT.sum(1)
        self.sum_RD += counts_RT @ features_TD.astype(np.float64)
        for row in np.flatnonzero(counts_RT.any(1)):
            touched = counts_RT[row] > 0
            mostly = shares_RT[row] >= MOSTLY
            for kept, maxima in ((touched, self.touched_RD), (mostly, self.mostly_RD)):
                np.maximum(maxima[row], features_TD[kept].max(0, initial=-np.inf), out=maxima[row])

    @property
    def mean_RD(self) -> npt.NDArray[np.float32]:
        """Means; NaN of a region without a sample."""
        with np.errstate(invalid="ignore"):
            return (self.sum_RD / self.weight_R[:, None]).astype(np.float32)

    @property
    def max_RD(self) -> npt.NDArray[np.float32]:
        """Maxima; NaN of a region without a sample."""
        found = np.where(np.isneginf(self.mostly_RD), self.touched_RD, self.mostly_RD)
        return np.where(self.weight_R[:, None] > 0, found, np.float32(np.nan)).astype(np.float32)


@torch.no_grad()
def pool_features(
    maps_of: Callable[[Tensor], Sequence[Tensor]],
    encoder: Encoder,
    scan: ScanInput,
    regions: Sequence[Regions],
    levels: Sequence[int],
    tiling: Tiling,
    *,
    on_windows: Callable[[int, int], None] | None = None,
) -> list[Pooled]:
    """Pool feature maps of a scan over regions; windows that see nothing of any region are not computed.

    Args:
        maps_of: Gives the feature maps of a batch of windows ``(B, C, X, Y, Z)``, which come on the CPU.
        encoder: The encoder, for its strides and widths.
        scan: The scan as the encoder takes it.
        regions: The regions, one after the other.
        levels: Which of the maps, from 0, finest first.
        tiling: How it is covered.
        on_windows: Called with the number of windows that are done and their number in all.

    Returns:
        For each level the pooled regions, in the order of ``regions``.
    """
    strides = [encoder.strides[level] for level in levels]
    num_regions = sum(part.num_regions for part in regions)
    pooled = [Pooled.empty(num_regions, encoder.widths[level]) for level in levels]

    def counts_of(tile: Tile, stride: int) -> tuple[Counts, Counts]:
        counts, shares = zip(*(part.counts(tile, stride) for part in regions), strict=True)
        return np.concatenate(counts), np.concatenate(shares)

    deepest = max(encoder.strides)
    tiles = [tile for tile in tiling.windows(scan.shape, deepest) if counts_of(tile, deepest)[0].any()]
    for done in range(0, len(tiles), tiling.batch_size):
        batch = tiles[done : done + tiling.batch_size]
        maps = maps_of(torch.cat([scan.crop(tile.origin, tiling.size) for tile in batch]))
        for number, tile in enumerate(batch):
            for level, stride, into in zip(levels, strides, pooled, strict=True):
                own_DXYZ = maps[level][number][(slice(None), *tile.tokens(stride))]
                into.add(own_DXYZ.flatten(1).T.float().cpu().numpy(), *counts_of(tile, stride))
        if on_windows is not None:
            on_windows(done + len(batch), len(tiles))
    return pooled
