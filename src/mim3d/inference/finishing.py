"""Finished rows of a sweep as label values and probabilities on the scan's own grid."""

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.resampling import AxisResampling
from mim3d.inference.readout import Readout
from mim3d.inference.sweep import Sweep

# Shape suffixes: K channels, X Y Z space; R rows along the sweep, U V the two axes across it.


class Outputs:
    """Label values of a scan, and probabilities where they are asked for.

    Args:
        labels_XYZ: Zeros along RAS+ axes on the scan's own grid, to be filled with label values.
        probabilities_XYZK: Array to be filled with the probability of each channel; None for none.
        readout: What the channels mean.
        has_probabilities: Whether scores that were blended are probabilities already, not logits.
    """

    def __init__(
        self,
        labels_XYZ: npt.NDArray[Any],
        probabilities_XYZK: npt.NDArray[Any] | None,
        readout: Readout,
        *,
        has_probabilities: bool,
    ) -> None:
        self.labels_XYZ = labels_XYZ
        self.probabilities_XYZK = probabilities_XYZK
        self.readout = readout
        self.has_probabilities = has_probabilities
        if probabilities_XYZK is not None:
            for channel, value in enumerate(readout.empty):
                probabilities_XYZK[..., channel] = value

    def probabilities_of(self, sums_RKUV: Tensor, weights_RUV: Tensor) -> Tensor:
        """Return probabilities ``(R, K, U, V)`` of weighted sums of scores; those of nothing where no window was."""
        tiny = torch.finfo(weights_RUV.dtype).tiny
        scores = sums_RKUV / weights_RUV.clamp_min(tiny)[:, None]
        probabilities = scores if self.has_probabilities else self.readout.activate(scores, 1)
        is_empty = weights_RUV == 0
        if bool(is_empty.any()):
            for channel, value in enumerate(self.readout.empty):
                probabilities[:, channel][is_empty] = value
        return probabilities

    def write(self, sweep: Sweep, first: int, where: tuple[slice, slice], scores_RKUV: Tensor) -> None:
        """Write rows from ``first`` on: what their scores decide, and the scores where probabilities are asked for."""
        rows = slice(first, first + len(scores_RKUV))
        decided = self.readout.decide(scores_RKUV.movedim(1, 0))
        self.labels_XYZ.transpose(sweep.order)[(rows, *where)] = decided.cpu().numpy()
        if self.probabilities_XYZK is not None:
            target = self.probabilities_XYZK.transpose(*sweep.order, 3)
            target[(rows, *where)] = scores_RKUV.movedim(1, -1).cpu().numpy()


class OnGrid:
    """Takes rows that lie on the scan's own grid already."""

    def __init__(self, sweep: Sweep, outputs: Outputs) -> None:
        self._sweep = sweep
        self._outputs = outputs
        # Sums that are all zero decide for the first class, background: voxels without a window need no look.
        self._sums_are_enough = outputs.readout.order_is_enough and outputs.probabilities_XYZK is None

    def __call__(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows; see :data:`mim3d.inference.sweep.Finish`."""
        scores = sums_RKUV if self._sums_are_enough else self._outputs.probabilities_of(sums_RKUV, weights_RUV)
        self._outputs.write(self._sweep, first, self._sweep.across, scores)

    def close(self) -> None:
        """Nothing is left to do once the last row was taken."""


class Resampled:
    """Takes rows of another spacing and interpolates their probabilities to the scan's own grid.

    Row by row across the sweep first, then along it as soon as all rows that a new row is a mean of are there; besides
    them nothing is held.

    Args:
        sweep: Where rows come from.
        outputs: What is filled, on the scan's own grid.
        axes: How the three axes are resampled, from the grid of the sweep to the scan's own.
    """

    def __init__(self, sweep: Sweep, outputs: Outputs, axes: tuple[AxisResampling, ...]) -> None:
        self._sweep = sweep
        self._outputs = outputs
        self._along = axes[sweep.axis]
        across = [(place, axes[axis]) for place, axis in enumerate(sweep.order[1:], start=1)]
        # The axis that shrinks most goes first: less work for the other.
        self._across = sorted(across, key=lambda item: item[1].zoom)
        self._where = tuple(slice(0, len(axes[axis].index)) for axis in sweep.order[1:])
        self._held: deque[Tensor] = deque()
        index, rows = self._along.index, sweep.rows
        # New rows that are a mean of rows without a window alone are background, as everything was to begin with.
        reached = np.flatnonzero(((index >= rows.start) & (index < rows.stop)).any(axis=1))
        self._next, self._stop = int(reached[0]), int(reached[-1]) + 1
        self._first_held = int(index[self._next].min())
        self._last = int(index[self._stop - 1].max())
        self._lead = rows.start - self._first_held

    def __call__(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows; see :data:`mim3d.inference.sweep.Finish`."""
        for probabilities_KUV in self._outputs.probabilities_of(sums_RKUV, weights_RUV):
            plane = self._new_plane(probabilities_KUV.device)
            plane[(slice(None), *self._sweep.across)] = probabilities_KUV
            if self._lead:
                self._take_empty(self._lead, plane.device)
                self._lead = 0
            self._take(plane)

    def close(self) -> None:
        """Write the rows that wait for rows beyond the last window."""
        missing = self._last + 1 - self._first_held - len(self._held)
        if self._next < self._stop:
            self._take_empty(missing, self._held[-1].device)

    def _new_plane(self, device: torch.device) -> Tensor:
        u, v = (self._sweep.shape[axis] for axis in self._sweep.order[1:])
        empty = torch.tensor(self._outputs.readout.empty, device=device)
        return empty[:, None, None].repeat(1, u, v)

    def _take_empty(self, count: int, device: torch.device) -> None:
        for _ in range(count):
            self._take(self._new_plane(device))

    def _take(self, plane_KUV: Tensor) -> None:
        """Take the next row of the sweep, and write every new row for which all is there."""
        for place, axis in self._across:
            plane_KUV = interpolated(plane_KUV, axis, place)
        self._held.append(plane_KUV)
        index, weight = self._along.index, self._along.weight
        while self._next < self._stop and int(index[self._next].max()) < self._first_held + len(self._held):
            row = torch.zeros_like(plane_KUV)
            for at, share in zip(index[self._next], weight[self._next], strict=True):
                if share:
                    row.add_(self._held[int(at) - self._first_held], alpha=float(share))
            u, v = self._where
            self._outputs.write(self._sweep, self._next, (u, v), row[None])
            self._next += 1
        needed = int(index[self._next].min()) if self._next < self._stop else self._first_held + len(self._held) - 1
        while self._first_held < needed and self._held:
            self._held.popleft()
            self._first_held += 1


def interpolated(plane_KUV: Tensor, axis: AxisResampling, place: int) -> Tensor:
    """Resample a plane along the axis at ``place``: ``sum_k weight[:, k] * plane[index[:, k]]``."""
    if axis.is_identity:
        return plane_KUV
    shape = [-1 if other == place else 1 for other in range(3)]
    total = None
    for index, weight in zip(axis.index.T, axis.weight.T, strict=True):
        part = plane_KUV.index_select(place, torch.from_numpy(index).to(plane_KUV.device))
        part *= torch.from_numpy(weight).to(plane_KUV.device).reshape(shape)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
