"""How a hybrid encoder holds its convolution features: whole volumes, or blocks of visible tokens only."""

import torch
from torch import Tensor

from mim3d.nn.depthwise import depthwise_dense
from mim3d.nn.masks import visible_indices
from mim3d.nn.patches import from_blocks, to_blocks
from mim3d.types import Triple

# Shape suffixes: B batch, L all tokens, V visible tokens, N = B x V blocks, s edge of a block, C channels.


class VisibleBlocks:
    """Features of visible tokens only, one ``s^3`` block per token: ``(B V, s, s, s, C)``.

    Patch embeddings and 1x1x1 convolutions never leave a token, and hidden voxels count as zero in the depth-wise
    convolution, the only operation that does: leaving hidden tokens out changes nothing at visible ones.

    Args:
        hidden_BL: token mask, True = hidden, the same number per sample.
        grid: tokens along X, Y, Z.
    """

    def __init__(self, hidden_BL: Tensor, grid: Triple) -> None:
        self.grid = grid
        self.batch, self.length = hidden_BL.shape
        self.indices_BV = visible_indices(hidden_BL)
        offsets = torch.arange(self.batch, device=hidden_BL.device)[:, None] * self.length
        self.flat_indices_N = (self.indices_BV + offsets).reshape(-1)

    def gather(self, volume_BCXYZ: Tensor, patch_size: int) -> Tensor:
        """Blocks ``(B V, p, p, p, C)`` of the input at visible tokens."""
        return to_blocks(volume_BCXYZ, patch_size).flatten(0, 1).index_select(0, self.flat_indices_N)

    def depthwise(self, features_NsssC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Depth-wise convolution across blocks, with zeros at hidden tokens and outside the volume."""
        block_shape = features_NsssC.shape[1:]
        canvas = features_NsssC.new_zeros(self.batch * self.length, *block_shape)
        canvas = canvas.index_copy(0, self.flat_indices_N, features_NsssC)
        volume = from_blocks(canvas.reshape(self.batch, self.length, *block_shape), self.grid)
        out_BCXYZ = depthwise_dense(volume, weight, bias).permute(0, 4, 1, 2, 3)
        return to_blocks(out_BCXYZ, block_shape[0]).flatten(0, 1).index_select(0, self.flat_indices_N)
