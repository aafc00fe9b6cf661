"""From a scan to label values on its own grid: sliding windows, mirroring, and the way back."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mim3d.data.cases import Case
from mim3d.data.files import available_memory_bytes
from mim3d.data.preprocessing import Prepared, Preprocessing, Statistics, prepare, restore
from mim3d.data.transforms import Intensity
from mim3d.data.volumes import Grid
from mim3d.errors import ConfigError, DataError
from mim3d.types import Triple

# Shape suffixes: B windows, C channels, K classes, X Y Z space.

#: Maps windows ``(B, C, X, Y, Z)`` to logits ``(B, K, X, Y, Z)``.
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a scan is covered with windows.

    Attributes:
        patch_size: voxels of a window; a smaller scan is padded.
        overlap: share of a window that its neighbour along an axis sees too.
        batch_size: windows per call of the network.
        mirror_axes: axes (0 X, 1 Y, 2 Z) along which windows are mirrored too, in every combination; the
            network's logits are averaged.
    Raises:
        ConfigError: for a value that cannot work.
    """

    patch_size: Triple
    overlap: float = 0.5
    batch_size: int = 4
    mirror_axes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap is {self.overlap}; it must lie between 0 and 1 (1 excluded), such as 0.5.")
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} of the windows must be at least 1.")
        if not set(self.mirror_axes) <= {0, 1, 2}:
            raise ConfigError(f"mirror_axes {list(self.mirror_axes)} must name axes among 0 (X), 1 (Y) and 2 (Z).")

    def count(self, shape: Triple) -> int:
        """Windows that cover a scan of ``shape`` voxels."""
        steps = []
        for voxels, size in zip(shape, self.patch_size, strict=True):
            interval = max(1, int(size * (1 - self.overlap)))
            steps.append(max(0, math.ceil((voxels - size) / interval)) + 1)
        return math.prod(steps)


@torch.no_grad()
def sliding_logits(
    network: Network,
    image_CXYZ: Tensor,
    windows: Windows,
    *,
    padding: Sequence[float],
    device: torch.device,
    on_windows: Callable[[int], None] | None = None,
) -> Tensor:
    """Logits of a whole scan: windows blended with Gaussian weights, accumulated in float32 on the CPU.

    Args:
        network: in evaluation mode, on ``device``.
        image_CXYZ: mapped intensities, on the CPU.
        windows: how the scan is covered.
        padding: value of each channel beyond the scan.
        device: where windows are computed.
        on_windows: told how many windows are done, after each call of the network.
    Returns:
        ``(K, X, Y, Z)`` float32 on the CPU.
    """
    from monai.inferers.utils import sliding_window_inference

    done = 0

    def predict(window_BCXYZ: Tensor) -> Tensor:
        nonlocal done
        logits = mirrored_logits(network, window_BCXYZ, windows.mirror_axes).float()
        done += len(window_BCXYZ)
        if on_windows is not None:
            on_windows(done)
        return logits

    shape = image_CXYZ.shape[1:]
    padded, inside = pad_to(image_CXYZ, windows.patch_size, padding)
    logits = sliding_window_inference(
        padded[None].float(),
        roi_size=windows.patch_size,
        sw_batch_size=windows.batch_size,
        predictor=predict,
        overlap=windows.overlap,
        roi_weight_map=window_weights(windows.patch_size).to(device),
        sw_device=device,
        device=torch.device("cpu"),
    )
    assert isinstance(logits, Tensor)
    cropped = logits[0][(slice(None), *inside)]
    assert cropped.shape[1:] == shape
    return cropped


