"""How a hybrid encoder holds a masked volume: one block of features per visible token, and its neighbours."""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mim3d.core.types import Triple
from mim3d.kernels.masked.operator import masked_depthwise
from mim3d.nn.volumes import to_blocks

# Shape suffixes: B batch, V visible tokens, L all tokens, N = B x V blocks, s edge of a block, C channels.


class VisibleBlocks:
    """Features of visible tokens only, one ``s^3`` block per token: ``(B V, s, s, s, C)``.

    Patch embeddings and 1x1x1 convolutions never leave a token, and hidden voxels count as zero in the depth-wise
    convolution, the only operation that does: leaving hidden tokens out changes nothing at visible ones.

    Args:
        visible_BV: Raster indices of visible tokens.
        grid: Tokens along X, Y, Z.
    """

    def __init__(self, visible_BV: Tensor, grid: Triple) -> None:
        self.flat_indices_N = flat_tokens(visible_BV, math.prod(grid))
        self.neighbours_N27 = block_neighbours(visible_BV, grid)

    def gather(self, volume_BCXYZ: Tensor, token_size: Triple) -> Tensor:
        """Blocks ``(B V, *token_size, C)`` of the input at visible tokens."""
        return to_blocks(volume_BCXYZ, token_size).flatten(0, 1).index_select(0, self.flat_indices_N)

    def depthwise(self, features_NsssC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Depth-wise convolution across blocks, with zeros at hidden tokens and outside the volume."""
        return masked_depthwise(features_NsssC, weight, bias, self.neighbours_N27)


def flat_tokens(visible_BV: Tensor, length: int) -> Tensor:
    """Indices ``(N,)`` of visible tokens among the ``B x L`` tokens of a batch."""
    first_B1 = torch.arange(len(visible_BV), device=visible_BV.device)[:, None] * length
    return (visible_BV + first_B1).flatten()


def block_neighbours(visible_BV: Tensor, grid: Triple) -> Tensor:
    """Indices ``(N, 27)`` of the blocks around every visible token, itself in the middle.

    Offsets -1, 0, 1 along X, Y, Z in raster order; -1 where that token is hidden or outside the volume.

    Args:
        visible_BV: Raster indices of visible tokens.
        grid: Tokens along X, Y, Z.
    """
    batch, length = len(visible_BV), math.prod(grid)
    flat_N = flat_tokens(visible_BV, length)
    # One place more than there are tokens: what lies outside points there.
    block_of = torch.full((batch * length + 1,), -1, device=visible_BV.device)
    block_of = block_of.index_copy(0, flat_N, torch.arange(len(flat_N), device=visible_BV.device))
    around_L27 = torch.from_numpy(_tokens_around(grid)).to(visible_BV.device)
    around_BV27 = around_L27[visible_BV]
    first_B11 = torch.arange(batch, device=visible_BV.device)[:, None, None] * length
    return block_of[torch.where(around_BV27 >= 0, around_BV27 + first_B11, batch * length)].flatten(0, 1)


@lru_cache(maxsize=32)
def _tokens_around(grid: Triple) -> np.ndarray:
    """Raster indices ``(L, 27)`` of the tokens around each token; -1 outside the grid."""
    numbered = np.full([size + 2 for size in grid], -1, dtype=np.int64)
    numbered[1:-1, 1:-1, 1:-1] = np.arange(math.prod(grid)).reshape(grid)
    windows = np.lib.stride_tricks.sliding_window_view(numbered, (3, 3, 3))
    return windows.reshape(-1, 27).copy()
