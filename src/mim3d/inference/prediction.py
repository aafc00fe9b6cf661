"""A scan from its files to label values on its own grid."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.caching.foreground import Statistics
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.caching.resampling import plan_resampling
from mim3d.core.errors import DataError
from mim3d.core.types import Triple
from mim3d.datasets.cases import Case
from mim3d.inference.body import body_windows
from mim3d.inference.finishing import OnGrid, Outputs, Resampled
from mim3d.inference.networks import Network, ensemble_of
from mim3d.inference.readout import Readout
from mim3d.inference.sweep import CHUNK_SCORES, Sweep, run_sweep
from mim3d.inference.windows import Windows, inside_of, padded_window, slices_of
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import Grid
from mim3d.scans.intensity import Intensity

#: Told the grid of a scan and the number of channels, gives an array ``(X, Y, Z, K)`` float32 along RAS+ axes to fill.
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
        networks: in evaluation mode, on ``device``; several are an ensemble.
        case: the scan's files; a label is not read.
        readout: what the channels of the networks mean.
        preprocessing: as in training.
        intensity: as in training.
        windows: how the scan is covered.
        device: where windows are computed.
        probability_target: gives the array that probabilities are written to; None for none.
        on_windows: told the windows done and their number.
    Returns:
        Label values ``(X, Y, Z)`` uint8 or int32 on the RAS+ form of the scan's own grid, and that grid.
    Raises:
        DataError: when the scan cannot be used, or its scores do not fit into memory.
    """
    prepared = prepare(case, preprocessing, with_label=False)
    shape = _shape_of(prepared)
    places = body_windows(prepared, windows) if windows.body_only else windows.places(shape)
    sweep = Sweep.over(places, windows.patch_size, shape)
    _check_memory(case, prepared.grid, sweep, readout.num_channels, device)
    dtype = readout.decide(torch.tensor(readout.empty)).numpy().dtype
    outputs = Outputs(
        np.zeros(prepared.grid.ras_shape, dtype=dtype),
        None if probability_target is None else probability_target(prepared.grid, readout.num_channels),
        readout,
        has_probabilities=len(networks) > 1,
    )
    finish = _finish(prepared, sweep, outputs)
    run_sweep(
        sweep,
        windows,
        _cutter(prepared, intensity, windows.patch_size),
        ensemble_of(networks, windows.mirror_axes, readout.activate),
        finish,
        device=device,
        on_windows=None if on_windows is None else lambda done: on_windows(done, len(places)),
    )
    finish.close()
    return outputs.labels_XYZ, prepared.grid


def padding_values(intensity: Intensity, statistics: Sequence[Statistics]) -> list[float]:
    """What "nothing there" is in each channel, in mapped intensities."""
    lows = np.array([stats.low for stats in statistics], dtype=np.float32)
    return [float(value) for value in intensity.apply(lows[:, None, None, None], statistics).ravel()]


def _finish(prepared: Prepared, sweep: Sweep, outputs: Outputs) -> OnGrid | Resampled:
    grid = prepared.grid
    axes = plan_resampling(_shape_of(prepared), prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)
    if all(axis.is_identity for axis in axes):
        return OnGrid(sweep, outputs)
    return Resampled(sweep, outputs, axes)


def _cutter(prepared: Prepared, intensity: Intensity, size: Triple) -> Callable[[Triple], Tensor]:
    """Cuts windows of network input; the scan itself stays as it is stored."""
    padding = padding_values(intensity, prepared.statistics)
    shape = _shape_of(prepared)

    def cut(place: Triple) -> Tensor:
        inside = inside_of(place, size, shape)
        stored = prepared.image[(slice(None), *slices_of(inside))]
        mapped = torch.from_numpy(np.ascontiguousarray(intensity.apply(stored, prepared.statistics)))
        return padded_window(mapped, place, inside, size, padding)

    return cut


def _shape_of(prepared: Prepared) -> Triple:
    x, y, z = prepared.image.shape[1:]
    return x, y, z


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
