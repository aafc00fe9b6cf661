"""Whole scans: from files to label values on their own grid, or from the cache to logits.

Rows of a sweep become label values and probabilities on the scan's own grid as soon as they are finished.
"""

import math
from collections.abc import Callable, Sequence
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
from mim3d.inference.outputs import Outputs, Resampled
from mim3d.inference.readout import HeadedNetwork, Network, Readout, ensemble_of, mirrored_logits
from mim3d.inference.sweep import CHUNK_SCORES, Sweep, run_sweep
from mim3d.inference.windows import Windows, body_windows, cut_window
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import Grid
from mim3d.scans.intensity import Intensity

# Shape suffixes: B windows, C channels, K classes, X Y Z space; R rows along the sweep, U V the two axes across it.

#: Where the scores that are held of one network would take more, its features are held in their place.
MOST_SCORE_BYTES = 2**31

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
    Where the scores of one network would take more than 2 GiB, the features of its last layer are held in their place
    (:func:`blended_by_features`): with 139 classes and 16 features 1.3 GB instead of 11 GB.

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
    head = blended_by_features(networks, sweep)
    num_held = readout.num_channels if head is None else head.num_features
    _check_memory(grid, sweep, readout.num_channels, num_held, device)
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
    head = blended_by_features(networks, sweep)
    outputs = Outputs(
        sweep,
        readout,
        np.zeros([len(axis.index) for axis in axes], dtype=readout.decide(torch.tensor(readout.empty)).numpy().dtype),
        probabilities_XYZK,
        has_probabilities=len(networks) > 1,
        head=head,
    )
    resampled = None if all(axis.is_identity for axis in axes) else Resampled(outputs, axes)
    run_sweep(
        sweep,
        windows,
        lambda place: cut_window(part_of, place, sweep.patch_size, sweep.shape, padding),
        ensemble_of(networks if head is None else [head.features], windows.mirror_axes, readout.activate),
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


def blended_by_features(networks: Sequence[Network], sweep: Sweep) -> HeadedNetwork | None:
    """Return the network whose features are blended in the place of its logits; None where logits are.

    The last layer is linear and sees one voxel at a time: of blended features it makes the blended logits, but for
    rounding. That is done where the logits are more than the features and take much memory, and for a single network,
    as the probabilities of several are not linear.
    """
    if len(networks) != 1 or not isinstance(networks[0], HeadedNetwork):
        return None
    network, (num_scores, num_features) = networks[0], networks[0].weight_KF.shape
    is_large = sweep.slab_bytes(num_scores) > MOST_SCORE_BYTES
    return network if is_large and num_features < num_scores else None


def _check_memory(grid: Grid, sweep: Sweep, num_channels: int, num_held: int, device: torch.device) -> None:
    """Refuse a scan whose label map and scores do not fit beside it."""
    held_bytes = sweep.slab_bytes(num_held) if device.type == "cpu" else 0
    needed_bytes = held_bytes + 4 * min(8 * CHUNK_SCORES, num_channels * math.prod(sweep.shape))
    needed_bytes += math.prod(grid.shape)
    if needed_bytes > available_memory_bytes():
        raise TooLargeError(
            f"{grid.path}: the scores of {num_channels} classes on {' x '.join(map(str, sweep.shape))} voxels "
            f"need {needed_bytes / 2**30:.1f} GiB at a time, more than the memory available; use a machine with more, "
            "or fine-tune at a larger spacing_mm."
        )
