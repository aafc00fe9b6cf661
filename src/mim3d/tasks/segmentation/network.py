"""The segmentation network and what it learns by."""

import torch
from torch import Tensor

from mim3d.backbones.contract import Encoder
from mim3d.objective import Batch, StepOutput
from mim3d.tasks.freezing import FreezingObjective
from mim3d.tasks.segmentation.losses import LossWeights, SegmentationLoss, head_weights
from mim3d.tasks.segmentation.targets import Targets
from mim3d.tasks.segmentation.unet import UNetDecoder

# Shape suffixes: B samples, C channels of the input, K channels of the output, X Y Z space.


class SegmentationObjective(FreezingObjective):
    """Encoder and U-Net decoder, trained with Dice and cross-entropy.

    Args:
        encoder: Gives the feature maps.
        in_channels: Number of channels of the input.
        targets: What the channels of the output stand for.
        feature_dim: Number of channels of the decoder at full resolution.
        weights: Terms of the loss and their weights.
        deep_supervision: Whether every resolution of the decoder has a head that learns too.
        freeze_encoder: Whether the encoder stays as it is.
        unfreeze_ratio: Share of training after which all of it learns, see ``Freezing``.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        in_channels: int,
        targets: Targets,
        feature_dim: int,
        weights: LossWeights,
        deep_supervision: bool = False,
        freeze_encoder: bool = False,
        unfreeze_ratio: float | None = None,
    ) -> None:
        super().__init__(encoder, freeze_encoder=freeze_encoder, unfreeze_ratio=unfreeze_ratio)
        self.targets = targets
        self.decoder = UNetDecoder(
            in_channels=in_channels,
            strides=encoder.strides,
            widths=encoder.widths,
            feature_dim=feature_dim,
            num_classes=len(targets.names),
            deep_supervision=deep_supervision,
        )
        self.loss = SegmentationLoss(targets, weights)

    def logits(self, volume_BCXYZ: Tensor) -> Tensor:
        """Return logits ``(B, K, X, Y, Z)`` of the input; its axes must be multiples of the encoder's token edge."""
        logits: Tensor = self.decoder(volume_BCXYZ, self.features(volume_BCXYZ))
        return logits

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Return the weighted sum of the terms of the loss, each logged; with deep supervision their mean over heads.

        Args:
            batch: ``image`` ``(B, 1, C, X, Y, Z)``, ``label`` ``(B, 1, X, Y, Z)`` in label values, and where cases are
                annotated in part, ``annotated`` ``(B, K)``.
            progress: Decides which layers of the encoder learn.
        """
        if self.training:
            self.freezing.at(progress)
        image, label = batch["image"].flatten(0, 1), batch["label"].flatten(0, 1)
        heads = self.decoder.heads_of(image, self.features(image)) if self.decoder.deep_heads else [self.logits(image)]
        means: dict[str, Tensor] = {}
        for share, logits in zip(head_weights(len(heads)), heads, strict=True):
            terms = self.loss(logits.float(), shrunk(label, label.shape[1] // logits.shape[2]), batch.get("annotated"))
            means = {name: means.get(name, 0.0) + share * term for name, term in terms.items()}
        logs = {f"loss/{name}": term.detach() for name, term in means.items()}
        return StepOutput(self.loss.total(means), logs)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the first crop of the batch, its reference and the prediction in label values, as ``(X, Y, Z)``."""
        image_BCXYZ = batch["image"][:1].flatten(0, 1)
        return {
            "segmentation/image": image_BCXYZ[0, 0],
            "segmentation/reference": batch["label"][0, 0],
            "segmentation/prediction": self.targets.labels_of(self.targets.probabilities(self.logits(image_BCXYZ)[0])),
        }


def shrunk(label_BXYZ: Tensor, factor: int) -> Tensor:
    """Return every ``factor``-th voxel along each axis, the one nearest to the middle of its cube."""
    if factor == 1:
        return label_BXYZ
    places = slice(factor // 2, None, factor)
    return label_BXYZ[:, places, places, places]
