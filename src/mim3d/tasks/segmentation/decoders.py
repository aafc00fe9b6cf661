"""Decoders that bring an encoder's feature maps back to full resolution, by name."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.blocks.unetr_block import UnetrBasicBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.nn.blocks import InstanceNorm, Pointwise, SingleVoxelNorm

# Shape suffixes: B samples, C channels of the input, K channels of the output, X Y Z space.

#: Slope of the leaky ReLU below zero, as in nnU-Net and UNETR.
_SLOPE = 0.01


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


class SegmentationDecoder(nn.Module, ABC):
    """Logits of every voxel from the input and the encoder's maps. An encoder with a single map gets a pyramid first.

    Args:
        in_channels: Channels of the input.
        strides: Down-sampling of each map, finest first, each a multiple of the one before.
        widths: Channels of each map.
        feature_dim: Channels at full resolution, where the encoder has no map of it.
        num_classes: Channels of the output.
        deep_supervision: Whether the coarser levels of the decoder get heads too (Lee et al. 2015).
    """

    head: nn.Module

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
        levels = list(zip(strides, widths, strict=True))
        # An encoder that works at full resolution gives the skip there too; for others the decoder reads the input.
        self.reads_input = strides[0] > 1 or len(strides) == 1
        if self.reads_input:
            levels.insert(0, (1, feature_dim))
        self._build(in_channels, levels)
        # The coarsest map comes from the encoder as it is; all levels between it and full resolution are the decoder's.
        finest, *coarser = [width for _, width in levels[:-1]]
        self.head = self._make_head(finest, num_classes)
        deep = coarser if deep_supervision else ()
        self.deep_heads = nn.ModuleList(self._make_head(width, num_classes) for width in deep)

    @abstractmethod
    def _build(self, in_channels: int, levels: Sequence[tuple[int, int]]) -> None:
        """Make everything but the heads.

        Args:
            in_channels: Channels of the input.
            levels: Stride and channels of every level, full resolution first: those of the encoder's maps, and where
                ``reads_input``, one above them that is made of the input.
        """

    @abstractmethod
    def _levels(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Features ``(B, channels, X / stride, ...)`` at full resolution and every map's but the coarsest's."""

    @staticmethod
    @abstractmethod
    def _make_head(width: int, num_classes: int) -> nn.Module:
        """What makes logits ``(B, K, X, Y, Z)`` of a level's features."""

    def forward(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` from the input and the encoder's maps ``(B, widths[i], X / strides[i], ...)``."""
        logits: Tensor = self.head(self.finest(volume_BCXYZ, maps))
        return logits

    def finest(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Features ``(B, F, X, Y, Z)`` of full resolution, which the head makes logits of."""
        return self._levels(volume_BCXYZ, self._pyramid_of(maps))[0]

    @property
    def linear_head(self) -> tuple[Tensor, Tensor] | None:
        """Weight ``(K, F)`` and bias ``(K,)`` of the head; None where it is more than a linear layer of each voxel."""
        layers = [layer for layer in self.head.modules() if not list(layer.children())]
        layer = layers[0] if len(layers) == 1 else None
        if not isinstance(layer, nn.Conv3d) or layer.kernel_size != (1, 1, 1) or layer.groups > 1 or layer.bias is None:
            return None
        return layer.weight.detach().flatten(1).float(), layer.bias.detach().float()

    def heads_of(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """Logits of every head, finest first: ``(B, K, X / stride, ...)``, stride 1 before the encoder's strides."""
        levels = self._levels(volume_BCXYZ, self._pyramid_of(maps))
        heads = [self.head, *self.deep_heads]
        return [head(features) for head, features in zip(heads, levels[: len(heads)], strict=True)]

    def _pyramid_of(self, maps: Sequence[Tensor]) -> Sequence[Tensor]:
        return maps if self.pyramid is None else self.pyramid(maps[0])


class UNetDecoder(SegmentationDecoder):
    """Skip connections joined by concatenation at every stage, and one at full resolution (as SwinUNETR has them).

    Where the encoder's finest map has a stride above 1, a residual block on the input itself gives the skip at full
    resolution.
    """

    def _build(self, in_channels: int, levels: Sequence[tuple[int, int]]) -> None:
        maps = levels[1:] if self.reads_input else levels
        self.stem = _residual(in_channels, levels[0][1]) if self.reads_input else None
        self.skips = nn.ModuleList(_residual(width, width) for _, width in maps)
        self.ups = nn.ModuleList()
        for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels):
            factor = coarser_stride // stride
            self.ups.append(UnetrUpBlock(3, coarser_width, width, 3, factor, norm_name="instance", res_block=True))
        # MONAI's blocks refuse a map of a single voxel, which the coarsest is where a crop is one token.
        for block in [block for block in self.modules() if not isinstance(block, SingleVoxelNorm)]:
            for name, norm in block.named_children():
                if isinstance(norm, nn.InstanceNorm3d):
                    setattr(block, name, SingleVoxelNorm(norm.num_features, norm.eps, affine=norm.affine))

    @staticmethod
    def _make_head(width: int, num_classes: int) -> nn.Module:
        return UnetOutBlock(3, width, num_classes)

    def _levels(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        skips = [] if self.stem is None else [self.stem(volume_BCXYZ)]
        skips += [block(features) for block, features in zip(self.skips, maps, strict=True)]
        features = skips.pop()
        levels: list[Tensor] = []
        for up in reversed(self.ups):
            features = up(features, skips.pop())
            levels.insert(0, features)
        return levels


def _residual(dim_in: int, dim_out: int) -> UnetrBasicBlock:
    return UnetrBasicBlock(3, dim_in, dim_out, kernel_size=3, stride=1, norm_name="instance", res_block=True)


class AdditiveDecoder(SegmentationDecoder):
    """Skip connections joined by addition, so that a level takes two convolutions fewer than after concatenation.

    As LinkNet (Chaurasia & Culurciello 2017) and FPN (Lin et al. 2017) join them. A level is a residual block of its
    skip plus the coarser level, which comes through a transposed convolution whose kernel is its stride. Skips are
    residual blocks of the input and of the maps, but of the finest map, where a block would cost most, a linear layer
    of the normed map.
    """

    def _build(self, in_channels: int, levels: Sequence[tuple[int, int]]) -> None:
        widths = [width for _, width in (levels[1:] if self.reads_input else levels)]
        self.stem = ResidualBlock(in_channels, levels[0][1]) if self.reads_input else None
        self.norm = nn.LayerNorm(widths[0], eps=1e-6)
        self.skip = Pointwise(widths[0], widths[0])
        self.skips = nn.ModuleList(ResidualBlock(width, width) for width in widths[1:])
        self.ups = nn.ModuleList(
            nn.ConvTranspose3d(coarser_width, width, coarser_stride // stride, coarser_stride // stride, bias=False)
            for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels)
        )
        self.blocks = nn.ModuleList(ResidualBlock(width, width) for _, width in levels[:-1])

    @staticmethod
    def _make_head(width: int, num_classes: int) -> nn.Module:
        return nn.Conv3d(width, num_classes, 1)

    def _skips(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """What the encoder gives to each level, finest first; the coarsest is where the decoder begins."""
        finest = self.skip(self.norm(maps[0].movedim(1, -1))).movedim(-1, 1)
        # Encoders may hold maps channels last, where convolutions are no faster, and norms and their gradients slower.
        full = [] if self.stem is None else [self.stem(volume_BCXYZ)]
        coarser = [block(features.contiguous()) for block, features in zip(self.skips, maps[1:], strict=True)]
        return [*full, finest.contiguous(), *coarser]

    def _levels(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        skips = self._skips(volume_BCXYZ, maps)
        features = skips.pop()
        levels: list[Tensor] = []
        for up, block in zip(reversed(self.ups), reversed(self.blocks), strict=True):
            features = block(up(features) + skips.pop())
            levels.insert(0, features)
        return levels


class AdapterDecoder(AdditiveDecoder):
    """The additive decoder, and beside the encoder a path of convolutions from the input, added to its maps.

    As the spatial prior module of ViT-Adapter (Chen et al., ICLR 2023) gives a plain transformer what convolutions see.
    The path begins with the skip at full resolution; a residual block whose first convolution has a stride leads to
    each coarser level.
    """

    def _build(self, in_channels: int, levels: Sequence[tuple[int, int]]) -> None:
        super()._build(in_channels, levels)
        self.downs = nn.ModuleList(
            ResidualBlock(width, coarser_width, coarser_stride // stride)
            for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels)
        )

    def _skips(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        """The encoder's, each but the finest with the path's map added."""
        first, *others = super()._skips(volume_BCXYZ, maps)
        skips, path = [first], first
        for down, skip in zip(self.downs, others, strict=True):
            path = down(path)
            skips.append(skip + path)
        return skips


class ResidualBlock(nn.Module):
    """Two dense 3^3 convolutions with instance norms and the residual around them (He et al. 2016; nnU-Net's ResEnc).

    Args:
        dim_in: Channels in.
        dim_out: Channels out.
        stride: Stride of the first convolution. Where it is not 1, or the channels change, the residual goes through a
            convolution whose kernel is the stride, and a norm.
    """

    def __init__(self, dim_in: int, dim_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(dim_in, dim_out, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv3d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm1, self.norm2 = (InstanceNorm(dim_out, affine=True) for _ in range(2))
        same = dim_in == dim_out and stride == 1
        self.residual = None if same else nn.Conv3d(dim_in, dim_out, stride, stride, bias=False)
        self.norm3 = None if same else InstanceNorm(dim_out, affine=True)

    def forward(self, features_BCXYZ: Tensor) -> Tensor:
        """Features ``(B, dim_out, X / stride, Y / stride, Z / stride)``."""
        branch = F.leaky_relu(self.norm1(self.conv1(features_BCXYZ)), _SLOPE)
        branch = self.norm2(self.conv2(branch))
        if self.residual is not None and self.norm3 is not None:
            features_BCXYZ = self.norm3(self.residual(features_BCXYZ))
        return F.leaky_relu(features_BCXYZ + branch, _SLOPE)


class NnUNetDecoder(SegmentationDecoder):
    """That of nnU-Net's residual-encoder U-Net (Isensee et al. 2021 and 2024): the encoder's maps are the skips.

    A level is a transposed convolution of the coarser one, whose kernel is its stride, joined with the skip by
    concatenation, and one convolution. The full resolution of an encoder without a map of it is a convolution on the
    input, as nnU-Net's encoders begin.
    """

    def _build(self, in_channels: int, levels: Sequence[tuple[int, int]]) -> None:
        self.stem = self._convolution(in_channels, levels[0][1]) if self.reads_input else None
        self.ups = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for (stride, width), (coarser_stride, coarser_width) in itertools.pairwise(levels):
            factor = coarser_stride // stride
            self.ups.append(nn.ConvTranspose3d(coarser_width, width, factor, factor))
            self.blocks.append(self._convolution(2 * width, width))
        self.apply(_init_convolution)

    @staticmethod
    def _convolution(dim_in: int, dim_out: int) -> nn.Module:
        norm = InstanceNorm(dim_out, affine=True)
        return nn.Sequential(nn.Conv3d(dim_in, dim_out, 3, padding=1), norm, nn.LeakyReLU(_SLOPE, inplace=True))

    @staticmethod
    def _make_head(width: int, num_classes: int) -> nn.Module:
        head = nn.Conv3d(width, num_classes, 1)
        _init_convolution(head)
        return head

    def _levels(self, volume_BCXYZ: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
        skips = [] if self.stem is None else [self.stem(volume_BCXYZ)]
        skips += maps
        features = skips.pop()
        levels: list[Tensor] = []
        for up, block in zip(reversed(self.ups), reversed(self.blocks), strict=True):
            features = block(torch.cat([up(features), skips.pop()], 1))
            levels.insert(0, features)
        return levels


def _init_convolution(module: nn.Module) -> None:
    """The first weights of nnU-Net's convolutions (He et al. 2015)."""
    if isinstance(module, (nn.Conv3d, nn.ConvTranspose3d)):
        nn.init.kaiming_normal_(module.weight, a=_SLOPE)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


#: Decoders by name.
DECODERS: dict[str, type[SegmentationDecoder]] = {
    "adapter": AdapterDecoder,
    "additive": AdditiveDecoder,
    "nnunet": NnUNetDecoder,
    "unet": UNetDecoder,
}
