"""MiM's hybrid backbone: convolution stages under a vision transformer (ConvMAE style).

Zhuang et al., "MiM: Mask in Mask Self-Supervised Pre-Training for 3D Medical Image Analysis", IEEE TMI 2025. Parameter
names and shapes are those of the published checkpoints.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mim3d.backbones.contract import Backbone, VisibleEncoder, check_multiple, drop_paths_of
from mim3d.backbones.layouts import VisibleBlocks
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.kernels.depthwise import depthwise_dense
from mim3d.nn.blocks import ConvBlock, DepthwiseConvolution, PatchEmbed, Projection, TransformerBlock, init_linear
from mim3d.nn.tokens import sincos_positions
from mim3d.nn.volumes import token_grid

# Shape suffixes: B batch, C channels, X Y Z space, L all tokens, V visible tokens, N volumes or blocks, E embedding.

# Parameters of a stage: its patch embedding, and its blocks with their numbers.
_STAGED = re.compile(r"(?:patch_embed|blocks)(?P<stage>\d+)(?:\.(?P<block>\d+))?\.")


@dataclass(frozen=True, kw_only=True)
class Hybrid(Backbone):
    """Settings of the hybrid backbone; the defaults are the published base size.

    Attributes:
        widths: Channels per stage; every stage halves the grid, the last is the transformer.
        depths: Blocks per stage.
        num_heads: Attention heads of the transformer.
        mlp_ratio: Hidden per token channels of every MLP.
        recompute: Trade time for memory: recompute the convolution blocks in the backward pass.
        drop_path: Chance that a sample goes without a branch of the last block, in training; falls linearly to the
            first block (stochastic depth).
    """

    widths: tuple[int, ...] = (48, 96, 192, 384)
    depths: tuple[int, ...] = (2, 2, 2, 11)
    num_heads: int = 12
    mlp_ratio: float = 4.0
    recompute: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name, values, least, most in (
            ("in_channels", (self.in_channels,), 1, 1024),
            ("widths", self.widths, 1, 2**16),
            ("depths", self.depths, 0, 1000),
            ("num_heads", (self.num_heads,), 1, 2**16),
        ):
            if len(values) > 8 or not all(least <= value <= most for value in values):
                shown = ", ".join(map(str, values[:9]))
                raise ConfigError(f"backbone {name} {shown} must be at most 8 numbers, each from {least} to {most}.")
        if not 0 < self.mlp_ratio <= 64:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}; it must be above 0 and at most 64, such as 4.")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}; it must lie between 0 and 1 (1 excluded), such as 0.1.")
        if len(self.widths) != len(self.depths) or len(self.widths) < 2:
            raise ConfigError(
                f"backbone widths {list(self.widths)} and depths {list(self.depths)} must have "
                "one entry per stage, two stages or more."
            )
        if self.widths[-1] % self.num_heads:
            raise ConfigError(
                f"token width {self.widths[-1]} is not a multiple of num_heads ({self.num_heads}); "
                "choose one that divides it."
            )

    @property
    def encoder_class(self) -> "type[HybridEncoder]":
        """The network."""
        return HybridEncoder

    @property
    def input_multiple(self) -> Triple:
        """A token along each axis: every stage halves the grid."""
        edge: int = 2 ** len(self.widths)
        return edge, edge, edge


class HybridEncoder(VisibleEncoder):
    """Convolution stages at strides 2, 4, ..., then ViT blocks on tokens of the last stride.

    Args:
        recipe: Its settings.
    """

    def __init__(self, recipe: Hybrid) -> None:
        super().__init__()
        self.recipe: Hybrid = recipe
        self.num_stages = len(recipe.widths)
        self.strides = tuple(2 ** (stage + 1) for stage in range(self.num_stages))
        self.widths = recipe.widths
        self.embed_dim = recipe.widths[-1]
        dims_in = (recipe.in_channels, *recipe.widths[:-1])
        stages = zip(dims_in, recipe.widths, drop_paths_of(recipe.drop_path, recipe.depths), strict=True)
        for stage, (dim_in, dim, drop_paths) in enumerate(stages, start=1):
            self.add_module(f"patch_embed{stage}", PatchEmbed(dim_in, dim))
            last = stage == self.num_stages
            blocks = (
                TransformerBlock(dim, recipe.num_heads, recipe.mlp_ratio, drop_path)
                if last
                else ConvBlock(dim, recipe.mlp_ratio, drop_path=drop_path)
                for drop_path in drop_paths
            )
            self.add_module(f"blocks{stage}", nn.ModuleList(blocks))
            if not last:
                kernel_size = self.strides[-1] // self.strides[stage - 1]
                self.add_module(f"stage{stage}_output_decode", Projection(dim, self.embed_dim, kernel_size))
        self.add_module(f"patch_embed{self.num_stages + 1}", nn.Linear(self.embed_dim, self.embed_dim))
        self.norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.apply(init_linear)

    def encode_visible(self, volume_BCXYZ: Tensor, visible_BV: Tensor) -> Tensor:
        """Tokens ``(B, V, E)`` of the visible places; nothing is computed at hidden ones."""
        grid = token_grid(tuple(volume_BCXYZ.shape), self.token_size)
        layout = VisibleBlocks(visible_BV, grid)
        blocks_NsssC = layout.gather(volume_BCXYZ, self.token_size)
        # The blocks of one volume are one sample to drop path, as the volume is when nothing is hidden.
        maps, tokens_NE = self._convolution_stages(blocks_NsssC, layout.depthwise, len(volume_BCXYZ))
        positions_LE = sincos_positions(grid, self.embed_dim).to(tokens_NE)
        tokens_BVE = tokens_NE.reshape(*visible_BV.shape, self.embed_dim)
        return self._transform(tokens_BVE + positions_LE[visible_BV], maps)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """Maps ``(B, widths[i], X / strides[i], ...)`` of all stages, finest first; the last holds the normed tokens.

        Raises:
            ConfigError: An axis of the input is no multiple of the token size.
        """
        check_multiple(tuple(volume_BCXYZ.shape[2:]), self.input_multiple)
        grid = token_grid(tuple(volume_BCXYZ.shape), self.token_size)
        features_BXYZC = volume_BCXYZ.permute(0, 2, 3, 4, 1)
        # Not len(): it would make the number of samples a constant of exported programs.
        maps, tokens_BxyzE = self._convolution_stages(features_BXYZC, depthwise_dense, volume_BCXYZ.shape[0])
        tokens_BLE = tokens_BxyzE.flatten(1, 3)
        positions_LE = sincos_positions(grid, self.embed_dim).to(tokens_BLE)
        maps.append(torch.unflatten(self._transform(tokens_BLE + positions_LE, maps), 1, grid))
        return [features.permute(0, 4, 1, 2, 3) for features in maps]

    @property
    def num_layers(self) -> int:
        """Layers above the stem: every block, then the output."""
        return sum(self.recipe.depths) + 1

    def layer_of(self, name: str) -> int:
        """Layer of a parameter: a stage's patch embedding belongs to its first block (as in ConvNeXt, Liu et al. 2022).

        The first one is the stem. The projections that bring convolution stages to the tokens are added below the last
        norm: like it, they are part of the output.
        """
        match = _STAGED.match(name)
        if match is None:
            return self.num_layers
        if name.startswith("patch_embed1."):
            return 0
        # The embedding numbered after the last stage is the second half of that stage's own.
        stage, block = min(int(match["stage"]), self.num_stages), int(match["block"] or 0)
        return sum(self.recipe.depths[: stage - 1]) + 1 + block

    def _convolution_stages(
        self, features_NXYZC: Tensor, depthwise: DepthwiseConvolution, num_samples: int
    ) -> tuple[list[Tensor], Tensor]:
        """Outputs of the convolution stages, and the embedded tokens that enter the transformer."""
        maps = []
        for stage in range(1, self.num_stages):
            features_NXYZC = self.get_submodule(f"patch_embed{stage}")(features_NXYZC)
            for block in self.get_submodule(f"blocks{stage}").children():
                if self.recipe.recompute and torch.is_grad_enabled():
                    features_NXYZC = checkpoint(block, features_NXYZC, depthwise, num_samples, use_reentrant=False)
                else:
                    features_NXYZC = block(features_NXYZC, depthwise, num_samples)
            maps.append(features_NXYZC)
        tokens = self.get_submodule(f"patch_embed{self.num_stages}")(features_NXYZC)
        return maps, self.get_submodule(f"patch_embed{self.num_stages + 1}")(tokens)

    def _transform(self, tokens_BLE: Tensor, maps_NXYZC: list[Tensor]) -> Tensor:
        """Tokens after the transformer, plus what the convolution stages add to them on the token grid, normed."""
        for block in self.get_submodule(f"blocks{self.num_stages}").children():
            tokens_BLE = block(tokens_BLE)
        outputs = [
            self.get_submodule(f"stage{stage}_output_decode")(features)
            for stage, features in enumerate(maps_NXYZC, start=1)
        ]
        return self.norm(tokens_BLE + torch.stack(outputs).sum(0).reshape_as(tokens_BLE))
