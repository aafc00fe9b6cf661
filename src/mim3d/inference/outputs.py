"""Finished rows of a sweep become label values and probabilities on the scan's own grid."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.resampling import AxisResampling
from mim3d.inference.readout import HeadedNetwork, Readout, most_probable
from mim3d.inference.sweep import Sweep

# Shape suffixes: F features of the last layer, K classes, X Y Z space; R rows along the sweep, U V the axes across it.

#: On a CPU the last layer is computed for about so many voxels at a time: what it gives stays in the cache.
_HEAD_VOXELS = 2048

#: Probabilities of rows that wait for others are about so many at most, besides what one new row needs.
_HELD_SCORES = 2**26

#: Voxels along each axis of the tiles that a CPU interpolates, and of those of other devices.
_TILE, _LARGE_TILE = (16, 32, 32), (64, 256, 256)

#: A class is left out of a tile where its probability stays below the winner's by more than rounding can make up.
_MARGIN = 1e-4


@dataclass(frozen=True, eq=False)
class Outputs:
    """Label values of a scan, and probabilities where they are asked for.

    Attributes:
        sweep: The sweep that rows come from.
        readout: What the channels mean.
        labels_XYZ: Zeros along RAS+ axes on the scan's own grid, to be filled with label values.
        probabilities_XYZK: Array to be filled with the probability of each channel; None for none.
        has_probabilities: Whether scores that were blended are probabilities already, not logits.
        head: The network whose features were blended in the place of its logits; None where logits were.
    """

    sweep: Sweep
    readout: Readout
    labels_XYZ: npt.NDArray[Any]
    probabilities_XYZK: npt.NDArray[Any] | None
    has_probabilities: bool
    head: HeadedNetwork | None = None

    def __post_init__(self) -> None:
        if self.probabilities_XYZK is not None:
            self.probabilities_XYZK[...] = self.readout.empty

    def take(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows that lie on the scan's own grid; see :data:`mim3d.inference.sweep.Finish`."""
        u, v = self.sweep.across
        for row, lines, sums, weights in self.parts_of(sums_RKUV, weights_RUV):
            scores = sums
            # Sums that are all zero decide for the first class, background: voxels without a window need no look.
            if not self.readout.order_is_enough or self.probabilities_XYZK is not None:
                scores = self.probabilities_of(sums, weights)
            self.write(first + row, (slice(u.start + lines.start, u.start + lines.stop), v), scores)

    def parts_of(self, sums_RXUV: Tensor, weights_RUV: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Rows as weighted sums of scores: all at once, or in parts where the last layer is computed only now.

        Yields:
            The first row, counted from the first of these; the lines along U; sums ``(R, K, u, V)`` and weights.
        """
        num_rows, num_lines, num_voxels = weights_RUV.shape
        if self.head is None:
            yield 0, slice(0, num_lines), sums_RXUV, weights_RUV
            return
        step = num_lines if weights_RUV.device.type != "cpu" else max(1, _HEAD_VOXELS // num_voxels)
        for row, start in itertools.product(range(num_rows), range(0, num_lines, step)):
            lines = slice(start, min(start + step, num_lines))
            weights = weights_RUV[row, lines]
            sums_NK = self.head.summed_logits(sums_RXUV[row, :, lines].flatten(1), weights.flatten())
            yield row, lines, sums_NK.view(*weights.shape, -1).movedim(-1, 0)[None], weights[None]

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

    def write(self, first: int, where: tuple[slice, ...], scores_RKUV: Tensor) -> None:
        """Write rows from ``first`` on: what their scores decide, and the scores where probabilities are asked for."""
        rows = slice(first, first + len(scores_RKUV))
        decided = self.readout.decide(scores_RKUV.movedim(1, 0))
        self.labels_XYZ.transpose(self.sweep.order)[(rows, *where)] = decided.cpu().numpy()
        if self.probabilities_XYZK is not None:
            target = self.probabilities_XYZK.transpose(*self.sweep.order, 3)
            target[(rows, *where)] = scores_RKUV.movedim(1, -1).cpu().numpy()


class Resampled:
    """Takes rows of another spacing and interpolates their probabilities to the scan's own grid.

    New rows are made tile by tile, across the sweep first and then along it, as soon as all rows that they are a mean
    of are there; besides them nothing is held. In each tile the classes are left out that cannot be the most probable
    anywhere in it, whatever the weights of the interpolation: of a hundred classes a few are left in most tiles.

    Args:
        outputs: What is filled, on the scan's own grid.
        axes: How the three axes are resampled, from the grid of the sweep to the scan's own.
    """

    def __init__(self, outputs: Outputs, axes: tuple[AxisResampling, ...]) -> None:
        sweep = outputs.sweep
        self._outputs = outputs
        self._along, *across = (axes[axis] for axis in sweep.order)
        self._axes = tuple(across)
        index, rows = self._along.index, sweep.rows
        # New rows that are a mean of rows without a window alone are background, as everything was to begin with.
        reached = np.flatnonzero(((index >= rows.start) & (index < rows.stop)).any(axis=1))
        self._next, self._stop = int(reached[0]), int(reached[-1]) + 1
        self._plane_shape = [sweep.shape[axis] for axis in sweep.order[1:]]
        # Rows of the sweep by their number, (U, V, K), and a row that no window touches.
        self._held: dict[int, Tensor] = {}
        self._empty_K = torch.tensor(outputs.readout.empty)
        num_held = _HELD_SCORES // (self._plane_shape[0] * self._plane_shape[1] * len(self._empty_K))
        num_new = int((num_held - index.shape[1]) * self._along.zoom)
        self._num_rows = min(max(1, num_new), _TILE[0])

    def take(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows; see :data:`mim3d.inference.sweep.Finish`."""
        outputs, (u, v) = self._outputs, self._outputs.sweep.across
        self._empty_K = self._empty_K.to(sums_RKUV.device)
        for row, lines, sums, weights in outputs.parts_of(sums_RKUV, weights_RUV):
            where = slice(u.start + lines.start, u.start + lines.stop), v
            for place, probabilities_KUV in enumerate(outputs.probabilities_of(sums, weights), start=first + row):
                if place not in self._held:
                    self._held[place] = self._empty_K.repeat(*self._plane_shape, 1)
                self._held[place][where] = probabilities_KUV.movedim(0, -1)
                if where[0].stop == u.stop:
                    self._write_upto(place)

    def close(self) -> None:
        """Write the rows that wait for rows beyond the last window."""
        self._write_upto(self._along.num_in, is_last=True)

    def _write_upto(self, row: int, *, is_last: bool = False) -> None:
        """Write new rows that are means of rows up to ``row``, several at a time; forget what no later one needs."""
        index = self._along.index
        while self._next < self._stop:
            rows = slice(self._next, min(self._next + self._num_rows, self._stop))
            if not is_last and index[rows].max() > row:
                break
            self._write(rows)
            self._next = rows.stop
        needed = index[self._next].min() if self._next < self._stop else row
        self._held = {at: plane for at, plane in self._held.items() if at >= needed}

    def _write(self, rows: slice) -> None:
        """Write new rows, tile by tile."""
        along, planes = _part(self._along, rows)
        empty_UVK = self._empty_K.expand(*self._plane_shape, -1)
        held = [self._held.get(place, empty_UVK) for place in range(planes.start, planes.stop)]
        tile = _TILE if self._empty_K.device.type == "cpu" else _LARGE_TILE
        starts = (range(0, len(axis.index), edge) for axis, edge in zip(self._axes, tile[1:], strict=True))
        for corner in itertools.product(*starts):
            where = tuple(
                slice(start, min(start + edge, len(axis.index)))
                for start, edge, axis in zip(corner, tile[1:], self._axes, strict=True)
            )
            axes, regions = zip(*(_part(axis, part) for axis, part in zip(self._axes, where, strict=True)), strict=True)
            region_RUVK = torch.stack([plane[regions] for plane in held])
            self._write_tile(rows, where, region_RUVK, (along, *axes))

    def _write_tile(
        self, rows: slice, where: tuple[slice, ...], region_RUVK: Tensor, axes: tuple[AxisResampling, ...]
    ) -> None:
        outputs, values = self._outputs, self._outputs.readout.values
        if values is None or outputs.probabilities_XYZK is not None:
            outputs.write(rows.start, where, interpolated(region_RUVK, axes).movedim(-1, 1))
            return
        channels = possible_winners(region_RUVK)
        place = channels[:1]
        if len(channels) > 1:
            place = channels[most_probable(interpolated(region_RUVK[..., channels], axes).movedim(-1, 0))]
        target = outputs.labels_XYZ.transpose(outputs.sweep.order)
        target[(rows, *where)] = values.to(place.device)[place].cpu().numpy()


def possible_winners(probabilities_RUVK: Tensor) -> Tensor:
    """Return the channels, in rising order, that may be the most probable in some weighted mean of voxels.

    Probabilities of a voxel sum to 1. A mean of a channel lies between its least and its greatest probability. So the
    winner's is at least the greatest of all leasts; and with the greatest of all channels but ``n`` summing to ``s``,
    those ``n`` share at least ``1 - s``, of which one has an n-th part or more.
    """
    voxels_NK = probabilities_RUVK.flatten(0, -2)
    greatest_K = voxels_NK.amax(0)
    ordered = greatest_K.sort(descending=True).values
    shares = (1 - (ordered.sum() - ordered.cumsum(0))) / torch.arange(1, len(ordered) + 1, device=ordered.device)
    least = torch.maximum(voxels_NK.amin(0).max(), shares.max())
    return (greatest_K >= least - _MARGIN).nonzero()[:, 0]


def interpolated(region_RUVK: Tensor, axes: tuple[AxisResampling, ...]) -> Tensor:
    """Resample a region across the sweep, axis by axis, and then along it: ``sum_k weight[k] * region[index[k]]``.

    Args:
        region_RUVK: Rows of the sweep, ``(R, U, V, K)``.
        axes: How its three axes are resampled.
    """
    along, *across = axes
    # The axis that shrinks most goes first: less work for the other.
    for place, axis in sorted(enumerate(across, start=1), key=lambda item: item[1].zoom):
        if axis.is_identity:
            continue
        shape = [-1 if other == place else 1 for other in range(4)]
        total = None
        for index, weight in zip(axis.index.T, axis.weight.T, strict=True):
            part = region_RUVK.index_select(place, torch.from_numpy(index).to(region_RUVK.device))
            part *= torch.from_numpy(weight).to(region_RUVK.device).reshape(shape)
            total = part if total is None else total.add_(part)
        assert total is not None
        region_RUVK = total
    means = region_RUVK.new_zeros((len(along.index), *region_RUVK.shape[1:]))
    for mean, index, weight in zip(means, along.index.tolist(), along.weight.tolist(), strict=True):
        for at, share in zip(index, weight, strict=True):
            if share:
                mean.add_(region_RUVK[at], alpha=share)
    return means


def _part(axis: AxisResampling, part: slice) -> tuple[AxisResampling, slice]:
    """The part of an axis that gives some output voxels, and the input voxels that it needs."""
    index = axis.index[part]
    low, high = int(index.min()), int(index.max()) + 1
    if axis.is_identity:
        size = high - low
        return replace(axis, index=np.arange(size)[:, None], weight=axis.weight[part], num_in=size), slice(low, high)
    return AxisResampling(index - low, axis.weight[part], high - low, axis.zoom), slice(low, high)
