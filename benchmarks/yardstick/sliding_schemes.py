"""Sliding windows over a whole scan as others do it: MONAI's inferer, and the scheme that nnU-Net publishes."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from mim3d.core.types import Triple
from mim3d.inference import Network, Windows


def monai_labels(network: Network, image_CXYZ: Tensor, windows: Windows) -> np.ndarray:
    """Classes by ``SlidingWindowInferer`` with MONAI's own Gaussian weights, logits of the scan in float32."""
    from monai.inferers.inferer import SlidingWindowInferer

    inferer = SlidingWindowInferer(
        roi_size=windows.patch_size, sw_batch_size=windows.batch_size, overlap=windows.overlap, mode="gaussian"
    )
    logits = inferer(image_CXYZ[None], network)
    assert isinstance(logits, Tensor)
    return torch.softmax(logits[0], 0).argmax(0).to(torch.uint8).cpu().numpy()


def nnunet_labels(network: Network, image_CXYZ: Tensor, windows: Windows, dtype: torch.dtype) -> np.ndarray:
    """Classes by the scheme of nnU-Net (Isensee et al., Nature Methods 2021; version 2 of its code), window by window.

    Steps of half a window, evenly spaced; an importance map that is a filtered impulse of an eighth of a window, its
    largest value 10 and no value 0; logits and weights of the whole scan in one type, float16 as published; one
    division, softmax and argmax at the end. Without mirroring.
    """
    shape = tuple(image_CXYZ.shape[1:])
    importance = torch.from_numpy(importance_map(windows.patch_size)).to(image_CXYZ.device, dtype)
    logits_KXYZ: Tensor | None = None
    weights_XYZ = torch.zeros(shape, dtype=dtype, device=image_CXYZ.device)
    steps = [nnunet_steps(size, edge) for size, edge in zip(shape, windows.patch_size, strict=True)]
    for place in itertools.product(*steps):
        box = tuple(slice(first, first + edge) for first, edge in zip(place, windows.patch_size, strict=True))
        scores_KXYZ = network(image_CXYZ[(slice(None), *box)][None])[0].to(dtype)
        scores_KXYZ *= importance
        if logits_KXYZ is None:
            logits_KXYZ = torch.zeros((len(scores_KXYZ), *shape), dtype=dtype, device=image_CXYZ.device)
        logits_KXYZ[(slice(None), *box)] += scores_KXYZ
        weights_XYZ[box] += importance
    assert logits_KXYZ is not None
    logits_KXYZ /= weights_XYZ
    if torch.any(torch.isinf(logits_KXYZ)):
        raise ValueError("the sums of logits overflow this type")
    return torch.softmax(logits_KXYZ.float(), 0).argmax(0).to(torch.uint8).cpu().numpy()


def nnunet_steps(size: int, edge: int) -> list[int]:
    """First voxels of windows along an axis, half a window apart at most."""
    number = math.ceil((size - edge) / (edge * 0.5)) + 1
    step = (size - edge) / (number - 1) if number > 1 else 0.0
    return [round(step * index) for index in range(number)]


def importance_map(patch_size: Triple) -> np.ndarray:
    """``(X, Y, Z)`` float32: a Gaussian filter of an impulse in the middle, scaled to 10, zeros raised to the least."""
    from scipy.ndimage import gaussian_filter

    impulse = np.zeros(patch_size)
    impulse[tuple(edge // 2 for edge in patch_size)] = 1
    importance = gaussian_filter(impulse, [edge / 8 for edge in patch_size], mode="constant", cval=0)
    importance *= 10 / importance.max()
    importance[importance == 0] = importance[importance > 0].min()
    return importance.astype(np.float32)
