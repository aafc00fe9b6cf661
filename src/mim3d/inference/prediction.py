"""Whole scans: from files to label values on their own grid, or from the cache to logits."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.foreground import Statistics
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.caching.resampling import plan_resampling
from mim3d.core.errors import DataError
from mim3d.core.types import Triple
from mim3d.datasets.cases import Case
from mim3d.inference.finishing import OnGrid, Outputs, Resampled
from mim3d.inference.readout import Network, Readout, ensemble_of, mirrored_logits
from mim3d.inference.sweep import CHUNK_SCORES, Sweep, run_sweep
from mim3d.inference.windows import Windows, body_windows, inside_of, padded_window, slices_of
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
) -> tuple[npt.NDArray[np.integer], Grid]:
    """Segment a scan from its files.

    Logits of one network are blended and become probabilities then; of several networks the probabilities of every
    window are averaged and blended. Probabilities, not label values, are interpolated to the scan's own grid.

    Memory: the scan as stored, the label map, and scores of one window's edge of rows:
    ``4 * edge * covered voxels across * (classes + 1)`` bytes, whatever the length of the scan along its sweep
    (:meth:`mim3d.inference.sweep.Sweep.slab_bytes`), besides what a batch of windows takes and about 0.3 GiB for rows
    on their way. 512 x 512 x 1000 voxels with 14 classes and windows of 96^3: 1.5 GB of scores instead of 14.7 GB.

    Args:
        networks: The networks, in evaluation mode, on ``device``; several are an ensemble.
        case: The scan's files; a label is not read.
        readout: What the channels of the networks mean.
        preprocessing: How the scan is prepared, as in training.
        intensity: How intensities are mapped to network input, as in training.
        windows: How the scan is covered.
        device: Device that computes windows.
        probability_target: Gives the array that probabilities are written to; None for none.
        on_windows: Called with the number of windows that are done and their number in all.

    Returns:
        Label values ``(X, Y, Z)`` uint8 or int32 on the RAS+ form of the scan's own grid, and that grid.

    Raises:
        DataError: The scan cannot be used, or its scores do not fit into memory.
    """
    prepared = prepare(case, preprocessing, with_label=False)
    grid, (x, y, z) = prepared.grid, prepared.image.shape[1:]
    shape = (x, y, z)
    places = body_windows(prepared, windows) if windows.body_only else windows.places(shape)
    sweep = Sweep.over(places, windows.patch_size, shape)
    _check_memory(case, grid, sweep, readout.num_channels, device)
    dtype = readout.decide(torch.tensor(readout.empty)).numpy().dtype
    outputs = Outputs(
        np.zeros(grid.ras_shape, dtype=dtype),
        None if probability_target is None else probability_target(grid, readout.num_channels),
        readout,
        has_probabilities=len(networks) > 1,
    )
    axes = plan_resampling(shape, prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)
    is_own_grid = all(axis.is_identity for axis in axes)
    finish = OnGrid(sweep, outputs) if is_own_grid else Resampled(sweep, outputs, axes)

    def part_of(part: tuple[slice, ...]) -> Tensor:
        # The scan itself stays as it is stored.
        return torch.from_numpy(np.ascontiguousarray(intensity.apply(prepared.image[part], prepared.statistics)))

    run_sweep(
        sweep,
        windows,
        _cutter(part_of, shape, windows.patch_size, padding_values(intensity, prepared.statistics)),
        ensemble_of(networks, windows.mirror_axes, readout.activate),
        finish,
        device=device,
        on_windows=None if on_windows is None else lambda done: on_windows(done, len(places)),
    )
    finish.close()
    return outputs.labels_XYZ, grid


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

    cut = _cutter(lambda part: image_CXYZ[part].float(), shape, windows.patch_size, padding)
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


def _cutter(
    part_of: Callable[[tuple[slice, ...]], Tensor], shape: Triple, size: Triple, padding: Sequence[float]
) -> Callable[[Triple], Tensor]:
    """Return what cuts windows ``(C, *size)`` of network input out of a scan, by their first voxel.

    Args:
        part_of: Gives float32 network input of a part of the scan, a slice of channels in front.
        shape: Voxels of the scan.
        size: Voxels of a window.
        padding: Value of each channel beyond the scan.
    """

    def cut(place: Triple) -> Tensor:
        inside = inside_of(place, size, shape)
        return padded_window(part_of((slice(None), *slices_of(inside))), place, inside, size, padding)

    return cut


def _check_memory(case: Case, grid: Grid, sweep: Sweep, num_channels: int, device: torch.device) -> None:
    """Refuse a scan whose label map and scores do not fit beside it."""
    held_bytes = sweep.slab_bytes(num_channels) if device.type == "cpu" else 0
    needed_bytes = held_bytes + 4 * min(8 * CHUNK_SCORES, num_channels * math.prod(sweep.shape))
    needed_bytes += math.prod(grid.shape)
    if needed_bytes > available_memory_bytes():
        raise DataError(
            f"{case.images[0]}: the scores of {num_channels} classes on {' x '.join(map(str, sweep.shape))} voxels "
            f"need {needed_bytes / 2**30:.1f} GiB at a time, more than the memory available; use a machine with more, "
            "or fine-tune at a larger spacing_mm."
        )
