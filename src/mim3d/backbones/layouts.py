"""How a hybrid encoder holds the features of a masked volume: one block per visible token, nothing else."""

import math

from torch import Tensor

from mim3d.core.types import Triple
from mim3d.kernels.masked.operator import masked_depthwise
from mim3d.nn.neighbours import block_neighbours, flat_tokens
from mim3d.nn.patches import to_blocks

# Shape suffixes: B batch, V visible tokens, N = B x V blocks, s edge of a block, C channels.


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
