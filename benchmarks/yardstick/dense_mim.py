"""The yardstick: MiM's published network written plainly, everything computed at every token.

Convolutions are library convolutions on channels-first volumes, LayerNorm permutes, attention is written out, hidden
voxels are multiplied by zero and every token is predicted: what the published implementation does, without its
mistakes. Parameters have the same names and shapes as mim3d's, so one state dict serves both and the losses must agree.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones import Hybrid
from mim3d.core.types import Triple
from mim3d.methods.mim.objective import MiMObjective
from mim3d.nn.blocks import TransformerBlock
from mim3d.nn.tokens import sincos_positions
from mim3d.objective import Batch

# Shape suffixes: B batch, C channels, X Y Z space, L all tokens, V visible tokens, E embedding, D decoder width.


class ChannelsFirstNorm(nn.LayerNorm):
    """LayerNorm over axis 1."""

    def forward(self, features_BCXYZ: Tensor) -> Tensor:
        return super().forward(features_BCXYZ.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class Embed(nn.Module):
    """Convolution with kernel = stride = 2, LayerNorm, GELU."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(dim_in, dim, 2, stride=2)
        self.norm = ChannelsFirstNorm(dim, eps=1e-5)

    def forward(self, features_BCXYZ: Tensor) -> Tensor:
        return F.gelu(self.norm(self.proj(features_BCXYZ)))


class ConvMlp(nn.Module):
    """1x1x1 convolution, GELU, 1x1x1 convolution."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv3d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv3d(hidden_dim, dim, 1)

    def forward(self, features_BCXYZ: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features_BCXYZ)))


class MaskedConvBlock(nn.Module):
    """x + conv1(dwconv5(visible * conv1(LN(x)))), then x + MLP(LN(x))."""

    def __init__(self, dim: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = ChannelsFirstNorm(dim, eps=1e-5)
        self.conv1 = nn.Conv3d(dim, dim, 1)
        self.attn = nn.Conv3d(dim, dim, 5, padding=2, groups=dim)
        self.conv2 = nn.Conv3d(dim, dim, 1)
        self.norm2 = ChannelsFirstNorm(dim, eps=1e-5)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))

    def forward(self, features_BCXYZ: Tensor, visible_B1XYZ: Tensor) -> Tensor:
        mixed = self.attn(visible_B1XYZ * self.conv1(self.norm1(features_BCXYZ)))
        features_BCXYZ = features_BCXYZ + self.conv2(mixed)
        return features_BCXYZ + self.mlp(self.norm2(features_BCXYZ))


class WrittenAttention(nn.Module):
    """Softmax attention in matrix products."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        batch, length, dim = tokens_BLE.shape
        qkv = self.qkv(tokens_BLE).reshape(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        weights = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ value).transpose(1, 2).reshape(batch, length, dim))


class TokenMlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens_BLE)))


class ViTBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = WrittenAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = TokenMlp(dim, int(dim * mlp_ratio))

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        tokens_BLE = tokens_BLE + self.attn(self.norm1(tokens_BLE))
        return tokens_BLE + self.mlp(self.norm2(tokens_BLE))


