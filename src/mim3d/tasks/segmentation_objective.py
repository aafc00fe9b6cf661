"""The segmentation network and its losses."""

from collections.abc import Sequence

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones.base import Encoder
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.tasks.unet import UNetDecoder

# Shape suffixes: B samples, C channels, K classes, X Y Z space.


class SegmentationObjective(Objective):
    """Encoder and U-Net decoder, trained with Dice and cross-entropy.

    Args:
        encoder: gives the feature maps.
        in_channels: channels of the input.
        label_values: label value of each class, background first.
        feature_dim: channels of the decoder at full resolution.
        background_in_dice: whether the background counts in the Dice loss.
        batch_dice: one Dice over the whole batch instead of one per crop.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross-entropy.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        in_channels: int,
        label_values: Sequence[int],
        feature_dim: int,
        background_in_dice: bool,
        batch_dice: bool,
        dice_weight: float,
        cross_entropy_weight: float,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.label_values = tuple(label_values)
        self.dice_weight = dice_weight
        self.cross_entropy_weight = cross_entropy_weight
        self.decoder = UNetDecoder(
            in_channels=in_channels,
            strides=encoder.strides,
            widths=encoder.widths,
            feature_dim=feature_dim,
            num_classes=len(label_values),
        )
        self.dice = DiceLoss(include_background=background_in_dice, to_onehot_y=True, softmax=True, batch=batch_dice)
        # Label values need not be consecutive; classes are.
        class_of = torch.zeros(max(label_values) + 1, dtype=torch.long)
        class_of[torch.tensor(self.label_values)] = torch.arange(len(label_values))
        self.register_buffer("class_of", class_of, persistent=False)
        self.class_of: Tensor

    def logits(self, volume_BCXYZ: Tensor) -> Tensor:
        """Logits ``(B, K, X, Y, Z)`` of the input; its axes must be multiples of the encoder's token edge."""
        logits: Tensor = self.decoder(volume_BCXYZ, self.encoder.feature_maps(volume_BCXYZ))
        return logits

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Weighted sum of Dice and cross-entropy, both logged.

        Args:
            batch: ``image`` ``(B, 1, C, X, Y, Z)`` and ``label`` ``(B, 1, X, Y, Z)`` in label values.
            progress: unused.
        """
        logits = self.logits(batch["image"].flatten(0, 1)).float()
        classes = self.class_of[batch["label"].flatten(0, 1)]
        dice = self.dice(logits, classes[:, None])
        cross_entropy = F.cross_entropy(logits, classes)
        loss = self.dice_weight * dice + self.cross_entropy_weight * cross_entropy
        return StepOutput(loss, {"loss/dice": dice.detach(), "loss/cross_entropy": cross_entropy.detach()})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """First crop of the batch, its reference and the prediction in label values, as ``(X, Y, Z)``."""
        image_BCXYZ = batch["image"][:1].flatten(0, 1)
        classes = self.logits(image_BCXYZ).argmax(1)[0]
        values = torch.tensor(self.label_values, device=classes.device)
        return {
            "segmentation/image": image_BCXYZ[0, 0],
            "segmentation/reference": batch["label"][0, 0],
            "segmentation/prediction": values[classes],
        }
