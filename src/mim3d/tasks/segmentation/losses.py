"""Losses of segmentation: Dice, cross-entropy and focal loss over channels, where something is known."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.tasks.segmentation.targets import Targets, channels_of

# Shape suffixes: B samples, K channels, X Y Z space.

#: Takes a channel out of a softmax without the infinities whose gradients are not numbers.
_NEVER = -1e4


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Terms of the loss and their weights.

    Attributes:
        dice: Weight of the Dice loss (Milletari et al. 2016).
        cross_entropy: Weight of the cross-entropy.
        focal: Weight of the focal loss (Lin et al. 2017).
        focal_gamma: Exponent of the focal loss.
        top_k_ratio: Share of the voxels, those of the highest cross-entropy, that count in it.
        classes: Weight of labels by name in cross-entropy and focal loss; those not named weigh 1.
        background_in_dice: Whether the background counts in the Dice loss.
        batch_dice: Whether there is one Dice over the whole batch instead of one per crop.
    """

    dice: float = 1.0
    cross_entropy: float = 1.0
    focal: float = 0.0
    focal_gamma: float = 2.0
    top_k_ratio: float = 1.0
    classes: Mapping[str, float] | None = None
    background_in_dice: bool = False
    batch_dice: bool = True


class SegmentationLoss(nn.Module):
    """The terms of the loss of one map of logits.

    Args:
        targets: What the channels stand for.
        weights: Terms of the loss and their weights.
    """

    def __init__(self, targets: Targets, weights: LossWeights) -> None:
        super().__init__()
        self.targets, self.weights = targets, weights
        background = weights.background_in_dice or targets.activation == "sigmoid"
        self.dice = DiceLoss(include_background=background, batch=weights.batch_dice)
        # Label values need not be consecutive; channels are.
        self.register_buffer("table", targets.table(), persistent=False)
        given = weights.classes or {}
        class_weights = torch.tensor([float(given.get(name, 1.0)) for name in targets.names])
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.table: Tensor
        self.class_weights: Tensor

    def forward(
        self, logits_BKXYZ: Tensor, label_BXYZ: Tensor, annotated_BK: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return terms by name (``dice``, ``cross_entropy``, ``focal``), unweighted; those of weight 0 are left out.

        Args:
            logits_BKXYZ: Logits, float32.
            label_BXYZ: Label values.
            annotated_BK: Whether each sample has annotations of each channel; None for all.
        """
        channels, known = channels_of(label_BXYZ, self.table), self.targets.known(label_BXYZ)
        if annotated_BK is not None:
            logits_BKXYZ, channels = self._of_annotated(logits_BKXYZ, channels, annotated_BK)
        mask = None if known is None else known[:, None].float()
        if annotated_BK is not None and self.targets.activation == "sigmoid":
            seen = annotated_BK[:, :, None, None, None].float()
            mask = seen if mask is None else mask * seen
        terms = {}
        if self.weights.dice:
            probabilities = self.targets.probabilities(logits_BKXYZ, dim=1)
            terms["dice"] = self.dice(*(x if mask is None else x * mask for x in (probabilities, channels)))
        if self.weights.cross_entropy or self.weights.focal:
            terms |= self._voxel_terms(logits_BKXYZ, channels, mask)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms."""
        weights = {"dice": self.weights.dice, "cross_entropy": self.weights.cross_entropy, "focal": self.weights.focal}
        return torch.stack([weights[name] * term for name, term in terms.items()]).sum()

    def _voxel_terms(self, logits: Tensor, channels: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if self.targets.activation == "softmax":
            classes = channels.argmax(1)
            entropy = F.cross_entropy(logits, classes, reduction="none")[:, None]
            weights = self.class_weights[classes][:, None]
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, channels, reduction="none")
            weights = self.class_weights[:, None, None, None].expand_as(entropy)
        if mask is not None:
            weights = weights * mask
        terms = {}
        if self.weights.cross_entropy:
            terms["cross_entropy"] = _mean(entropy, weights, self.weights.top_k_ratio)
        if self.weights.focal:
            # exp(-entropy) is the probability given to the truth.
            terms["focal"] = _mean((1 - torch.exp(-entropy)) ** self.weights.focal_gamma * entropy, weights, 1.0)
        return terms

    def _of_annotated(self, logits: Tensor, channels: Tensor, annotated_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Labels that a sample has no annotations of become background: their probabilities are added to its own.

        Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical Image
        Analysis 2021, equation 4. Regions have channels of their own, which are left out instead.
        """
        if self.targets.activation == "sigmoid":
            return logits, channels
        shown = annotated_BK.clone()
        shown[:, 0] = False
        hidden = ~shown[:, :, None, None, None]
        background = torch.logsumexp(logits.masked_fill(~hidden, _NEVER), dim=1, keepdim=True)
        merged = torch.cat([background, logits.masked_fill(hidden, _NEVER)[:, 1:]], dim=1)
        kept = channels[:, 1:] * ~hidden[:, 1:]
        return merged, torch.cat([1 - kept.sum(1, keepdim=True), kept], dim=1)


def head_weights(number: int) -> Sequence[float]:
    """Return weights 1, 1/2, 1/4, ... of the heads of deep supervision, finest first, as shares of one."""
    raw = [0.5**index for index in range(number)]
    return [weight / math.fsum(raw) for weight in raw]


def _mean(values: Tensor, weights: Tensor, ratio: float) -> Tensor:
    """Return the weighted mean, of the share of voxels with the highest values; 0 where no voxel has a weight."""
    if ratio < 1:
        top = (values.detach() * weights).flatten().topk(max(1, int(ratio * values.numel()))).indices
        values, weights = values.flatten()[top], weights.flatten()[top]
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
