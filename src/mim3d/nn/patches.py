"""Volumes as sequences of cubic patches, channels last inside a patch."""

from torch import Tensor

from mim3d.core.types import Triple


def token_grid(shape: tuple[int, ...], patch_size: int) -> Triple:
    """Tokens along X, Y, Z of a volume whose last three sizes are multiples of ``patch_size``."""
    x, y, z = (size // patch_size for size in shape[-3:])
    return x, y, z


def to_blocks(volume_BCXYZ: Tensor, patch_size: int) -> Tensor:
    """Cut ``(B, C, X, Y, Z)`` into ``(B, L, p, p, p, C)``, patches in raster order."""
    batch, channels = volume_BCXYZ.shape[:2]
    x, y, z = token_grid(tuple(volume_BCXYZ.shape), patch_size)
    p = patch_size
    blocks = volume_BCXYZ.reshape(batch, channels, x, p, y, p, z, p).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return blocks.reshape(batch, x * y * z, p, p, p, channels)


def from_blocks(blocks_BLpppC: Tensor, grid: Triple) -> Tensor:
    """Put ``(B, L, p, p, p, C)`` back together, channels last: ``(B, X, Y, Z, C)``."""
    batch, _, p, _, _, channels = blocks_BLpppC.shape
    x, y, z = grid
    volume = blocks_BLpppC.reshape(batch, x, y, z, p, p, p, channels).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return volume.reshape(batch, x * p, y * p, z * p, channels)


def patchify(volume_BCXYZ: Tensor, patch_size: int) -> Tensor:
    """Patches as vectors ``(B, L, p^3 C)``: X slowest, then Y, Z, channels fastest."""
    return to_blocks(volume_BCXYZ, patch_size).flatten(2)


def unpatchify(patches_BLP: Tensor, grid: Triple, patch_size: int) -> Tensor:
    """Inverse of :func:`patchify`: ``(B, C, X, Y, Z)``."""
    batch, length, _ = patches_BLP.shape
    blocks = patches_BLP.reshape(batch, length, patch_size, patch_size, patch_size, -1)
    return from_blocks(blocks, grid).permute(0, 4, 1, 2, 3)