def window_weights(patch_size: Triple) -> Tensor:
    """Gaussian weight ``(X, Y, Z)`` of each voxel of a window, an eighth of its edge wide along each axis.

    Never cut off from below, as MONAI does at a thousandth of the largest: then all windows would count alike where a
    voxel lies near the border of the scan along two axes.
    """
    x, y, z = (
        torch.exp(-0.5 * ((torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / (size / 8)) ** 2)
        for size in patch_size
    )
    return (x[:, None, None] * y[:, None] * z).float()


def mirrored_logits(network: Network, window_BCXYZ: Tensor, mirror_axes: Sequence[int]) -> Tensor:
    """Mean logits over every combination of mirrored axes, each turned back."""
    logits = network(window_BCXYZ)
    combinations = [
        [axis + 2 for axis in axes]
        for number in range(1, len(mirror_axes) + 1)
        for axes in itertools.combinations(mirror_axes, number)
    ]
    for axes in combinations:
        logits = logits + network(window_BCXYZ.flip(axes)).flip(axes)
    return logits / (1 + len(combinations))


def pad_to(image_CXYZ: Tensor, size: Triple, padding: Sequence[float]) -> tuple[Tensor, tuple[slice, slice, slice]]:
    """Pad evenly on both sides up to ``size``; also the slices that hold the image itself."""
    shape = tuple(image_CXYZ.shape[1:])
    x, y, z = (
        slice(max(0, want - have) // 2, max(0, want - have) // 2 + have) for have, want in zip(shape, size, strict=True)
    )
    padded_shape = [max(have, want) for have, want in zip(shape, size, strict=True)]
    if padded_shape == list(shape):
        return image_CXYZ, (x, y, z)
    padded = torch.empty((len(image_CXYZ), *padded_shape), dtype=image_CXYZ.dtype)
    for channel, value in zip(padded, padding, strict=True):
        channel.fill_(value)
    padded[:, x, y, z] = image_CXYZ
    return padded, (x, y, z)


def padding_values(intensity: Intensity, statistics: Sequence[Statistics]) -> list[float]:
    """What "nothing there" is in each channel, in mapped intensities."""
    lows = np.array([stats.low for stats in statistics], dtype=np.float32)
    return [float(value) for value in intensity.apply(lows[:, None, None, None], statistics).ravel()]


def predict_scan(
    network: Network,
    case: Case,
    *,
    num_classes: int,
    preprocessing: Preprocessing,
    intensity: Intensity,
    windows: Windows,
    device: torch.device,
    on_windows: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, Grid]:
    """Segment a scan from its files.

    Args:
        network: in evaluation mode, on ``device``.
        case: the scan's files; a label is not read.
        num_classes: classes the network tells apart.
        preprocessing: as in training.
        intensity: as in training.
        windows: how the scan is covered.
        device: where windows are computed.
        on_windows: told the windows done and their number.
    Returns:
        Class indices ``(X, Y, Z)`` uint8 or uint16 on the RAS+ form of the scan's own grid, and that grid.
    Raises:
        DataError: when the scan cannot be used, or its scores do not fit into memory.
    """
    prepared = prepare(case, preprocessing, with_label=False)
    shape = prepared.image.shape[1:]
    _check_memory(case, (shape[0], shape[1], shape[2]), num_classes)
    total = windows.count((shape[0], shape[1], shape[2]))
    logits = sliding_logits(
        network,
        torch.from_numpy(intensity.apply(prepared.image, prepared.statistics)),
        windows,
        padding=padding_values(intensity, prepared.statistics),
        device=device,
        on_windows=None if on_windows is None else lambda done: on_windows(done, total),
    )
    return best_class_on_grid(logits, prepared), prepared.grid


def best_class_on_grid(logits_KXYZ: Tensor, prepared: Prepared) -> np.ndarray:
    """The most probable class per voxel of the scan's own grid.

    Probabilities, not label values, are interpolated to the grid, one class at a time: exact, and no more than two
    volumes of the scan's own size are held besides the probabilities. Equal probabilities go to the lower class.
    """
    num_classes = len(logits_KXYZ)
    probabilities = torch.softmax(logits_KXYZ, dim=0).numpy()
    best = restore(probabilities[:1], prepared)[0]
    classes = np.zeros(best.shape, dtype=np.uint8 if num_classes <= 256 else np.uint16)
    for index in range(1, num_classes):
        scores = restore(probabilities[index : index + 1], prepared)[0]
        better = scores > best
        classes[better] = index
        np.maximum(best, scores, out=best)
    return classes


def scores_bytes(shape: Triple, num_classes: int) -> int:
    """Memory that the scores of a whole scan take on the CPU, with what is made of them."""
    return 4 * math.prod(shape) * (2 * num_classes + 4)


def _check_memory(case: Case, shape: Triple, num_classes: int) -> None:
    needed_bytes = scores_bytes(shape, num_classes)
    if needed_bytes > available_memory_bytes():
        raise DataError(
            f"{case.images[0]}: the scores of {num_classes} classes on {' x '.join(map(str, shape))} voxels "
            f"need {needed_bytes / 2**30:.1f} GiB, more than the memory available; use a machine with more, or "
            "fine-tune at a larger spacing_mm."
        )
