"""A U-Net-style decoder over the feature maps of any encoder."""

import itertools
from collections.abc import Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional as F

# Shape suffixes: B batch, C channels of the input, K classes, X Y Z space.


class FeaturePyramid(nn.Module):
    """Finer maps beside the only one of an encoder, such as a plain vision transformer (ViTDet, Li et al. 2022).

    Each doubles the resolution of the next coarser one at half its channels: transposed convolution, LayerNorm, GELU.

    Args:
        stride: Down-sampling of the map.
        width: Channels of the map.

    Attributes:
        strides: Down-sampling of each map that comes out, finest first: 2 or the least odd stride, then twice the one
            before, up to the given one.
        widths: Channels of each of them.
    """

    def __init__(self, stride: int, width: int) -> None:
        super().__init__()
        strides, widths = [stride], [width]
        self.ups = nn.ModuleList()
        self.norms = nn.ModuleList()
        while strides[0] > 2 and strides[0] % 2 == 0:
            strides.insert(0, strides[0] // 2)
            widths.insert(0, -(-widths[0] // 2))
            self.ups.append(nn.ConvTranspose3d(widths[1], widths[0], kernel_size=2, stride=2))
            self.norms.append(nn.LayerNorm(widths[0], eps=1e-6))
        self.strides, self.widths = tuple(strides), tuple(widths)

    def forward(self, features_BCXYZ: Tensor) -> list[Tensor]:
        """Maps ``(B, widths[i], X / strides[i], ...)``, finest first; the last is the one that was given."""
        maps = [features_BCXYZ]
        for up, norm in zip(self.ups, self.norms, strict=True):
            finer_BXYZC = norm(up(maps[0]).movedim(1, -1))
            maps.insert(0, F.gelu(finer_BXYZC).movedim(-1, 1))
        return maps


class UNetDecoder(nn.Module):
    """Brings feature maps back to full resolution, with a skip connection at every stage (as SwinUNETR does).

    The encoder's finest map has a stride above 1, so a residual block on the input itself gives the skip at full
    resolution. An encoder with a single map gets a pyramid first.

    Args:
        in_channels: Channels of the input.
        strides: Down-sampling of each map, finest first, each a multiple of the one before.
        widths: Channels of each map.
        feature_dim: Channels at full resolution.
        num_classes: Channels of the output.
        deep_supervision: Whether the coarser levels of the decoder get heads too (Lee et al. 2015).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        strides: Sequence[int],
        widths: Sequence[int],
        feature_dim: int,
        num_classes: int,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramid(strides[0], widths[0]) if len(strides) == 1 else None
        if self.pyramid is not None:
            strides, widths = self.pyramid.strides, self.pyramid.widths
        self.stem = _residual(in_channels, feature_dim)
        self.skips = nn.ModuleList(_residual(width, width) for width in widths)
        self.ups = nn.ModuleList()
        levels = [(1, feature_dim), *zip(strides, widths, strict=True)]
        for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels):
            factor = coarser_stride // stride
            self.ups.append(UnetrUpBlock(3, coarser_width, width, 3, factor, norm_name="instance", res_block=True))
        self.head = UnetOutBlock(3, feature_dim, num_classes)
        # The coarsest map comes from the encoder as it is; all levels between it and full resolution are the decoder's.
        coarser = widths[:-1] if deep_supervision else ()
        self.deep_heads = nn.ModuleList(UnetOutBlock(3, width, num_classes) for width in coarser)

    def forward(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` from the input and the encoder's maps ``(B, widths[i], X / strides[i], ...)``."""
        logits: Tensor = self.head(self._levels(volume_BCXYZ, maps)[0])
        return logits

    def heads_of(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every head, finest first: ``(B, K, X / stride, ...)``, stride 1 before the encoder's strides."""
        levels = self._levels(volume_BCXYZ, maps)
        heads = [self.head, *self.deep_heads]
        return [head(features) for head, features in zip(heads, levels[: len(heads)], strict=True)]

    def _levels(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Features of the decoder at every level, finest first."""
        if self.pyramid is not None:
            maps = self.pyramid(maps[0])
        skips = [self.stem(volume_BCXYZ)]
        skips += [block(features) for block, features in zip(self.skips, maps, strict=True)]
        features = skips.pop()
        levels: list[Tensor] = []
        for up in reversed(self.ups):
            features = up(features, skips.pop())
            levels.insert(0, features)
        return levels


def _residual(dim_in: int, dim_out: int) -> UnetrBasicBlock:
    return UnetrBasicBlock(3, dim_in, dim_out, kernel_size=3, stride=1, norm_name="instance", res_block=True)
