"""Logits of a whole scan at once, for scans that are small or scored on the grid of a cache."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mim3d.core.types import Triple
from mim3d.inference.networks import Network, mirrored_logits
from mim3d.inference.sweep import Sweep, run_sweep
from mim3d.inference.windows import Windows, inside_of, padded_window, slices_of

# Shape suffixes: B windows, C channels, K classes, X Y Z space; R rows along the sweep, U V the two axes across it.


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
    """Logits of a whole scan: windows blended with Gaussian weights, accumulated in float32.

    Every window is computed, ``windows.body_only`` or not.

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
    x, y, z = image_CXYZ.shape[1:]
    shape, size = (x, y, z), windows.patch_size
    sweep = Sweep.over(windows.places(shape), size, shape)
    whole: Tensor | None = None

    def cut(place: Triple) -> Tensor:
        inside = inside_of(place, size, shape)
        return padded_window(image_CXYZ[(slice(None), *slices_of(inside))].float(), place, inside, size, padding)

    def finish(first: int, sums_RKUV: Tensor, weights_RUV: Tensor) -> None:
        nonlocal whole
        if whole is None:
            whole = torch.empty((sums_RKUV.shape[1], *shape))
        rows = whole.permute(1 + sweep.axis, 0, *(1 + axis for axis in sweep.order[1:]))[first:]
        rows[: len(sums_RKUV)] = sums_RKUV / weights_RUV[:, None]

    def scores(window_BCXYZ: Tensor) -> Tensor:
        return mirrored_logits(network, window_BCXYZ, windows.mirror_axes).float()

    run_sweep(sweep, windows, cut, scores, finish, device=device, on_windows=on_windows)
    assert whole is not None
    return whole


def scores_bytes(shape: Triple, num_classes: int) -> int:
    """Memory that the logits of a whole scan take on the CPU, with what is made of them."""
    return 4 * math.prod(shape) * (2 * num_classes + 4)
