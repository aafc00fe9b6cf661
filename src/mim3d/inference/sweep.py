"""Windows blended along one axis: of a scan's scores no more is held than the rows that later windows still touch.

Rows are planes across the axis of the sweep. Windows come in rising order along it, so that once a window is reached
that begins at row ``r`` no later one touches a row before ``r``: those are handed on, and new rows take their places.
What is held is one window's edge of rows, in float32, whatever the length of the scan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mim3d.core.types import Triple
from mim3d.inference.readout import Network
from mim3d.inference.windows import Box, Windows, bounds_of, inside_of, window_weights

# Shape suffixes: B windows, C channels, K scores, X Y Z space; R rows along the sweep, U V the two axes across it.

#: Takes the finished rows from one on: weighted sums of scores ``(R, K, U, V)`` and their weights ``(R, U, V)``, which
#: are 0 where no window was. The memory of both is used again afterwards.
Finish = Callable[[int, Tensor, Tensor], None]

#: About so many scores are handed on at a time.
CHUNK_SCORES = 2**23


@dataclass(frozen=True)
class Sweep:
    """The order in which a scan is covered.

    Attributes:
        places: First voxel of each window, in the order in which they are computed.
        axis: The axis of the sweep; the one that leaves least to be held.
        box: What windows cover of the scan.
        shape: Voxels of the scan.
        patch_size: Voxels of a window.
    """

    places: tuple[Triple, ...]
    axis: int
    box: Box
    shape: Triple
    patch_size: Triple

    @classmethod
    def over(cls, places: Sequence[Triple], patch_size: Triple, shape: Triple) -> "Sweep":
        """Plan the sweep over windows, of which there is one at least."""
        box = bounds_of(places, patch_size, shape)
        sizes = [last - first for first, last in zip(*box, strict=True)]
        # A slab is the edge of a window along the sweep times what is covered along the other two axes.
        axis = min(range(3), key=lambda axis: min(patch_size[axis], sizes[axis]) / sizes[axis])
        ordered = sorted(places, key=lambda place: (place[axis], place))
        return cls(tuple(ordered), axis, box, shape, patch_size)

    @property
    def order(self) -> Triple:
        """The axes of the scan with that of the sweep first."""
        across = [axis for axis in range(3) if axis != self.axis]
        return self.axis, across[0], across[1]

    @property
    def rows(self) -> slice:
        """The rows that windows touch."""
        return slice(self.box[0][self.axis], self.box[1][self.axis])

    @property
    def across(self) -> tuple[slice, slice]:
        """What windows cover along the two other axes, of the scan."""
        u, v = (slice(self.box[0][axis], self.box[1][axis]) for axis in self.order[1:])
        return u, v

    @property
    def slab_shape(self) -> Triple:
        """Rows held at a time, and voxels across."""
        u, v = (part.stop - part.start for part in self.across)
        return min(self.patch_size[self.axis], self.rows.stop - self.rows.start), u, v

    def slab_bytes(self, num_channels: int) -> int:
        """Return the memory of the sums that are held, and of their weights."""
        return 4 * math.prod(self.slab_shape) * (num_channels + 1)


def run_sweep(
    sweep: Sweep,
    windows: Windows,
    cut: Callable[[Triple], Tensor],
    network: Network,
    finish: Finish,
    *,
    device: torch.device,
    on_windows: Callable[[int], None] | None = None,
) -> None:
    """Compute every window and hand on the rows, in order and each once, as they are finished.

    Args:
        sweep: The order.
        windows: Says how many are computed at a time.
        cut: Gives a window ``(C, X, Y, Z)`` float32 of network input by its first voxel, padded to its full size.
        network: Gives scores ``(B, K, X, Y, Z)`` float32 of a batch, on ``device``.
        finish: Takes finished rows.
        device: Device that computes windows. Scores are summed there too where they fit.
        on_windows: Called with the number of windows that are done, after each call of the network.
    """
    slab: _Slab | None = None
    weights = window_weights(sweep.patch_size).permute(sweep.order)
    for done in range(0, len(sweep.places), windows.batch_size):
        batch = sweep.places[done : done + windows.batch_size]
        scores_BKXYZ = network(torch.stack([cut(place) for place in batch]).to(device))
        if slab is None:
            num_channels = scores_BKXYZ.shape[1]
            slab = _Slab(sweep, num_channels, _place_for(sweep.slab_bytes(num_channels), device))
            weights = weights.to(slab.device).contiguous()
        for place, scores_KXYZ in zip(batch, scores_BKXYZ.to(slab.device), strict=True):
            slab.hand_on(max(0, place[sweep.axis]), finish)
            slab.add(place, scores_KXYZ.permute(1 + sweep.axis, 0, *(1 + axis for axis in sweep.order[1:])), weights)
        if on_windows is not None:
            on_windows(done + len(batch))
    assert slab is not None
    slab.hand_on(sweep.rows.stop, finish)


class _Slab:
    """Sums of scores of the rows that windows still touch; row ``r`` lies at place ``r`` modulo their number."""

    def __init__(self, sweep: Sweep, num_channels: int, device: torch.device) -> None:
        self.device = device
        self._sweep = sweep
        num_rows, u, v = sweep.slab_shape
        self._num_rows = num_rows
        self._sums_RKUV = torch.zeros((num_rows, num_channels, u, v), device=device)
        self._weights_RUV = torch.zeros((num_rows, u, v), device=device)
        self._first = sweep.rows.start

    def add(self, place: Triple, scores_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Add a window; its first row inside the scan must be the first that is held, or a later one that fits."""
        inside = inside_of(place, self._sweep.patch_size, self._sweep.shape)
        order, (rows_at, u_at, v_at) = self._sweep.order, (self._sweep.rows, *self._sweep.across)
        (first, last), *across = ((inside[0][axis], inside[1][axis]) for axis in order)
        where = [
            slice(start - at.start, stop - at.start) for (start, stop), at in zip(across, (u_at, v_at), strict=True)
        ]
        part = [
            slice(start - place[axis], stop - place[axis])
            for axis, (start, stop) in zip(order[1:], across, strict=True)
        ]
        for start, stop, at in self._pieces(first - rows_at.start, last - rows_at.start):
            offset = rows_at.start + start - place[order[0]]
            rows = slice(offset, offset + stop - start)
            held = slice(at, at + stop - start)
            weight = weights_RUV[(rows, *part)]
            self._sums_RKUV[(held, slice(None), *where)].addcmul_(
                scores_RKUV[(rows, slice(None), *part)], weight[:, None]
            )
            self._weights_RUV[(held, *where)] += weight

    def hand_on(self, upto: int, finish: Finish) -> None:
        """Hand on all rows before row ``upto`` of the scan, and make their places free."""
        origin = self._sweep.rows.start
        chunk = max(1, CHUNK_SCORES // self._sums_RKUV[0].numel())
        while self._first < upto:
            stop = min(upto, self._first + chunk)
            for start, end, at in self._pieces(self._first - origin, stop - origin):
                held = slice(at, at + end - start)
                finish(origin + start, self._sums_RKUV[held], self._weights_RUV[held])
                self._sums_RKUV[held].zero_()
                self._weights_RUV[held].zero_()
            self._first = stop

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield rows that lie next to each other in memory: first, last (excluded), and the place of the first."""
        while start < stop:
            at = start % self._num_rows
            end = min(stop, start + self._num_rows - at)
            yield start, end, at
            start = end


def _place_for(size_bytes: int, device: torch.device) -> torch.device:
    """Return the device itself, or the CPU where scores of this size would take more than half of a GPU's rest."""
    if device.type == "cuda" and 2 * size_bytes > torch.cuda.mem_get_info(device)[0]:
        return torch.device("cpu")
    return device
