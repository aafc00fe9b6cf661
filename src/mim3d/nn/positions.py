"""Fixed sine-cosine position embeddings in three dimensions."""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.types import Triple


@lru_cache(maxsize=32)
def sincos_positions(grid: Triple, embed_dim: int) -> Tensor:
    """Embeddings ``(L, embed_dim)`` of a token grid, in raster order.

    A third of the channels each for X, Y and Z: sines, then cosines, of the index times 10000^(-i / n) for
    ``n = embed_dim // 6`` frequencies. Channels left over when ``embed_dim`` is no multiple of 6 are zero.
    """
    num_frequencies = embed_dim // 6
    frequencies = 10000.0 ** (-torch.arange(num_frequencies, dtype=torch.float64) / num_frequencies)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    waves = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
    return F.pad(waves, (0, embed_dim - waves.shape[1]))
