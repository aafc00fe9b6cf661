"""Swin: the encoder of SwinUNETR, a transformer in shifted windows whose stages halve the grid.

Hatamizadeh et al., "Swin UNETR", BrainLes 2021 (arXiv 2201.01266), after Liu et al., "Swin Transformer", ICCV 2021.
With the same weights its maps are those of MONAI's ``SwinTransformer``, whose names and shapes its parameters have.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mim3d.backbones.contract import Backbone, MaskTokenEncoder, check_multiple, drop_paths_of
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.kernels.residual_mlp import residual_mlp
from mim3d.nn.blocks import DropPath, Projection, init_linear
from mim3d.nn.windows import WindowAttention, merge_neighbours, relative_places

# Shape suffixes: B batch, C channels, X Y Z space, x y z grid of tokens, E embedding, W places of a window.

#: Voxels of a token of the stem along each axis.
STEM_EDGE = 2

#: In which order the eight neighbours that become one token stand side by side, by their offsets along X, Y, Z.
MERGING_ORDERS: dict[str, tuple[Triple, ...]] = {
    "merging": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)),
    "mergingv2": tuple(itertools.product((0, 1), repeat=3)),  # type: ignore[arg-type]
    "published": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}

# Parameters of a stage: its convolutions (v2), its blocks with their numbers, and what leads to the next stage.
_STAGED = re.compile(r"layers(?P<stage>\d+)(?P<convolution>c?)\.0\.(?:blocks\.(?P<block>\d+)|downsample|layer)\.")


@dataclass(frozen=True, kw_only=True)
class Swin(Backbone):
    """Settings of the Swin encoder; the defaults are those of SwinUNETR's pre-training (Tang et al. 2022).

    Attributes:
        feature_size: Channels of the finest map; every stage doubles them.
        depths: Blocks per stage; windows are shifted in every second of them.
        num_heads: Attention heads per stage.
        window_size: Tokens of a window along each axis.
        mlp_ratio: Hidden per token channels of every MLP.
        v2: Begin every stage with a residual block of convolutions (SwinUNETR v2; He et al. 2023).
        downsample: How neighbours are merged between stages, as MONAI names it; ``published`` is what MONAI's
            ``merging`` did when SwinUNETR's weights were published (two of the eight are read twice, two never).
        recompute: Trade time for memory: recompute the blocks in the backward pass.
        drop_path: Chance that a sample goes without a branch of the last block, in training; falls linearly to the
            first block (stochastic depth).
    """

    feature_size: int = 48
    depths: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    v2: bool = False
    downsample: Literal["merging", "mergingv2", "published"] = "merging"
    recompute: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name, values, most in (
            ("in_channels", (self.in_channels,), 1024),
            ("feature_size", (self.feature_size,), 2**13),
            ("depths", self.depths, 1000),
            ("num_heads", self.num_heads, 2**16),
            ("window_size", (self.window_size,), 32),
        ):
            if not 1 <= len(values) <= 8 or not all(1 <= value <= most for value in values):
                shown = ", ".join(map(str, values[:9]))
                raise ConfigError(f"backbone {name} ({shown}) must be 1 to 8 numbers, each from 1 to {most}.")
        if not 0 < self.mlp_ratio <= 64:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}; it must be above 0 and at most 64, such as 4.")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}; it must lie between 0 and 1 (1 excluded), such as 0.1.")
        if len(self.depths) != len(self.num_heads):
            raise ConfigError(
                f"backbone depths {list(self.depths)} and num_heads {list(self.num_heads)} must have "
                "one entry per stage."
            )
        for width, heads in zip(self.widths, self.num_heads, strict=False):
            if width % heads:
                raise ConfigError(
                    f"a stage of width {width} cannot have {heads} heads, which do not divide it; change feature_size "
                    f"({self.feature_size}, doubled by every stage) or num_heads."
                )

    @property
    def encoder_class(self) -> "type[SwinEncoder]":
        """The network."""
        return SwinEncoder

    @property
    def input_multiple(self) -> Triple:
        """A token of the coarsest map along each axis: the stem and every stage halve the grid."""
        edge: int = STEM_EDGE * 2 ** len(self.depths)
        return edge, edge, edge

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each map: that of the stem, and one after every stage."""
        return tuple(self.feature_size * 2**level for level in range(len(self.depths) + 1))