class DenseEncoder(nn.Module):
    """The hybrid encoder, computed everywhere; visible tokens are picked before the transformer."""

    def __init__(self, recipe: Hybrid) -> None:
        super().__init__()
        self.edge, self.embed_dim, self.num_stages = 2 ** len(recipe.widths), recipe.widths[-1], len(recipe.widths)
        dims_in = (recipe.in_channels, *recipe.widths[:-1])
        for stage, (dim_in, dim, depth) in enumerate(zip(dims_in, recipe.widths, recipe.depths, strict=True), start=1):
            self.add_module(f"patch_embed{stage}", Embed(dim_in, dim))
            last = stage == self.num_stages
            blocks = [
                ViTBlock(dim, recipe.num_heads, recipe.mlp_ratio) if last else MaskedConvBlock(dim, recipe.mlp_ratio)
                for _ in range(depth)
            ]
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
            if not last:
                stride = self.edge // 2**stage
                self.add_module(f"stage{stage}_output_decode", nn.Conv3d(dim, self.embed_dim, stride, stride=stride))
        self.add_module(f"patch_embed{self.num_stages + 1}", nn.Linear(self.embed_dim, self.embed_dim))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)

    def forward(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> Tensor:
        """Tokens ``(B, V, E)`` of visible places, in raster order."""
        batch = len(volume_BCXYZ)
        x, y, z = (size // self.edge for size in volume_BCXYZ.shape[2:])
        visible_B1xyz = (~hidden_BL).reshape(batch, 1, x, y, z).to(volume_BCXYZ.dtype)
        features, skipped = volume_BCXYZ, volume_BCXYZ.new_zeros(())
        for stage in range(1, self.num_stages):
            features = getattr(self, f"patch_embed{stage}")(features)
            visible = F.interpolate(visible_B1xyz, scale_factor=self.edge // 2**stage)
            for block in getattr(self, f"blocks{stage}"):
                features = block(features, visible)
            skipped = skipped + getattr(self, f"stage{stage}_output_decode")(features).flatten(2).transpose(1, 2)
        tokens = getattr(self, f"patch_embed{self.num_stages}")(features).flatten(2).transpose(1, 2)
        tokens = getattr(self, f"patch_embed{self.num_stages + 1}")(tokens)
        tokens = (tokens + sincos_positions((x, y, z), self.embed_dim).to(tokens))[~hidden_BL].reshape(
            batch, -1, self.embed_dim
        )
        for block in getattr(self, f"blocks{self.num_stages}"):
            tokens = block(tokens)
        return self.norm(tokens + skipped[~hidden_BL].reshape_as(tokens))


class DenseDecoder(nn.Module):
    """Mask tokens, ViT blocks, a prediction at every token."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, num_heads: int, out_dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(ViTBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, out_dim)

    def forward(self, visible_BVE: Tensor, hidden_BL: Tensor, grid: Triple) -> tuple[Tensor, Tensor]:
        """Features ``(B, L, D)`` and predicted voxels ``(B, L, P)`` of all tokens."""
        embedded = self.embed(visible_BVE)
        tokens = self.mask_token.expand(*hidden_BL.shape, -1).to(embedded.dtype).clone()
        tokens[~hidden_BL] = embedded.flatten(0, 1)
        tokens = tokens + sincos_positions(grid, tokens.shape[-1]).to(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        features = self.norm(tokens)
        return features, self.pred(features)


class DenseMiM(nn.Module):
    """MiM's loss through the dense network: one level after the other, every token predicted, hidden ones kept.

    Args:
        objective: whose weights, hierarchy and alignment heads are copied.
    """

    def __init__(self, objective: MiMObjective) -> None:
        super().__init__()
        recipe, decoder, block = objective.encoder.recipe, objective.decoder, objective.decoder.blocks[0]
        assert isinstance(recipe, Hybrid)
        assert isinstance(block, TransformerBlock)
        self.encoder = DenseEncoder(recipe)
        self.encoder.load_state_dict(objective.encoder.state_dict())
        self.decoder = DenseDecoder(
            decoder.embed.in_features,
            decoder.embed.out_features,
            len(decoder.blocks),
            block.attn.num_heads,
            decoder.pred.out_features,
        )
        self.decoder.load_state_dict(decoder.state_dict())
        self.heads = copy.deepcopy(objective)
        del self.heads.encoder, self.heads.decoder
        self.to(next(objective.parameters()))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms by name."""
        levels = self.heads.levels(batch)
        features, terms, losses = [], {}, []
        for level in levels:
            hidden_ML = batch[f"hidden/{level.geometry.level.name}"].flatten(0, 1)
            tokens = self.encoder(level.volume_MCXYZ, hidden_ML)
            features_MLD, predicted_MLP = self.decoder(tokens, hidden_ML, level.geometry.token_grid)
            target_MLP = self._targets(level.volume_MCXYZ)
            errors_ML = (predicted_MLP.to(target_MLP.dtype) - target_MLP).square().mean(-1)
            loss = (errors_ML * hidden_ML).sum() / hidden_ML.sum()
            terms[f"loss/{level.geometry.level.name}"] = loss.detach()
            losses.append(level.geometry.level.loss_weight * loss)
            features.append(features_MLD)
        for index in range(1, len(levels)):
            loss, named = self.heads.alignment(batch, levels[index - 1], index, features[index - 1], features[index])
            losses.append(self.heads.settings.alignment_weight * loss)
            terms.update(named)
        return torch.stack(losses).sum(), terms

    def _targets(self, volume_MCXYZ: Tensor) -> Tensor:
        """Every token's own voxels, X slowest and channels fastest, at mean 0 and variance 1."""
        p = self.encoder.edge
        patches = volume_MCXYZ.unfold(2, p, p).unfold(3, p, p).unfold(4, p, p)
        target = patches.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4).flatten(1, 3)
        if not self.heads.settings.normalise_targets:
            return target
        return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
