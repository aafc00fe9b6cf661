"""Volumes resized and mirrored as tensors."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.types import Triple


def resize_image(image_NCXYZ: Tensor, size: Triple) -> Tensor:
    """Resize ``(N, C, X, Y, Z)``: averaging over whole blocks where the factor is whole, else trilinear.

    Averaging is what keeps a reduction by more than two from aliasing; at a factor of two both are the same.
    """
    shape = tuple(image_NCXYZ.shape[2:])
    if shape == size:
        return image_NCXYZ
    if all(have % want == 0 for have, want in zip(shape, size, strict=True)):
        factor = [have // want for have, want in zip(shape, size, strict=True)]
        return F.avg_pool3d(image_NCXYZ, factor)
    shrinks = any(have > want for have, want in zip(shape, size, strict=True))
    if shrinks:
        return F.interpolate(image_NCXYZ, size, mode="area")
    return F.interpolate(image_NCXYZ, size, mode="trilinear", align_corners=False)


def resize_labels(labels_NXYZ: Tensor, size: Triple) -> Tensor:
    """Resize ``(N, X, Y, Z)`` label values by nearest neighbour, on voxel centres."""
    if tuple(labels_NXYZ.shape[1:]) == size:
        return labels_NXYZ
    resized = F.interpolate(labels_NXYZ[:, None].double(), size, mode="nearest-exact")
    return resized[:, 0].to(labels_NXYZ.dtype)


def flip(array: Tensor, flips: tuple[bool, bool, bool]) -> Tensor:
    """Flip the last three axes of a tensor where asked."""
    axes = [axis - 3 for axis, wanted in enumerate(flips) if wanted]
    return torch.flip(array, axes) if axes else array
