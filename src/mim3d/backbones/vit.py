"""A plain vision transformer in 3-D: non-overlapping tokens, then transformer blocks at one resolution.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021. Rotary positions, registers, a gated MLP, layer scale
and norms inside of branches are settings; :data:`PRIMUS` has those of Primus (Wald et al., arXiv 2503.01835, 2025).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mim3d.backbones.contract import Backbone, MaskTokenEncoder, VisibleEncoder, check_multiple, drop_paths_of
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.nn.blocks import Projection, TransformerBlock, init_linear
from mim3d.nn.tokens import RotaryPairs, resized_positions, rotary_angles, sincos_positions
from mim3d.nn.volumes import to_blocks, token_grid

# Shape suffixes: B batch, C channels, X Y Z space, L all tokens, V visible tokens, R registers, E embedding, d half of
# the channels of a head.

#: Most registers.
_MOST_REGISTERS = 1024


@dataclass(frozen=True, kw_only=True)
class ViT(Backbone):
    """Settings of the plain vision transformer; the defaults are the base size of its paper and of MAE's.

    Attributes:
        token_edge: Voxels of a token along each axis.
        width: Channels of a token.
        depth: Transformer blocks.
        num_heads: Attention heads of each block.
        mlp_ratio: Hidden per token channels of every MLP; ``swiglu`` has two thirds of them, and so as many parameters.
        positions: ``sincos`` adds fixed sines and cosines to the tokens; ``rotary`` turns queries and keys, so that
            attention sees where tokens lie from each other alone; ``learned`` adds a table that is learned;
            ``learned_rotary`` does both of these.
        position_grid: Tokens along X, Y, Z that a learned table has; for any other grid it is interpolated.
        rotary_base: Rotary positions turn pair i of n by the index of the token times this to the power of -i / n.
        rotary_pairs: Channels of a head that rotary positions turn as a pair: ``halves``, channel i of the first and of
            the second half; ``neighbours``, channels 2 i and 2 i + 1.
        num_registers: Learned tokens beside those of the volume, which attention may use as a store (Darcet et al.
            2024).
        mlp: ``gelu`` or the gated ``swiglu``.
        mlp_norm: Norm the hidden channels of every MLP.
        attention_norm: Norm what the heads of attention give, before it is projected.
        key_bias: Give keys of attention a bias, as queries and values have.
        layer_scale: Start of a learned factor for each channel of a branch, such as 0.1; null for none.
        norm_eps: What norms add to the variance.
        recompute: Trade time for memory: recompute the blocks in the backward pass.
        drop_path: Chance that a sample goes without a branch of the last block, in training; falls linearly to the
            first block (stochastic depth).
    """

    token_edge: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    positions: Literal["sincos", "rotary", "learned", "learned_rotary"] = "sincos"
    position_grid: Triple = (6, 6, 6)
    rotary_base: float = 100.0
    rotary_pairs: RotaryPairs = "halves"
    num_registers: int = 0
    mlp: Literal["gelu", "swiglu"] = "gelu"
    mlp_norm: bool = False
    attention_norm: bool = False
    key_bias: bool = True
    layer_scale: float | None = None
    norm_eps: float = 1e-6
    recompute: bool = False
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("in_channels", 1, 1024),
            ("token_edge", 1, 256),
            ("width", 1, 2**16),
            ("depth", 1, 1000),
            ("num_heads", 1, 2**16),
            ("num_registers", 0, _MOST_REGISTERS),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"backbone {name} is {value}; it must be from {least} to {most}.")
        if not all(1 <= tokens <= 64 for tokens in self.position_grid):
            raise ConfigError(
                f"position_grid is {list(self.position_grid)}; it must be three numbers of tokens from 1 to 64."
            )
        if not 0 < self.mlp_ratio <= 64:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}; it must be above 0 and at most 64, such as 4.")
        if not 0 <= self.drop_path < 1:
            raise ConfigError(f"drop_path is {self.drop_path}; it must lie between 0 and 1 (1 excluded), such as 0.1.")
        if self.layer_scale is not None and not 0 < self.layer_scale <= 1:
            raise ConfigError(f"layer_scale is {self.layer_scale}; it must be above 0 and at most 1, or null for none.")
        if not 1 < self.rotary_base <= 1e9:
            raise ConfigError(f"rotary_base is {self.rotary_base}; it must be above 1 and at most 1e9, such as 100.")
        if not 0 < self.norm_eps <= 0.1:
            raise ConfigError(f"norm_eps is {self.norm_eps}; it must be above 0 and at most 0.1, such as 1e-6.")
        if self.width % self.num_heads:
            raise ConfigError(
                f"token width {self.width} is not a multiple of num_heads ({self.num_heads}); "
                "choose one that divides it."
            )
        head_dim = self.width // self.num_heads
        if self.turns_queries and (head_dim % 2 or head_dim < 6):
            raise ConfigError(
                f"token width {self.width} over {self.num_heads} heads makes heads of {head_dim} channels; rotary "
                "positions need an even number of at least 6: use another num_heads, or --backbone.positions sincos."
            )

    @property
    def learns_positions(self) -> bool:
        """Whether a learned table of positions is added to the tokens."""
        return self.positions in ("learned", "learned_rotary")

    @property
    def learned_size(self) -> Triple | None:
        """Voxels of the volume that the learned table is for; None without one."""
        x, y, z = (tokens * self.token_edge for tokens in self.position_grid)
        return (x, y, z) if self.learns_positions else None

    @property
    def turns_queries(self) -> bool:
        """Whether rotary positions turn queries and keys."""
        return self.positions in ("rotary", "learned_rotary")

    @property
    def encoder_class(self) -> "type[ViTEncoder]":
        """The network."""
        return ViTEncoder

    @property
    def input_multiple(self) -> Triple:
        """A token along each axis."""
        return self.token_edge, self.token_edge, self.token_edge

    @property
    def widths(self) -> tuple[int, ...]:
        """The width, as backbones of several stages have one for each."""
        return (self.width,)

    @property
    def depths(self) -> tuple[int, ...]:
        """The depth, as backbones of several stages have one for each."""
        return (self.depth,)


class ViTEncoder(VisibleEncoder, MaskTokenEncoder):
    """Patch embedding, transformer blocks, norm; one feature map at the stride of a token.

    Args:
        recipe: Its settings.
    """

    def __init__(self, recipe: ViT) -> None:
        super().__init__()
        self.recipe: ViT = recipe
        self.strides, self.widths = (recipe.token_edge,), recipe.widths
        self.embed_dim = self.stem_dim = recipe.width
        self.stem_size = recipe.token_size
        self.registers = nn.Parameter(torch.empty(recipe.num_registers, recipe.width)) if recipe.num_registers else None
        num_positions = math.prod(recipe.position_grid) if recipe.learns_positions else 0
        self.position_table = nn.Parameter(torch.empty(num_positions, recipe.width)) if num_positions else None
        self.embed = Projection(recipe.in_channels, recipe.width, recipe.token_edge)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                recipe.width,
                recipe.num_heads,
                recipe.mlp_ratio,
                drop_path,
                mlp=recipe.mlp,
                layer_scale=recipe.layer_scale,
                mlp_norm=recipe.mlp_norm,
                attention_norm=recipe.attention_norm,
                key_bias=recipe.key_bias,
                rotary_pairs=recipe.rotary_pairs,
                norm_eps=recipe.norm_eps,
            )
            for drop_path in drop_paths_of(recipe.drop_path, recipe.depths)[0]
        )
        self.norm = nn.LayerNorm(recipe.width, eps=recipe.norm_eps)
        self.apply(init_linear)
        if self.registers is not None:
            nn.init.normal_(self.registers, std=0.02)
        if self.position_table is not None:
            nn.init.normal_(self.position_table, std=0.02)

    def encode_visible(self, volume_BCXYZ: Tensor, visible_BV: Tensor) -> Tensor:
        """Tokens ``(B, V, E)`` of the visible places; nothing is computed at hidden ones."""
        grid = token_grid(tuple(volume_BCXYZ.shape), self.token_size)
        blocks_BLpppC = to_blocks(volume_BCXYZ, self.token_size)
        batch_B1 = torch.arange(len(visible_BV), device=visible_BV.device)[:, None]
        embedded = self.embed(blocks_BLpppC[batch_B1, visible_BV].flatten(0, 1))
        return self._transform(embedded.reshape(*visible_BV.shape, self.embed_dim), grid, visible_BV)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """The normed tokens as one map ``(B, width, X / token_edge, ...)``.

        Raises:
            ConfigError: An axis of the input is no multiple of the token size.
        """
        return self._map(self._embedded(volume_BCXYZ))

    def masked_feature_maps(self, volume_BCXYZ: Tensor, hidden_BXYZ: Tensor, token_E: Tensor) -> list[Tensor]:
        """The map of :meth:`feature_maps`, with hidden tokens shown as the learned one.

        Raises:
            ConfigError: An axis of the input is no multiple of the token size.
        """
        embedded_BXYZE = self._embedded(volume_BCXYZ)
        return self._map(torch.where(hidden_BXYZ[..., None], token_E.to(embedded_BXYZE), embedded_BXYZE))

    def _embedded(self, volume_BCXYZ: Tensor) -> Tensor:
        check_multiple(tuple(volume_BCXYZ.shape[2:]), self.input_multiple)
        embedded: Tensor = self.embed(volume_BCXYZ.permute(0, 2, 3, 4, 1))
        return embedded

    def _map(self, embedded_BXYZE: Tensor) -> list[Tensor]:
        x, y, z = embedded_BXYZE.shape[1:4]
        tokens_BLE = self._transform(embedded_BXYZE.flatten(1, 3), (x, y, z))
        return [torch.unflatten(tokens_BLE, 1, (x, y, z)).permute(0, 4, 1, 2, 3)]

    def _transform(self, tokens_BVE: Tensor, grid: Triple, visible_BV: Tensor | None = None) -> Tensor:
        """Embedded tokens with their positions through all blocks, normed; all of the grid, or the visible ones."""
        angles_BVd = None
        if self.position_table is not None:
            table_LE = resized_positions(self.position_table, self.recipe.position_grid, grid)
            tokens_BVE = tokens_BVE + _at(table_LE.to(tokens_BVE), visible_BV)
        elif self.recipe.positions == "sincos":
            tokens_BVE = tokens_BVE + _at(sincos_positions(grid, self.embed_dim).to(tokens_BVE), visible_BV)
        if self.recipe.turns_queries:
            angles_Ld = rotary_angles(grid, self.embed_dim // self.recipe.num_heads, self.recipe.rotary_base)
            angles_BVd = _at(angles_Ld.to(tokens_BVE.device), visible_BV)
        num_registers = self.recipe.num_registers
        if self.registers is not None:
            registers_BRE = self.registers.to(tokens_BVE.dtype).expand(tokens_BVE.shape[0], -1, -1)
            tokens_BVE = torch.cat([registers_BRE, tokens_BVE], dim=1)
            if angles_BVd is not None:
                # A register lies nowhere: it is not turned.
                angles_BVd = F.pad(angles_BVd, (0, 0, num_registers, 0))
        for block in self.blocks:
            if self.recipe.recompute and torch.is_grad_enabled():
                tokens_BVE = checkpoint(block, tokens_BVE, angles_BVd, use_reentrant=False)
            else:
                tokens_BVE = block(tokens_BVE, angles_BVd)
        return self.norm(tokens_BVE[:, num_registers:])


def _at(table_LE: Tensor, visible_BV: Tensor | None) -> Tensor:
    """Rows of a table of the whole grid at the visible tokens ``(B, V, E)``, or all of them ``(1, L, E)``."""
    return table_LE[None] if visible_BV is None else table_LE[visible_BV]


#: The settings that all sizes of Primus share; this is M. Its learned positions fit crops of 96 voxels.
PRIMUS = ViT(
    token_edge=8,
    width=864,
    depth=16,
    num_heads=12,
    positions="learned_rotary",
    position_grid=(12, 12, 12),
    rotary_base=10_000.0,
    rotary_pairs="neighbours",
    mlp="swiglu",
    mlp_norm=True,
    attention_norm=True,
    key_bias=False,
    layer_scale=0.1,
    norm_eps=1e-5,
)
