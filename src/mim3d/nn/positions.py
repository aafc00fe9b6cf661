"""Fixed sine-cosine position embeddings in three dimensions."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mim3d.core.types import Triple


def sincos_positions(grid: Triple, embed_dim: int) -> Tensor:
    """Embeddings ``(L, embed_dim)`` of a token grid, in raster order.

    A third of the channels each for X, Y and Z: sines, then cosines, of the index times 10000^(-i / n) for
    ``n = embed_dim // 6`` frequencies. Channels left over when ``embed_dim`` is no multiple of 6 are zero.
    """
    return torch.from_numpy(_table(grid, embed_dim))


# Tables are kept as arrays: a tensor made in one mode (a dry run on fake tensors, say) must not turn up in another.
@lru_cache(maxsize=32)
def _table(grid: Triple, embed_dim: int) -> np.ndarray:
    num_frequencies = embed_dim // 6
    frequencies = 10000.0 ** (-np.arange(num_frequencies) / num_frequencies)
    axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    waves = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return np.pad(waves, ((0, 0), (0, embed_dim - waves.shape[1]))).astype(np.float32)
