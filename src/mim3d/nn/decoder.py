"""Decoders of masked pre-training: mask tokens and ViT blocks over visible tokens, or convolutions over maps."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.core.types import Triple
from mim3d.nn.blocks import Pointwise, TransformerBlock, init_linear
from mim3d.nn.tokens import sincos_positions, take_tokens
from mim3d.nn.volumes import patchify, token_grid, unpatchify

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


class MapDecoder(nn.Module):
    """Voxels of the input from feature maps: half a U-Net, and at its top a linear prediction of each place's voxels.

    Args:
        strides: Down-sampling of each map, finest first, each a multiple of the one before.
        widths: Channels of each map.
        out_channels: Channels of the voxels.
        skip_connections: Whether finer maps are added on the way up; else the coarsest alone is used.
    """

    def __init__(
        self, strides: Sequence[int], widths: Sequence[int], out_channels: int, *, skip_connections: bool
    ) -> None:
        super().__init__()
        self.stride = strides[0]
        steps = list(itertools.pairwise(zip(strides, widths, strict=True)))[::-1]
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(coarser_width, width, coarser // stride, coarser // stride)
            for (stride, width), (coarser, coarser_width) in steps
        )
        added = [width for (_, width), _ in steps]
        self.skips = nn.ModuleList(Pointwise(width, width) for width in added) if skip_connections else None
        self.convolutions = nn.ModuleList(nn.Conv3d(width, width, 3, padding=1) for width in added)
        # One group: a norm of the whole map, which one of a single voxel has, too.
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in added)
        self.pred = Pointwise(widths[0], out_channels * self.stride**3)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Voxels ``(B, out_channels, X, Y, Z)`` from maps ``(B, widths[i], X / strides[i], ...)``, finest first."""
        features = maps[-1]
        for number, (up, convolution, norm) in enumerate(zip(self.ups, self.convolutions, self.norms, strict=True)):
            features = up(features)
            if self.skips is not None:
                features = features + self.skips[number](maps[-2 - number].movedim(1, -1)).movedim(-1, 1)
            features = F.gelu(norm(convolution(features)))
        x, y, z = features.shape[2:]
        voxels_BLP = self.pred(features.movedim(1, -1)).flatten(1, 3)
        return unpatchify(voxels_BLP, (x, y, z), (self.stride, self.stride, self.stride))


def rebuilt(
    volume_1CXYZ: Tensor, hidden_1H: Tensor, predicted_1HP: Tensor, token_size: Triple, *, normalised: bool
) -> dict[str, Tensor]:
    """First channels ``(X, Y, Z)`` of a volume as it is, with its hidden places at 0, and with the predicted ones.

    Args:
        volume_1CXYZ: The volume.
        hidden_1H: Raster indices of its hidden places.
        predicted_1HP: Their predicted voxels.
        token_size: Voxels of a place.
        normalised: Whether places were predicted at mean 0 and variance 1; they get their own mean and variance back.
    """
    patches_1LP, predicted_1HP = patchify(volume_1CXYZ, token_size).float(), predicted_1HP.float()
    if normalised:
        own = take_tokens(patches_1LP, hidden_1H)
        predicted_1HP = predicted_1HP * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
    index_1HP = hidden_1H[..., None].expand_as(predicted_1HP)
    kinds = {
        "original": patches_1LP,
        "masked": patches_1LP.scatter(1, index_1HP, 0.0),
        "reconstructed": patches_1LP.scatter(1, index_1HP, predicted_1HP),
    }
    grid = token_grid(tuple(volume_1CXYZ.shape), token_size)
    return {kind: unpatchify(patches, grid, token_size)[0, 0] for kind, patches in kinds.items()}
