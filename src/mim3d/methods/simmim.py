"""SimMIM (Xie et al., "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022), in 3-D."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Backbone, MaskTokenEncoder, common_multiple, size_text
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.masked_crop import MaskedCropMethod, MaskedCropObjective
from mim3d.nn.blocks import init_linear
from mim3d.nn.losses import ABSOLUTE_ERROR
from mim3d.nn.tokens import split_units, take_tokens
from mim3d.nn.volumes import from_blocks, patchify, unpatchify
from mim3d.training.schedule import Optimisation

# Shape suffixes: B crops, C channels, X Y Z space, L blocks, H hidden ones, N places of the map in a block, P voxels of
# a block, E width.

#: Largest edge of a planned crop.
_LARGEST_EDGE = 96

#: Edge of a hidden block, and where scans have less than two of them along an axis.
_BLOCK, _SMALL_BLOCK = 32, 16


@dataclass(frozen=True, kw_only=True)
class SimMIM(MaskedCropMethod):
    """Settings of SimMIM: the encoder sees a learned token in hidden blocks, one layer predicts their voxels.

    Attributes:
        mask_ratio: Hidden share of its blocks, half rounded up.
        mask_size: Voxels along X, Y, Z of a block, which is hidden or visible as a whole; planned when left out.
    """

    mask_ratio: float = 0.6

    needs = MaskTokenEncoder

    @property
    def optimisation(self) -> Optimisation:
        """AdamW of the paper: base rate 1e-4 for 512 crops, 10 % warm-up (10 of 100 epochs), cosine to 0."""
        return Optimisation(
            base_learning_rate=1e-4,
            reference_batch=512,
            weight_decay=0.05,
            betas=(0.9, 0.999),
            warmup_ratio=0.1,
        )

    def own_mask_size(self, backbone: Backbone, shape: Triple) -> Triple:
        """32^3 voxels, in small scans 16^3; the next larger ones that hold whole tokens."""
        edge = _BLOCK if min(shape) >= 2 * _BLOCK else _SMALL_BLOCK
        return common_multiple((edge, edge, edge), self._outline(backbone).stem_size)

    def check_mask_size(self, backbone: Backbone, mask_size: Triple) -> None:
        """A block holds whole tokens of the stem, and whole places of the coarsest map or an equal part of one."""
        encoder = self._outline(backbone)
        stride = encoder.strides[-1]
        whole = all(edge > 0 and edge % stem == 0 for edge, stem in zip(mask_size, encoder.stem_size, strict=True))
        if not whole or any(edge % stride and stride % edge for edge in mask_size):
            raise ConfigError(
                f"method.mask_size is {size_text(mask_size)}, but a block must hold whole tokens of "
                f"{size_text(encoder.stem_size)} voxels, and whole places of the coarsest feature map of this backbone "
                f"({stride} voxels) or an equal part of one; use "
                f"{size_text(common_multiple(encoder.stem_size, (stride, stride, stride)))}, or leave mask_size out."
            )

    def largest_size(self, backbone: Backbone, mask_size: Triple) -> Triple:
        """96 voxels along every axis."""
        return _LARGEST_EDGE, _LARGEST_EDGE, _LARGEST_EDGE

    def _outline(self, backbone: Backbone) -> MaskTokenEncoder:
        """The encoder without values, for its strides and the tokens of its stem."""
        self.check_backbone(backbone)
        with torch.device("meta"):
            encoder = backbone.build()
        assert isinstance(encoder, MaskTokenEncoder)
        return encoder

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The crop, what of it is hidden, and what the encoder sees there."""
        return [
            *super().summary(backbone, shapes),
            "the encoder sees a learned token in place of hidden ones; one layer predicts their voxels",
        ]

    def build(self, backbone: Backbone) -> "SimMIMObjective":
        """Encoder, mask token and the layer that predicts."""
        self.check_backbone(backbone)
        return SimMIMObjective(self, backbone)


class SimMIMObjective(MaskedCropObjective):
    """Mean absolute error of hidden voxels, which one layer predicts from the coarsest map.

    Args:
        settings: Settings of the method.
        backbone: The recipe of an encoder that can show a learned token in place of hidden ones.
    """

    def __init__(self, settings: SimMIM, backbone: Backbone) -> None:
        super().__init__(settings, backbone, normalised=False, error=ABSOLUTE_ERROR)
        assert isinstance(self.encoder, MaskTokenEncoder)
        self.stride = self.encoder.strides[-1]
        self.mask_token = nn.Parameter(torch.empty(self.encoder.stem_dim).normal_(std=0.02))
        self.pred = nn.Linear(self.encoder.widths[-1], backbone.in_channels * self.stride**3)
        self.pred.apply(init_linear)

    def predict(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels of hidden blocks, and the encoder's coarsest map."""
        assert isinstance(self.encoder, MaskTokenEncoder)
        grid = self.crop.unit_grid
        hidden_BXYZ = hidden_BL.reshape(-1, *grid)
        for axis, (edge, stem) in enumerate(zip(self.mask_size, self.encoder.stem_size, strict=True), start=1):
            hidden_BXYZ = hidden_BXYZ.repeat_interleave(edge // stem, dim=axis)
        map_BXYZE = self.encoder.masked_feature_maps(volume_BCXYZ, hidden_BXYZ, self.mask_token)[-1].movedim(1, -1)
        hidden_BH = self.places(hidden_BL)[1]
        if all(edge % self.stride == 0 for edge in self.mask_size):
            predicted_BHP = self._within_blocks(map_BXYZE, hidden_BH)
        else:
            # A place of the map holds several blocks: all of it is predicted.
            x, y, z = map_BXYZE.shape[1:4]
            voxels = unpatchify(self.pred(map_BXYZE).flatten(1, 3), (x, y, z), (self.stride,) * 3)
            predicted_BHP = take_tokens(patchify(voxels, self.mask_size), hidden_BH)
        return predicted_BHP, map_BXYZE.flatten(1, 3)

    def _within_blocks(self, map_BXYZE: Tensor, hidden_BH: Tensor) -> Tensor:
        """Predictions from the places inside hidden blocks alone, which nobody needs elsewhere."""
        units_BLNE = split_units(map_BXYZE, self.crop.unit_grid)
        hidden_BHNE = torch.take_along_dim(units_BLNE, hidden_BH[:, :, None, None], dim=1)
        voxels_BHNP = self.pred(hidden_BHNE)
        x, y, z = (edge // self.stride for edge in self.mask_size)
        blocks = voxels_BHNP.reshape(hidden_BH.numel(), x * y * z, self.stride, self.stride, self.stride, -1)
        return from_blocks(blocks, (x, y, z)).reshape(*hidden_BH.shape, -1)
