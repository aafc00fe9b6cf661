"""MAE, masked autoencoders (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022), in 3-D."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mim3d.backbones import BACKBONES
from mim3d.backbones.contract import Backbone, VisibleEncoder, size_text
from mim3d.core.errors import ConfigError
from mim3d.core.settings import to_named
from mim3d.core.types import Triple
from mim3d.methods.masked import MaskedAutoencoding
from mim3d.methods.masked_crop import MaskedCropMethod, MaskedCropObjective
from mim3d.methods.mim.objective import encode_in_chunks
from mim3d.nn.decoder import MapDecoder, TokenDecoder
from mim3d.nn.losses import SQUARED_ERROR
from mim3d.nn.tokens import take_tokens
from mim3d.nn.volumes import patchify, unpatchify
from mim3d.training.schedule import Optimisation

# Shape suffixes: B crops, C channels, X Y Z space, L places, V visible and H hidden ones, P voxels of a place, E width.

#: Most tokens along an axis of a planned crop where visible tokens alone are computed: 96 voxels for tokens of 16.
_MOST_TOKENS = 6

#: Largest edge of a planned crop where every place is computed.
_LARGEST_EDGE = 96

#: Edge of a hidden place there, and where scans have less than four of them along an axis.
_PLACE, _SMALL_PLACE = 16, 8


@dataclass(frozen=True, kw_only=True)
class MAE(MaskedCropMethod, MaskedAutoencoding):
    """Settings of MAE, the masked autoencoder: hidden places of a crop are reconstructed from visible ones.

    An encoder that can be shown visible tokens alone (hybrid, vit) computes nothing else; its hidden places are its
    tokens. Any other (of convolutions, say) sees the whole crop with hidden places filled, and a convolutional decoder
    brings its feature maps back to voxels, as the winner of the OpenMind benchmark does (Wald et al. 2024).

    Attributes:
        mask_fill: What an encoder that computes every place sees in hidden ones: a learned token, or zeros.
        skip_connections: Whether the decoder of such an encoder gets all of its maps, as in a U-Net; false gives it the
            coarsest alone.
    """

    mask_fill: Literal["learned", "zero"] = "learned"
    skip_connections: bool = True

    @property
    def optimisation(self) -> Optimisation:
        """AdamW of the paper: base rate 1.5e-4 for 256 crops, 5 % warm-up (40 of 800 epochs), cosine to 0."""
        return Optimisation(
            base_learning_rate=1.5e-4,
            reference_batch=256,
            weight_decay=0.05,
            betas=(0.9, 0.95),
            warmup_ratio=0.05,
        )

    def check_backbone(self, backbone: Backbone) -> None:
        """Refuse settings that mean nothing for the decoder of this backbone."""
        super().check_backbone(backbone)
        idle, why = ["decoder_dim", "decoder_depth", "decoder_num_heads"], "a backbone of feature maps"
        if issubclass(backbone.encoder_class, VisibleEncoder):
            idle, why = ["mask_fill", "skip_connections"], "an encoder that is shown visible tokens alone"
        for name in idle:
            if getattr(self, name) != getattr(MAE, name):
                kind = to_named(backbone, BACKBONES)["name"]
                raise ConfigError(
                    f"method.{name} ({getattr(self, name)}) means nothing for {why}, as that of backbone {kind} is; "
                    "leave it out."
                )

    def own_mask_size(self, backbone: Backbone, shape: Triple) -> Triple:
        """The token of an encoder that is shown visible ones alone; else 16^3, in small scans 8^3."""
        if issubclass(backbone.encoder_class, VisibleEncoder):
            return backbone.token_size
        edge = _PLACE if min(shape) >= 4 * _PLACE else _SMALL_PLACE
        return edge, edge, edge

    def check_mask_size(self, backbone: Backbone, mask_size: Triple) -> None:
        """Visible tokens alone can be shown only where a place is a token."""
        if issubclass(backbone.encoder_class, VisibleEncoder) and mask_size != backbone.token_size:
            raise ConfigError(
                f"method.mask_size is {size_text(mask_size)}, but this backbone hides its tokens of "
                f"{size_text(backbone.token_size)} voxels; leave mask_size out."
            )
        if min(mask_size) < 1:
            raise ConfigError(f"method.mask_size {list(mask_size)} must be at least 1 voxel along every axis.")

    def largest_size(self, backbone: Backbone, mask_size: Triple) -> Triple:
        """Six tokens along an axis; 96 voxels where every place is computed."""
        if not issubclass(backbone.encoder_class, VisibleEncoder):
            return _LARGEST_EDGE, _LARGEST_EDGE, _LARGEST_EDGE
        x, y, z = (_MOST_TOKENS * edge for edge in mask_size)
        return x, y, z

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with the sizes of tokens and crops, and of a decoder of visible tokens."""
        planned = super().planned(backbone, shapes)
        if not issubclass(backbone.encoder_class, VisibleEncoder):
            return planned
        dim, depth, num_heads = self.decoder(backbone)
        return replace(planned, decoder_dim=dim, decoder_depth=depth, decoder_num_heads=num_heads)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The crop, what of it is hidden, and what the encoder computes."""
        lines = super().summary(backbone, shapes)
        if issubclass(backbone.encoder_class, VisibleEncoder):
            return [*lines, "the encoder computes visible tokens alone"]
        filled = "a learned token" if self.mask_fill == "learned" else "zeros"
        skips = "with skip connections" if self.skip_connections else "of the coarsest map alone"
        return [*lines, f"the encoder computes every place, hidden ones filled by {filled}; decoder {skips}"]

    def build(self, backbone: Backbone) -> MaskedCropObjective:
        """Encoder and decoder."""
        self.check_backbone(backbone)
        if issubclass(backbone.encoder_class, VisibleEncoder):
            return MAEObjective(self, backbone)
        return DenseMAEObjective(self, backbone)


class MAEObjective(MaskedCropObjective):
    """The encoder sees visible tokens alone; a transformer predicts the hidden ones from them.

    Args:
        settings: Settings of the method.
        backbone: The recipe of an encoder that can be shown visible tokens.
    """

    def __init__(self, settings: MAE, backbone: Backbone) -> None:
        super().__init__(settings, backbone, normalised=settings.normalise_targets, error=SQUARED_ERROR)
        assert isinstance(self.encoder, VisibleEncoder)
        out_dim = backbone.in_channels * self.mask_size[0] * self.mask_size[1] * self.mask_size[2]
        self.decoder = TokenDecoder(self.encoder.embed_dim, *settings.decoder(backbone), out_dim)

    def predict(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels of hidden tokens, and the encoder's visible ones."""
        assert isinstance(self.encoder, VisibleEncoder)
        visible_BV, hidden_BH = self.places(hidden_BL)
        encoded_BVE = encode_in_chunks(self.encoder, volume_BCXYZ, visible_BV)
        features_BLD = self.decoder([(encoded_BVE, visible_BV)], self.crop.token_grid)
        return self.decoder.predict(features_BLD, hidden_BH), encoded_BVE


