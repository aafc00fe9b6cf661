"""A U-Net-style decoder over the feature maps of any encoder."""

import itertools
from collections.abc import Sequence

from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn

# Shape suffixes: B batch, C channels of the input, K classes, X Y Z space.


class UNetDecoder(nn.Module):
    """Brings feature maps back to full resolution, with a skip connection at every stage (as SwinUNETR does).

    The encoder's finest map has a stride above 1, so a residual block on the input itself gives the skip at full
    resolution.

    Args:
        in_channels: channels of the input.
        strides: down-sampling of each map, finest first, each a multiple of the one before.
        widths: channels of each map.
        feature_dim: channels at full resolution.
        num_classes: output channels, background included.
    """

    def __init__(
        self, *, in_channels: int, strides: Sequence[int], widths: Sequence[int], feature_dim: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = _residual(in_channels, feature_dim)
        self.skips = nn.ModuleList(_residual(width, width) for width in widths)
        self.ups = nn.ModuleList()
        levels = [(1, feature_dim), *zip(strides, widths, strict=True)]
        for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels):
            factor = coarser_stride // stride
            self.ups.append(UnetrUpBlock(3, coarser_width, width, 3, factor, norm_name="instance", res_block=True))
        self.head = UnetOutBlock(3, feature_dim, num_classes)

    def forward(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` from the input and the encoder's maps ``(B, widths[i], X / strides[i], ...)``."""
        skips = [self.stem(volume_BCXYZ)]
        skips += [block(features) for block, features in zip(self.skips, maps, strict=True)]
        features = skips.pop()
        for up in reversed(self.ups):
            features = up(features, skips.pop())
        logits: Tensor = self.head(features)
        return logits


def _residual(dim_in: int, dim_out: int) -> UnetrBasicBlock:
    return UnetrBasicBlock(3, dim_in, dim_out, kernel_size=3, stride=1, norm_name="instance", res_block=True)
