"""A plain vision transformer (Dosovitskiy et al. 2021): one feature map, and every token is always seen."""

from dataclasses import dataclass

from torch import Tensor, nn

from mim3d.backbones.contract import Backbone, Encoder, check_multiple
from mim3d.core.types import Triple
from mim3d.nn.blocks import TransformerBlock
from mim3d.nn.tokens import sincos_positions


class PlainEncoder(Encoder):
    """Patch embedding, transformer blocks, norm."""

    def __init__(self, recipe: "Plain") -> None:
        super().__init__()
        edge, width = recipe.token_edge, recipe.width
        self.recipe, self.strides, self.widths = recipe, (edge,), (width,)
        self.embed = nn.Conv3d(recipe.in_channels, width, kernel_size=edge, stride=edge)
        self.blocks = nn.ModuleList(TransformerBlock(width, recipe.num_heads) for _ in range(recipe.depth))
        self.norm = nn.LayerNorm(width)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        check_multiple(tuple(volume_BCXYZ.shape[2:]), self.input_multiple)
        embedded_BExyz = self.embed(volume_BCXYZ)
        x, y, z = embedded_BExyz.shape[2:]
        tokens_BLE = embedded_BExyz.flatten(2).mT
        tokens_BLE = tokens_BLE + sincos_positions((x, y, z), self.widths[0]).to(tokens_BLE)
        for block in self.blocks:
            tokens_BLE = block(tokens_BLE)
        return [self.norm(tokens_BLE).mT.unflatten(2, (x, y, z))]


@dataclass(frozen=True, kw_only=True)
class Plain(Backbone):
    """Settings of the plain vision transformer."""

    token_edge: int = 8
    width: int = 24
    depth: int = 2
    num_heads: int = 4

    encoder_class = PlainEncoder

    @property
    def input_multiple(self) -> Triple:
        return self.token_edge, self.token_edge, self.token_edge
