"""A masked autoencoder with a plain ViT-B (He et al. 2022) on tokens of 16^3, for comparison on the same voxels."""

import math

import torch
from torch import Tensor, nn

from mim3d.nn.blocks import TransformerBlock
from mim3d.nn.decoder import TokenDecoder
from mim3d.nn.losses import reconstruction_loss
from mim3d.nn.tokens import num_hidden, sincos_positions, split_tokens, take_tokens
from mim3d.nn.volumes import patchify, token_grid

TOKEN_SIZE, WIDTH, DEPTH, NUM_HEADS = (16, 16, 16), 768, 12, 12
HIDDEN_RATIO = 0.75


class MaskedAutoencoder(nn.Module):
    """ViT-B over visible tokens, a decoder of width 576 and depth 8, voxels of hidden tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(math.prod(TOKEN_SIZE), WIDTH)
        self.blocks = nn.ModuleList(TransformerBlock(WIDTH, NUM_HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.decoder = TokenDecoder(WIDTH, 576, 8, 16, math.prod(TOKEN_SIZE))

    def forward(self, volume_BCXYZ: Tensor) -> Tensor:
        """Loss on hidden tokens, drawn here."""
        grid = token_grid(tuple(volume_BCXYZ.shape), TOKEN_SIZE)
        patches_BLP = patchify(volume_BCXYZ, TOKEN_SIZE)
        batch, length, _ = patches_BLP.shape
        hidden_count = num_hidden(length, HIDDEN_RATIO)
        order_BL = torch.rand(batch, length, device=volume_BCXYZ.device).argsort(1).argsort(1)
        visible_BV, hidden_BH = split_tokens(order_BL < hidden_count, hidden_count)
        positions_LE = sincos_positions(grid, WIDTH).to(volume_BCXYZ.device)
        tokens_BVE = self.embed(take_tokens(patches_BLP, visible_BV)) + positions_LE[visible_BV]
        for block in self.blocks:
            tokens_BVE = block(tokens_BVE)
        features_BLD = self.decoder([(self.norm(tokens_BVE), visible_BV)], grid)
        predicted_BHP = self.decoder.predict(features_BLD, hidden_BH)
        return reconstruction_loss(predicted_BHP, take_tokens(patches_BLP, hidden_BH))