class DenseMAEObjective(MaskedCropObjective):
    """The encoder sees the whole crop with hidden places filled; a convolutional decoder predicts all voxels.

    Args:
        settings: Settings of the method.
        backbone: The encoder's recipe.
    """

    def __init__(self, settings: MAE, backbone: Backbone) -> None:
        super().__init__(settings, backbone, normalised=settings.normalise_targets, error=SQUARED_ERROR)
        channels, (x, y, z) = backbone.in_channels, self.mask_size
        self.decoder = MapDecoder(
            self.encoder.strides, self.encoder.widths, channels, skip_connections=settings.skip_connections
        )
        learned = settings.mask_fill == "learned"
        self.mask_token = nn.Parameter(torch.empty(channels * x * y * z).normal_(std=0.02)) if learned else None

    def predict(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels of hidden places, and the encoder's coarsest map."""
        patches_BLP = patchify(volume_BCXYZ, self.mask_size)
        token_P = patches_BLP.new_zeros(()) if self.mask_token is None else self.mask_token.to(patches_BLP.dtype)
        filled_BLP = torch.where(hidden_BL[..., None], token_P, patches_BLP)
        maps = self.encoder.feature_maps(unpatchify(filled_BLP, self.crop.token_grid, self.mask_size))
        predicted_BLP = patchify(self.decoder(maps), self.mask_size)
        return take_tokens(predicted_BLP, self.places(hidden_BL)[1]), maps[-1].flatten(2).mT
