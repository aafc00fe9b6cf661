"""Where windows lie over a scan or its body, how much each of their voxels counts, and what they cut out."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim3d.backbones.contract import check_axes
from mim3d.caching.foreground import BOX_BLOCK, Foreground
from mim3d.caching.preprocessing import CROP_MARGIN
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple

#: Largest share of a window that its neighbour may see too.
MAX_OVERLAP = 0.9

#: First and last voxel (excluded) of a box.
Box = tuple[Triple, Triple]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a scan is covered with windows.

    Attributes:
        patch_size: Voxels of a window along X, Y, Z. A smaller scan is padded.
        overlap: Least share of a window that its neighbour along an axis sees too.
        batch_size: Number of windows per call of the network.
        mirror_axes: Axes (0 X, 1 Y, 2 Z) along which windows are mirrored too, in every combination; the network's
            logits are averaged.
        body_only: Whether windows cover the body alone, see :func:`body_windows`. What no window covers is background.

    Raises:
        ConfigError: A value cannot work.
    """

    patch_size: Triple
    overlap: float = 0.5
    batch_size: int = 4
    mirror_axes: tuple[int, ...] = ()
    body_only: bool = True

    def __post_init__(self) -> None:
        # With more, the number of windows grows beyond any use: each voxel is seen by a thousand and more.
        if not 0 <= self.overlap <= MAX_OVERLAP:
            raise ConfigError(f"overlap is {self.overlap}; it must lie between 0 and {MAX_OVERLAP}, such as 0.5.")
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} of the windows must be at least 1.")
        check_axes(self.mirror_axes, "mirror_axes")

    def places(self, shape: Triple, box: Box | None = None) -> list[Triple]:
        """Return the first voxel of each window over a box of a scan, in rising order; negative where it is padded.

        Along each axis there are as many windows as MONAI's inferer lays, but evenly spaced: the first begins and the
        last ends with the box, and neighbours overlap by ``overlap`` or a little more. MONAI keeps the overlap for all
        but the last window, which then overlaps its neighbour by more than the others. Even spacing is that of nnU-Net.

        Args:
            shape: Voxels of the scan.
            box: The box to cover; all of the scan if not given. One that is smaller than a window is widened within
                the scan.
        """
        start, stop = box or ((0, 0, 0), shape)
        axes = [
            self._axis_places(size, first, last, edge)
            for size, first, last, edge in zip(shape, start, stop, self.patch_size, strict=True)
        ]
        return [(x, y, z) for x, y, z in itertools.product(*axes)]

    def _axis_places(self, size: int, start: int, stop: int, edge: int) -> list[int]:
        if size <= edge:
            return [-((edge - size) // 2)]
        room = stop - start - edge
        if room <= 0:
            return [min(max((start + stop - edge) // 2, 0), size - edge)]
        interval = max(1, int(edge * (1 - self.overlap)))
        steps = math.ceil(room / interval)
        return [start + round(index * room / steps) for index in range(steps + 1)]


def bounds_of(places: Sequence[Triple], patch_size: Triple, shape: Triple) -> Box:
    """Return the smallest box inside the scan that holds all windows."""
    start = [max(0, min(place[axis] for place in places)) for axis in range(3)]
    stop = [min(shape[axis], max(place[axis] for place in places) + patch_size[axis]) for axis in range(3)]
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def inside_of(place: Triple, patch_size: Triple, shape: Triple) -> Box:
    """Return the part of a window that lies inside the scan, in voxels of the scan."""
    start = [max(0, first) for first in place]
    stop = [min(size, first + edge) for first, edge, size in zip(place, patch_size, shape, strict=True)]
    return (start[0], start[1], start[2]), (stop[0], stop[1], stop[2])


def slices_of(box: Box, origin: Triple = (0, 0, 0)) -> tuple[slice, slice, slice]:
    """Return a box as slices of an array whose first voxel is ``origin``."""
    x, y, z = (slice(first - at, last - at) for first, last, at in zip(*box, origin, strict=True))
    return x, y, z


def body_windows(shape: Triple, foreground: Foreground, windows: Windows) -> list[Triple]:
    """Return the first voxel of each window that sees some of the body.

    The body is what ``mim3d.caching.foreground`` makes its box of: blocks of 4 voxels a side of which at least half lie
    above the threshold of foreground in some channel (-950 HU in CT; in other scans 5 % of the way from the darkest
    voxel to the 99.5th percentile), so that noise in the air and thin tables do not count. Windows are laid over the
    box around it and 8 voxels more on every side, and those that touch none of its blocks are left out. A scan with
    next to no foreground by that rule is all body.

    The scores of the windows that are left differ from those of a sweep over the whole scan, as windows lie elsewhere.

    Args:
        shape: Voxels of the scan.
        foreground: Where its foreground lies.
        windows: How it is covered.
    """
    is_body, (first, last) = foreground.blocks, foreground.box
    start = [max(0, voxel - CROP_MARGIN) for voxel in first]
    stop = [min(size, voxel + CROP_MARGIN) for voxel, size in zip(last, shape, strict=True)]
    places = windows.places(shape, ((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])))
    kept = []
    for place in places:
        inside = zip(*inside_of(place, windows.patch_size, shape), strict=True)
        if is_body[tuple(slice(low // BOX_BLOCK, -(-high // BOX_BLOCK)) for low, high in inside)].any():
            kept.append(place)
    # The box is the whole scan where no block counts.
    return kept or places


def cut_window(
    part_of: Callable[[tuple[slice, ...]], Tensor], place: Triple, size: Triple, shape: Triple, padding: Sequence[float]
) -> Tensor:
    """Cut a window ``(C, *size)`` out of a scan, padded where it reaches beyond the scan.

    Args:
        part_of: Gives a part of the scan ``(C, X, Y, Z)``, by a slice of channels and one of each axis.
        place: First voxel of the window in the scan.
        size: Voxels of the window.
        shape: Voxels of the scan.
        padding: Value of each channel beyond the scan.
    """
    inside = inside_of(place, size, shape)
    inner_CXYZ = part_of((slice(None), *slices_of(inside)))
    if tuple(inner_CXYZ.shape[1:]) == size:
        return inner_CXYZ
    window = torch.empty((len(inner_CXYZ), *size), dtype=inner_CXYZ.dtype)
    for channel, value in zip(window, padding, strict=True):
        channel.fill_(value)
    window[(slice(None), *slices_of(inside, place))] = inner_CXYZ
    return window


def window_weights(patch_size: Triple) -> Tensor:
    """Return the Gaussian weight ``(X, Y, Z)`` of each voxel of a window, an eighth of its edge wide along each axis.

    Never cut off from below, as MONAI does at a thousandth of the largest: then all windows would count alike where a
    voxel lies near the border of the scan along two axes.
    """
    x, y, z = (
        torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / (size / 8)) ** 2)
        for size in patch_size
    )
    return (x[:, None, None] * y[:, None] * z).float()
