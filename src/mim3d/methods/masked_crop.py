"""One crop of a scan, some places of which are hidden and predicted: what MAE and SimMIM have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from mim3d.backbones.contract import Backbone, check_multiple, common_multiple, size_text
from mim3d.core.types import Triple
from mim3d.methods.contract import ALL_CONSTANT, COLLAPSED_SPREAD, idle_part
from mim3d.methods.crops import by_text, check_crop, median_shape, padding_ratio
from mim3d.methods.masked import MaskedMethod
from mim3d.methods.mim.hierarchy import Hierarchy, Level
from mim3d.methods.mim.sampler import HierarchySampler
from mim3d.nn.decoder import rebuilt
from mim3d.nn.losses import Error, reconstruction_target, spread
from mim3d.nn.tokens import split_tokens, take_tokens
from mim3d.nn.volumes import patchify
from mim3d.objective import Batch, Objective, StepOutput, Tokens

# Shape suffixes: B crops, C channels, X Y Z space, L places, H hidden places, P voxels of a place, N tokens, E width.

#: Name of the crop in batches and logs (``loss/crop``).
CROP = "crop"

#: Scans that settings are planned for where nobody says which: a crop of the papers' size.
_ANY_SHAPES = ((96, 96, 96),)


@dataclass(frozen=True, kw_only=True)
class MaskedCropMethod(MaskedMethod):
    """Settings of a method that hides places of a single crop.

    Attributes:
        size: Voxels of a crop along X, Y, Z; planned from the scans when left out.
        mask_ratio: Hidden share of its places, half rounded up.
        mask_size: Voxels along X, Y, Z of a place, which is hidden or visible as a whole; planned when left out.
    """

    size: Triple | None = None
    mask_ratio: float = 0.75
    mask_size: Triple | None = None

    @abstractmethod
    def own_mask_size(self, backbone: Backbone, shape: Triple) -> Triple:
        """Voxels of a place that suit a backbone and scans of ``shape`` voxels."""

    @abstractmethod
    def check_mask_size(self, backbone: Backbone, mask_size: Triple) -> None:
        """Refuse places that the backbone cannot hide.

        Raises:
            ConfigError: The sentence names a size that fits.
        """

    @abstractmethod
    def largest_size(self, backbone: Backbone, mask_size: Triple) -> Triple:
        """Voxels of a planned crop at most."""

    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with the sizes of places and crops; refuses crops that are mostly padding on these scans."""
        shape = median_shape(shapes)
        mask_size = self.mask_size or self.own_mask_size(backbone, shape)
        self.check_mask_size(backbone, mask_size)
        step = common_multiple(mask_size, backbone.input_multiple)
        fitting = _rounded(shape, step, self.largest_size(backbone, mask_size))
        size = self.size or fitting
        check_multiple(size, step, "method.size")
        otherwise = "use a backbone with smaller tokens, or places of fewer voxels"
        check_crop("method.size", size, fitting, shapes, otherwise=otherwise)
        planned = replace(self, size=size, mask_size=mask_size)
        planned.hierarchy(backbone)
        return planned

    def hierarchy(self, backbone: Backbone) -> Hierarchy:
        """The crop as the only level of a hierarchy.

        Raises:
            ConfigError: Everything would be hidden, or nothing.
        """
        if self.size is None or self.mask_size is None:
            return self.planned(backbone, _ANY_SHAPES).hierarchy(backbone)
        level = Level(name=CROP, footprint=self.size, size=self.size, mask_ratio=self.mask_ratio)
        return Hierarchy((level,), self.mask_size)

    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """The crop and what of it is hidden."""
        hierarchy = self.hierarchy(backbone)
        (crop,) = hierarchy.levels
        return [
            f"crop: {by_text(crop.level.size)} voxels, {crop.num_hidden_units} of its {crop.num_units} places of "
            f"{size_text(hierarchy.token_size)} voxels hidden"
        ]

    def details(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Padding."""
        (crop,) = self.hierarchy(backbone).levels
        return [f"padding: {padding_ratio(crop.level.footprint, shapes):.0%} of a crop on average"]

    def sampler(self, backbone: Backbone) -> HierarchySampler:
        """Draws a crop and its mask."""
        return HierarchySampler(self, self.hierarchy(backbone))

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """A reconstruction no better than a constant guess; an encoder whose features are all alike."""
        sentences = idle_part(final_logs, CROP, "the reconstruction", nothing=ALL_CONSTANT)
        if final_logs.get(f"spread/{CROP}", 1.0) < COLLAPSED_SPREAD:
            sentences.append(
                f"the encoder has collapsed: its features are nearly the same everywhere (spread "
                f"{final_logs[f'spread/{CROP}']:.4f}, where 1 is as if drawn at random); lower the learning rate"
            )
        return sentences


class MaskedCropObjective(Objective):
    """Predicts the voxels of hidden places.

    Args:
        settings: Settings of the method.
        backbone: The encoder's recipe.
        normalised: Whether the target is each place's voxels at mean 0 and variance 1.
        error: Mean difference of prediction and target.
    """

    def __init__(
        self,
        settings: MaskedCropMethod,
        backbone: Backbone,
        *,
        normalised: bool,
        error: Error,
    ) -> None:
        super().__init__()
        self.encoder = backbone.build()
        self.normalised, self.error = normalised, error
        hierarchy = settings.hierarchy(backbone)
        (self.crop,) = hierarchy.levels
        self.mask_size = hierarchy.token_size
        num_hidden = self.crop.num_hidden_units
        self.tokens_per_sample = (Tokens(CROP, 1, self.crop.num_units - num_hidden, num_hidden),)

    @abstractmethod
    def predict(self, volume_BCXYZ: Tensor, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted voxels ``(B, H, P)`` of the hidden places, as :func:`patchify` orders them, and features.

        The features of the encoder ``(B, N, E)`` are for logs alone.
        """

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Error over hidden voxels. Logged beside it: that of a constant guess, the spread of the features, and air."""
        volume_BCXYZ, hidden_BL = (batch[key].flatten(0, 1) for key in (CROP, f"hidden/{CROP}"))
        predicted_BHP, features_BNE = self.predict(volume_BCXYZ, hidden_BL)
        voxels_BHP = take_tokens(patchify(volume_BCXYZ, self.mask_size), self.places(hidden_BL)[1])
        target_BHP = reconstruction_target(voxels_BHP, normalised=self.normalised)
        loss = self.error(predicted_BHP, target_BHP)
        logs = {
            f"loss/{CROP}": loss.detach(),
            f"guess/{CROP}": self.error.guess(target_BHP, volume_BCXYZ.shape[1]),
            f"spread/{CROP}": spread(features_BNE.detach().flatten(0, 1)),
        }
        if "air" in batch:
            logs["air"] = batch["air"].mean()
        return StepOutput(loss, logs)

    def places(self, hidden_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Raster indices of the visible places and of the hidden ones."""
        return split_tokens(hidden_BL, self.crop.num_hidden_units)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Original, masked and reconstructed first crop, first channel, as ``(X, Y, Z)``."""
        volume, hidden = (batch[key][:1].flatten(0, 1)[:1] for key in (CROP, f"hidden/{CROP}"))
        predicted, _ = self.predict(volume, hidden)
        shown = rebuilt(volume, self.places(hidden)[1], predicted, self.mask_size, normalised=self.normalised)
        return {f"{CROP}/{kind}": picture for kind, picture in shown.items()}


def _rounded(shape: Triple, step: Triple, most: Triple) -> Triple:
    """The multiples of ``step`` nearest to a shape, at least one and at most those within ``most``."""
    x, y, z = (
        max(1, min(largest // edge, round(voxels / edge))) * edge
        for voxels, edge, largest in zip(shape, step, most, strict=True)
    )
    return x, y, z
