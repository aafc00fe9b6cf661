"""Whole scans: from files to label values on their own grid, or from the cache to logits.

Rows of a sweep become label values and probabilities on the scan's own grid as soon as they are finished.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.foreground import Statistics
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.caching.resampling import AxisResampling, plan_resampling
from mim3d.core.errors import TooLargeError
from mim3d.core.types import Triple
from mim3d.datasets.cases import Case
from mim3d.inference.readout import Network, Readout, ensemble_of, mirrored_logits
from mim3d.inference.sweep import CHUNK_SCORES, Sweep, run_sweep
from mim3d.inference.windows import Windows, body_windows, cut_window
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import Grid
from mim3d.scans.intensity import Intensity

# Shape suffixes: B windows, C channels, K classes, X Y Z space; R rows along the sweep, U V the two axes across it.

#: Gives, for the grid of a scan and a number of channels, an array ``(X, Y, Z, K)`` float32 along RAS+ axes to fill.
ProbabilityTarget = Callable[[Grid, int], npt.NDArray[np.float32]]


@torch.no_grad()
def predict_scan(
    networks: Sequence[Network],
    case: Case,
    *,
    readout: Readout,
    preprocessing: Preprocessing,
    intensity: Intensity,
    windows: Windows,
    device: torch.device,
    probability_target: ProbabilityTarget | None = None,
    on_windows: Callable[[int, int], None] | None = None,
    in_hu: Sequence[bool] = (),
) -> tuple[npt.NDArray[np.integer], Grid]:
    """Segment a scan from its files: read it, and do :func:`predict_prepared`.

    Args:
        networks: As for :func:`predict_prepared`, as what is not named here.
        case: The scan's files; a label is not read.
        readout: What the channels of the networks mean.
        preprocessing: How the scan is prepared, as in training.
        intensity: How intensities are mapped to network input, as in training.
        windows: How the scan is covered.
        device: Device that computes windows.
        probability_target: Gives the array that probabilities are written to; None for none.
        on_windows: Called with the number of windows that are done and their number in all.
        in_hu: For each channel whether training was on CT in HU; it decides for scans that show nothing.

    Returns:
        Label values ``(X, Y, Z)`` uint8 or int32 on the RAS+ form of the scan's own grid, and that grid.

    Raises:
        DataError: The scan cannot be used, or its scores do not fit into memory.
    """
    prepared = prepare(case, preprocessing, with_label=False, set_in_hu=in_hu)
    labels_XYZ = predict_prepared(
        networks,
        prepared,
        readout=readout,
        intensity=intensity,
        windows=windows,
        device=device,
        probability_target=probability_target,
        on_windows=on_windows,
    )
    return labels_XYZ, prepared.grid


@torch.no_grad()
def predict_prepared(
    networks: Sequence[Network],
    prepared: Prepared,
    *,
    readout: Readout,
    intensity: Intensity,
    windows: Windows,
    device: torch.device,
    probability_target: ProbabilityTarget | None = None,
    on_windows: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.integer]:
    """Segment a scan that was read.

    Logits of one network are blended and become probabilities then; of several networks the probabilities of every
    window are averaged and blended. Probabilities, not label values, are interpolated to the scan's own grid.

    Memory: the scan as stored, the label map, and scores of one window's edge of rows:
    ``4 * edge * covered voxels across * (classes + 1)`` bytes, whatever the length of the scan along its sweep
    (:meth:`mim3d.inference.sweep.Sweep.slab_bytes`), besides what a batch of windows takes and about 0.3 GiB for rows
    on their way. 512 x 512 x 1000 voxels with 14 classes and windows of 96^3: 1.5 GB of scores instead of 14.7 GB.

    Args:
        networks: The networks, in evaluation mode, on ``device``; several are an ensemble.
        prepared: The scan, without a crop to the body.
        readout: What the channels of the networks mean.
        intensity: How intensities are mapped to network input, as in training.
        windows: How the scan is covered.
        device: Device that computes windows.
        probability_target: Gives the array that probabilities are written to; None for none.
        on_windows: Called with the number of windows that are done and their number in all.

    Returns:
        Label values ``(X, Y, Z)`` uint8 or int32 on the RAS+ form of the scan's own grid.

    Raises:
        TooLargeError: The scores of the scan do not fit into memory.
    """
    grid, (x, y, z) = prepared.grid, prepared.image.shape[1:]
    shape = (x, y, z)
    places = body_windows(shape, prepared.foreground, windows) if windows.body_only else windows.places(shape)
    sweep = Sweep.over(places, windows.patch_size, shape)
    _check_memory(grid, sweep, readout.num_channels, device)
    axes = plan_resampling(shape, prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)

    def part_of(part: tuple[slice, ...]) -> Tensor:
        # The scan itself stays as it is stored.
        return torch.from_numpy(np.ascontiguousarray(intensity.apply(prepared.image[part], prepared.statistics)))

    return sweep_labels(
        networks,
        sweep,
        part_of,
        axes=axes,
        padding=padding_values(intensity, prepared.statistics),
        readout=readout,
        windows=windows,
        device=device,
        probabilities_XYZK=None if probability_target is None else probability_target(grid, readout.num_channels),
        on_windows=on_windows,
    )


@torch.no_grad()
def sweep_labels(
    networks: Sequence[Network],
    sweep: Sweep,
    part_of: Callable[[tuple[slice, ...]], Tensor],
    *,
    axes: tuple[AxisResampling, ...],
    padding: Sequence[float],
    readout: Readout,
    windows: Windows,
    device: torch.device,
    probabilities_XYZK: npt.NDArray[Any] | None = None,
    on_windows: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.integer]:
    """Return the label values ``(X, Y, Z)`` of a prepared scan on its own grid, along RAS+ axes.

    Args:
        networks: The networks, in evaluation mode, on ``device``; several are an ensemble.
        sweep: Windows over the prepared scan, in their order.
        part_of: Gives a part of the scan as network input, by a slice of channels and one of each axis.
        axes: How the three axes are resampled, from the prepared grid to the scan's own.
        padding: Network input of each channel beyond the scan.
        readout: What the channels of the networks mean.
        windows: How many windows are computed at a time, and along which axes they are mirrored.
        device: Device that computes windows.
        probabilities_XYZK: Array to be filled with the probability of each channel; None for none.
        on_windows: Called with the number of windows that are done and their number in all.
    """
    outputs = Outputs(
        sweep,
        readout,
        np.zeros([len(axis.index) for axis in axes], dtype=readout.decide(torch.tensor(readout.empty)).numpy().dtype),
        probabilities_XYZK,
        has_probabilities=len(networks) > 1,
    )
    resampled = None if all(axis.is_identity for axis in axes) else Resampled(outputs, axes)
    run_sweep(
        sweep,
        windows,
        lambda place: cut_window(part_of, place, sweep.patch_size, sweep.shape, padding),
        ensemble_of(networks, windows.mirror_axes, readout.activate),
        outputs.take if resampled is None else resampled.take,
        device=device,
        on_windows=None if on_windows is None else lambda done: on_windows(done, len(sweep.places)),
    )
    if resampled is not None:
        resampled.close()
    return outputs.labels_XYZ


@torch.no_grad()
def sliding_logits(
    network: Network,
    image_CXYZ: Tensor,
    windows: Windows,
    *,
    padding: Sequence[float],
    device: torch.device,
) -> Tensor:
    """Return the logits of a whole scan: windows blended with Gaussian weights, accumulated in float32.

    Every window is computed, ``windows.body_only`` or not.

    Args:
        network: The network, in evaluation mode, on ``device``.
        image_CXYZ: Mapped intensities, on the CPU.
        windows: How the scan is covered.
        padding: Value of each channel beyond the scan.
        device: Device that computes windows.

    Returns:
        ``(K, X, Y, Z)`` float32 on the CPU.
    """
    x, y, z = image_CXYZ.shape[1:]
    shape = (x, y, z)
    sweep = Sweep.over(windows.places(shape), windows.patch_size, shape)
    whole: Tensor | None = None

    def finish(first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        nonlocal whole
        if whole is None:
            whole = torch.empty((sums_RKUV.shape[1], *shape))
        rows = whole.permute(1 + sweep.axis, 0, *(1 + axis for axis in sweep.order[1:]))[first:]
        rows[: len(sums_RKUV)] = sums_RKUV / weights_RUV[:, None]

    def scores(window_BCXYZ: Tensor) -> Tensor:
        return mirrored_logits(network, window_BCXYZ, windows.mirror_axes).float()

    def cut(place: Triple) -> Tensor:
        return cut_window(lambda part: image_CXYZ[part].float(), place, windows.patch_size, shape, padding)

    run_sweep(sweep, windows, cut, scores, finish, device=device)
    assert whole is not None
    return whole


def scores_bytes(shape: Triple, num_classes: int) -> int:
    """Return the memory that the logits of a whole scan take on the CPU, with their probabilities and labels."""
    return 4 * math.prod(shape) * (2 * num_classes + 4)


def padding_values(intensity: Intensity, statistics: Sequence[Statistics]) -> list[float]:
    """Return what "nothing there" is in each channel, in mapped intensities."""
    lows = np.array([stats.low for stats in statistics], dtype=np.float32)
    return [float(value) for value in intensity.apply(lows[:, None, None, None], statistics).ravel()]


def _check_memory(grid: Grid, sweep: Sweep, num_channels: int, device: torch.device) -> None:
    """Refuse a scan whose label map and scores do not fit beside it."""
    held_bytes = sweep.slab_bytes(num_channels) if device.type == "cpu" else 0
    needed_bytes = held_bytes + 4 * min(8 * CHUNK_SCORES, num_channels * math.prod(sweep.shape))
    needed_bytes += math.prod(grid.shape)
    if needed_bytes > available_memory_bytes():
        raise TooLargeError(
            f"{grid.path}: the scores of {num_channels} classes on {' x '.join(map(str, sweep.shape))} voxels "
            f"need {needed_bytes / 2**30:.1f} GiB at a time, more than the memory available; use a machine with more, "
            "or fine-tune at a larger spacing_mm."
        )


@dataclass(frozen=True, eq=False)
class Outputs:
    """Label values of a scan, and probabilities where they are asked for.

    Attributes:
        sweep: The sweep that rows come from.
        readout: What the channels mean.
        labels_XYZ: Zeros along RAS+ axes on the scan's own grid, to be filled with label values.
        probabilities_XYZK: Array to be filled with the probability of each channel; None for none.
        has_probabilities: Whether scores that were blended are probabilities already, not logits.
    """

    sweep: Sweep
    readout: Readout
    labels_XYZ: npt.NDArray[Any]
    probabilities_XYZK: npt.NDArray[Any] | None
    has_probabilities: bool

    def __post_init__(self) -> None:
        if self.probabilities_XYZK is not None:
            self.probabilities_XYZK[...] = self.readout.empty

    def take(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows that lie on the scan's own grid; see :data:`mim3d.inference.sweep.Finish`."""
        scores = sums_RKUV
        # Sums that are all zero decide for the first class, background: voxels without a window need no look.
        if not self.readout.order_is_enough or self.probabilities_XYZK is not None:
            scores = self.probabilities_of(sums_RKUV, weights_RUV)
        self.write(first, self.sweep.across, scores)

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

    Row by row across the sweep first, then along it as soon as all rows that a new row is a mean of are there; besides
    them nothing is held.

    Args:
        outputs: What is filled, on the scan's own grid.
        axes: How the three axes are resampled, from the grid of the sweep to the scan's own.
    """

    def __init__(self, outputs: Outputs, axes: tuple[AxisResampling, ...]) -> None:
        sweep = outputs.sweep
        self._outputs = outputs
        self._along = axes[sweep.axis]
        across = [(place, axes[axis]) for place, axis in enumerate(sweep.order[1:], start=1)]
        # The axis that shrinks most goes first: less work for the other.
        self._across = sorted(across, key=lambda item: item[1].zoom)
        self._where = tuple(slice(0, len(axes[axis].index)) for axis in sweep.order[1:])
        index, rows = self._along.index, sweep.rows
        # New rows that are a mean of rows without a window alone are background, as everything was to begin with.
        reached = np.flatnonzero(((index >= rows.start) & (index < rows.stop)).any(axis=1))
        self._next, self._stop = int(reached[0]), int(reached[-1]) + 1
        # Rows of the sweep by their number, on the new grid across it, and a row that no window touches.
        self._held: dict[int, Tensor] = {}
        self._empty: Tensor | None = None

    def take(self, first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        """Take finished rows; see :data:`mim3d.inference.sweep.Finish`."""
        sweep = self._outputs.sweep
        shape = [sweep.shape[axis] for axis in sweep.order[1:]]
        empty_K = torch.tensor(self._outputs.readout.empty, device=sums_RKUV.device)
        empty_KUV = empty_K[:, None, None].repeat(1, *shape)
        if self._empty is None:
            self._empty = self._interpolated(empty_KUV)
        for row, probabilities_KUV in enumerate(self._outputs.probabilities_of(sums_RKUV, weights_RUV), start=first):
            plane_KUV = empty_KUV.clone()
            plane_KUV[(slice(None), *sweep.across)] = probabilities_KUV
            self._held[row] = self._interpolated(plane_KUV)
            self._write_upto(row)

    def close(self) -> None:
        """Write the rows that wait for rows beyond the last window."""
        self._write_upto(self._along.num_in)

    def _interpolated(self, plane_KUV: Tensor) -> Tensor:
        """Resample a plane across the sweep, axis by axis: ``sum_k weight[:, k] * plane[index[:, k]]``."""
        for place, axis in self._across:
            if axis.is_identity:
                continue
            shape = [-1 if other == place else 1 for other in range(3)]
            total = None
            for index, weight in zip(axis.index.T, axis.weight.T, strict=True):
                part = plane_KUV.index_select(place, torch.from_numpy(index).to(plane_KUV.device))
                part *= torch.from_numpy(weight).to(plane_KUV.device).reshape(shape)
                total = part if total is None else total.add_(part)
            assert total is not None
            plane_KUV = total
        return plane_KUV

    def _write_upto(self, row: int) -> None:
        """Write every new row that is a mean of rows up to ``row``, and forget what no later one needs."""
        index, weight = self._along.index, self._along.weight
        assert self._empty is not None
        while self._next < self._stop and index[self._next].max() <= row:
            mean_KUV = torch.zeros_like(self._empty)
            for at, share in zip(index[self._next].tolist(), weight[self._next].tolist(), strict=True):
                if share:
                    mean_KUV.add_(self._held.get(at, self._empty), alpha=share)
            self._outputs.write(self._next, self._where, mean_KUV[None])
            self._next += 1
        needed = index[self._next].min() if self._next < self._stop else row
        self._held = {at: plane_KUV for at, plane_KUV in self._held.items() if at >= needed}