class SwinEncoder(MaskTokenEncoder):
    """A patch embedding at stride 2, then stages of window attention, each of which ends at half its resolution.

    Args:
        recipe: Its settings.
    """

    #: For every two places of a window, where their offset stands in a table of biases.
    places_WW: Tensor

    def __init__(self, recipe: Swin) -> None:
        super().__init__()
        self.recipe: Swin = recipe
        self.strides = tuple(STEM_EDGE * 2**level for level in range(len(recipe.widths)))
        self.widths = recipe.widths
        self.stem_size, self.stem_dim = (STEM_EDGE,) * 3, recipe.feature_size
        self.patch_embed = nn.Module()
        self.patch_embed.add_module("proj", Projection(recipe.in_channels, recipe.feature_size, STEM_EDGE))
        drop_paths_of_stages = drop_paths_of(recipe.drop_path, recipe.depths)
        stages = zip(recipe.widths, recipe.num_heads, drop_paths_of_stages, strict=False)
        for stage, (dim, num_heads, drop_paths) in enumerate(stages, start=1):
            # A list of one, as MONAI has it, so that parameters have its names.
            self.add_module(f"layers{stage}", nn.ModuleList([SwinStage(recipe, dim, num_heads, drop_paths)]))
        self.apply(init_linear)
        if recipe.v2:
            from monai.networks.blocks.unetr_block import UnetrBasicBlock

            for stage, dim in enumerate(recipe.widths[:-1], start=1):
                block = UnetrBasicBlock(3, dim, dim, kernel_size=3, stride=1, norm_name="instance", res_block=True)
                self.add_module(f"layers{stage}c", nn.ModuleList([block]))
        self.register_buffer("places_WW", relative_places(recipe.window_size), persistent=False)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """Maps ``(B, widths[i], X / strides[i], ...)``, finest first, each normed over its channels as MONAI does.

        Raises:
            ConfigError: An axis of the input is no multiple of ``input_multiple``.
        """
        return self._maps(self._embedded(volume_BCXYZ))

    def masked_feature_maps(self, volume_BCXYZ: Tensor, hidden_BXYZ: Tensor, token_E: Tensor) -> list[Tensor]:
        """The maps of :meth:`feature_maps`, with hidden tokens of the stem shown as ``token_E`` after the embedding."""
        tokens_BxyzE = self._embedded(volume_BCXYZ)
        return self._maps(torch.where(hidden_BXYZ[..., None], token_E.to(tokens_BxyzE.dtype), tokens_BxyzE))

    def _embedded(self, volume_BCXYZ: Tensor) -> Tensor:
        check_multiple(tuple(volume_BCXYZ.shape[2:]), self.input_multiple)
        tokens_BxyzE: Tensor = self.get_submodule("patch_embed.proj")(volume_BCXYZ.permute(0, 2, 3, 4, 1))
        return tokens_BxyzE

    def _maps(self, tokens_BxyzE: Tensor) -> list[Tensor]:
        maps = [self._normed(tokens_BxyzE)]
        for stage in range(1, len(self.recipe.depths) + 1):
            if self.recipe.v2:
                convolve = self.get_submodule(f"layers{stage}c.0")
                # Convolutions and their norms are slower on what lies channels last.
                tokens_BxyzE = convolve(tokens_BxyzE.movedim(-1, 1).contiguous()).movedim(1, -1)
            tokens_BxyzE = self.get_submodule(f"layers{stage}.0")(tokens_BxyzE, self.places_WW)
            maps.append(self._normed(tokens_BxyzE))
        return maps

    @staticmethod
    def _normed(tokens_BxyzE: Tensor) -> Tensor:
        return F.layer_norm(tokens_BxyzE, tokens_BxyzE.shape[-1:]).movedim(-1, 1)

    @property
    def num_layers(self) -> int:
        """Layers above the stem: every block, then the last merging."""
        return sum(self.recipe.depths) + 1

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: what leads into a stage belongs to its first block, the last merging is the output."""
        match = _STAGED.match(name)
        if match is None:
            return 0
        stage = int(match["stage"])
        before = sum(self.recipe.depths[: stage - 1])
        if match["convolution"] or match["block"]:
            return before + 1 + int(match["block"] or 0)
        return before + self.recipe.depths[stage - 1] + 1


class SwinStage(nn.Module):
    """Blocks of one resolution, then the merging that leads to half of it.

    Args:
        recipe: Settings of the encoder.
        dim: Width of a token.
        num_heads: Attention heads.
        drop_paths: Chance of each block that a sample goes without a branch.
    """

    def __init__(self, recipe: Swin, dim: int, num_heads: int, drop_paths: Sequence[float]) -> None:
        super().__init__()
        self.recompute = recipe.recompute
        self.blocks = nn.ModuleList(
            SwinBlock(recipe, dim, num_heads, drop_path, shifted=index % 2 == 1)
            for index, drop_path in enumerate(drop_paths)
        )
        self.downsample = SwinMerging(dim, MERGING_ORDERS[recipe.downsample])

    def forward(self, tokens_BxyzE: Tensor, places_WW: Tensor) -> Tensor:
        """Tokens of half the grid and twice the width."""
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                tokens_BxyzE = checkpoint(block, tokens_BxyzE, places_WW, use_reentrant=False)
            else:
                tokens_BxyzE = block(tokens_BxyzE, places_WW)
        merged: Tensor = self.downsample(tokens_BxyzE)
        return merged


class SwinBlock(nn.Module):
    """x + attention(LN(x)) in windows, then x + MLP(LN(x)).

    Args:
        recipe: Settings of the encoder.
        dim: Width of a token.
        num_heads: Attention heads.
        drop_path: Chance that a sample goes without a branch, in training.
        shifted: Whether its windows are shifted.
    """

    def __init__(self, recipe: Swin, dim: int, num_heads: int, drop_path: float, *, shifted: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, recipe.window_size, shifted=shifted)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwinMlp(dim, int(dim * recipe.mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_BxyzE: Tensor, places_WW: Tensor) -> Tensor:
        """Tokens as they came."""
        branch = self.attn(self.norm1(tokens_BxyzE), places_WW)
        if not self.drop_path.active:
            return self.mlp(tokens_BxyzE + branch, self.norm2)
        tokens_BxyzE = tokens_BxyzE + self.drop_path.weights(branch) * branch
        # The kernel adds the residual itself: weight 0 gives the tokens back exactly, 1 / (1 - prob) more than all.
        return torch.lerp(tokens_BxyzE, self.mlp(tokens_BxyzE, self.norm2), self.drop_path.weights(tokens_BxyzE))


class SwinMlp(nn.Module):
    """Two linear layers with GELU between them, behind a norm and around them the residual.

    Args:
        dim: Width in and out.
        hidden_dim: Width between.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        weights = (self.linear1.weight, self.linear1.bias, self.linear2.weight, self.linear2.bias)
        return residual_mlp(tokens, norm.weight, norm.bias, *weights, norm.eps)


class SwinMerging(nn.Module):
    """Eight neighbours side by side, normed, then a linear layer to twice the width of one.

    Args:
        dim: Width of a token.
        order: Which of the eight come first, see :func:`merge_neighbours`.
    """

    def __init__(self, dim: int, order: Sequence[Triple]) -> None:
        super().__init__()
        self.order = order
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)

    def forward(self, tokens_BxyzE: Tensor) -> Tensor:
        """Tokens ``(B, x / 2, y / 2, z / 2, 2 E)``."""
        merged: Tensor = self.reduction(self.norm(merge_neighbours(tokens_BxyzE, self.order)))
        return merged
