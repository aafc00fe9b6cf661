"""Volumes as tensors: cut into patches and put together again, resized, mirrored."""

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.types import Triple


def token_grid(shape: tuple[int, ...], token_size: Triple) -> Triple:
    """Tokens along X, Y, Z of a volume whose last three sizes are multiples of ``token_size``."""
    x, y, z = (voxels // edge for voxels, edge in zip(shape[-3:], token_size, strict=True))
    return x, y, z


def to_blocks(volume_BCXYZ: Tensor, token_size: Triple) -> Tensor:
    """Cut ``(B, C, X, Y, Z)`` into ``(B, L, *token_size, C)``, patches in raster order."""
    batch, channels = volume_BCXYZ.shape[:2]
    x, y, z = token_grid(tuple(volume_BCXYZ.shape), token_size)
    px, py, pz = token_size
    blocks = volume_BCXYZ.reshape(batch, channels, x, px, y, py, z, pz).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return blocks.reshape(batch, x * y * z, px, py, pz, channels)


def from_blocks(blocks_BLpppC: Tensor, grid: Triple) -> Tensor:
    """Put the blocks of :func:`to_blocks` back together, channels last: ``(B, X, Y, Z, C)``."""
    batch, _, px, py, pz, channels = blocks_BLpppC.shape
    x, y, z = grid
    volume = blocks_BLpppC.reshape(batch, x, y, z, px, py, pz, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return volume.reshape(batch, x * px, y * py, z * pz, channels)


def patchify(volume_BCXYZ: Tensor, token_size: Triple) -> Tensor:
    """Patches as vectors ``(B, L, P)`` of all their voxels: X slowest, then Y, Z, channels fastest."""
    return to_blocks(volume_BCXYZ, token_size).flatten(2)


def unpatchify(patches_BLP: Tensor, grid: Triple, token_size: Triple) -> Tensor:
    """Inverse of :func:`patchify`: ``(B, C, X, Y, Z)``."""
    batch, length, _ = patches_BLP.shape
    blocks = patches_BLP.reshape(batch, length, *token_size, -1)
    return from_blocks(blocks, grid).permute(0, 4, 1, 2, 3)


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
