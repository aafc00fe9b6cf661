"""The masked autoencoder's decoder: mask tokens in hidden places, ViT blocks, a linear prediction of voxels."""

import torch
from torch import Tensor, nn

from mim3d.nn.blocks import TransformerBlock, init_linear
from mim3d.nn.masks import take_tokens, visible_indices
from mim3d.nn.positions import sincos_positions
from mim3d.types import Triple

# Shape suffixes: B batch, L all tokens, V visible, H hidden, E encoder width, D decoder width, P voxels of a patch.


class TokenDecoder(nn.Module):
    """Reconstructs hidden tokens from visible ones (He et al. 2022, section 3).

    Args:
        encoder_dim: width of the encoder's tokens.
        dim: width of the decoder.
        depth: ViT blocks.
        num_heads: attention heads.
        out_dim: voxels (times channels) of one token.
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

    def forward(self, visible_BVE: Tensor, hidden_BL: Tensor, grid: Triple) -> Tensor:
        """Decoder features ``(B, L, D)`` of all places, in raster order, after the last norm."""
        embedded_BVD = self.embed(visible_BVE)
        batch, length = hidden_BL.shape
        tokens_BLD = self.mask_token.to(embedded_BVD.dtype).expand(batch, length, -1)
        index = visible_indices(hidden_BL)[..., None].expand_as(embedded_BVD)
        tokens_BLD = tokens_BLD.scatter(1, index, embedded_BVD)
        tokens_BLD = tokens_BLD + sincos_positions(grid, tokens_BLD.shape[-1]).to(tokens_BLD)
        for block in self.blocks:
            tokens_BLD = block(tokens_BLD)
        return self.norm(tokens_BLD)

    def predict_hidden(self, features_BLD: Tensor, hidden_BL: Tensor) -> Tensor:
        """Predicted voxels ``(B, H, P)`` of hidden tokens: nobody needs those of visible ones."""
        return self.pred(take_tokens(features_BLD, visible_indices(~hidden_BL)))
