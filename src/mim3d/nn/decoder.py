"""The masked autoencoder's decoder: mask tokens in hidden places, ViT blocks, a linear prediction of voxels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mim3d.core.types import Triple
from mim3d.nn.blocks import TransformerBlock, init_linear
from mim3d.nn.tokens import sincos_positions, take_tokens

# Shape suffixes: B batch, L all tokens, V visible, H hidden, E encoder width, D decoder width, P voxels of a patch.


class TokenDecoder(nn.Module):
    """Reconstructs hidden tokens from visible ones (He et al. 2022, section 3).

    Args:
        encoder_dim: Width of the encoder's tokens.
        dim: Width of the decoder.
        depth: ViT blocks.
        num_heads: Attention heads.
        out_dim: Voxels (times channels) of one token.
    """

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_linear)

    def forward(self, visible: Sequence[tuple[Tensor, Tensor]], grid: Triple) -> Tensor:
        """Decoder features ``(B, L, D)`` of all places, in raster order, after the last norm.

        Args:
            visible: Tokens ``(b, V, E)`` and their raster indices ``(b, V)``, for each group of volumes that show
                the same number of tokens; all groups, ``B`` volumes together, go through the blocks as one batch.
            grid: Tokens along X, Y, Z.
        """
        tokens_BLD = torch.cat([self._fill(tokens, indices, math.prod(grid)) for tokens, indices in visible])
        tokens_BLD = tokens_BLD + sincos_positions(grid, tokens_BLD.shape[-1]).to(tokens_BLD)
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        return self.norm(tokens_BLD)

    def _fill(self, visible_BVE: Tensor, visible_BV: Tensor, length: int) -> Tensor:
        """Embedded tokens in their places, mask tokens elsewhere."""
        embedded_BVD = self.embed(visible_BVE)
        tokens_BLD = self.mask_token.to(embedded_BVD.dtype).expand(len(embedded_BVD), length, -1)
        return tokens_BLD.scatter(1, visible_BV[..., None].expand_as(embedded_BVD), embedded_BVD)

    def predict(self, features_BLD: Tensor, hidden_BH: Tensor) -> Tensor:
        """Predicted voxels ``(B, H, P)`` at raster indices ``(B, H)``: nobody needs those of visible tokens."""
        return self.pred(take_tokens(features_BLD, hidden_BH))
