"""The classification network and its loss."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.objective import Batch, StepOutput
from mim3d.tasks.freezing import FreezingObjective

if TYPE_CHECKING:
    from mim3d.tasks.classification.task import Classification

# Shape suffixes: B samples, C channels, K classes, L tokens, E their width, X Y Z space.

#: Width of the layer that weighs tokens in attention pooling.
ATTENTION_DIM = 64

#: Standard deviation of the last layer's first weights: small, so that no class is preferred before training.
_HEAD_STD = 0.02


class AttentionPool(nn.Module):
    """Weighted mean of tokens, the weights learned (Ilse et al. 2018, "Attention-based Deep MIL", equation 8).

    Args:
        dim: Width of the tokens.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(dim, ATTENTION_DIM), nn.Tanh(), nn.Linear(ATTENTION_DIM, 1))

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        """Return one vector ``(B, E)`` per sample."""
        weights_BL1 = self.score(tokens_BLE).softmax(1)
        return (weights_BL1 * tokens_BLE).sum(1)


class MeanPool(nn.Module):
    """Mean of tokens."""

    def forward(self, tokens_BLE: Tensor) -> Tensor:
        """Return one vector ``(B, E)`` per sample."""
        return tokens_BLE.mean(1)


class ClassificationObjective(FreezingObjective):
    """Encoder, pooled tokens, normalisation and a linear layer, trained with weighted cross-entropy.

    Args:
        encoder: Gives the tokens: its coarsest feature map.
        num_classes: Number of classes.
        settings: The task: how tokens are pooled, what the loss is like, and which part of the encoder learns.
    """

    def __init__(self, encoder: Encoder, *, num_classes: int, settings: "Classification") -> None:
        super().__init__(encoder, freeze_encoder=settings.freeze_encoder, unfreeze_ratio=settings.unfreeze_ratio)
        self.label_smoothing = settings.label_smoothing
        width = encoder.widths[-1]
        self.pool = AttentionPool(width) if settings.pooling == "attention" else MeanPool()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(settings.dropout)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        # Only a plan knows what balances the classes.
        weights = (1.0,) * num_classes if settings.class_weights == "balanced" else settings.class_weights
        self.register_buffer("class_weights", torch.tensor(weights, dtype=torch.float32), persistent=False)
        self.class_weights: Tensor

    def logits(self, volume_BCXYZ: Tensor) -> Tensor:
        """Return logits ``(B, K)`` of the input; its axes must be multiples of the encoder's token edge."""
        tokens_BLE = self.features(volume_BCXYZ)[-1].flatten(2).transpose(1, 2)
        logits: Tensor = self.head(self.dropout(self.norm(self.pool(tokens_BLE))))
        return logits

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Return the cross-entropy; it and the share of right answers are logged.

        Args:
            batch: ``image`` ``(B, 1, C, X, Y, Z)`` and ``class`` ``(B, 1)``, numbers from 0.
            progress: Decides which layers of the encoder learn.
        """
        self.unfreeze(progress)
        logits = self.logits(batch["image"].flatten(0, 1)).float()
        classes = batch["class"].flatten()
        loss = F.cross_entropy(logits, classes, self.class_weights, label_smoothing=self.label_smoothing)
        right = (logits.argmax(1) == classes).float().mean()
        return StepOutput(loss, {"loss/cross_entropy": loss.detach(), "accuracy": right.detach()})

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return the first cube of the batch, as ``(X, Y, Z)``."""
        return {"classification/image": batch["image"][0, 0, 0]}

    @torch.no_grad()
    def probabilities(self, volume_BCXYZ: Tensor, mirror_axes: Sequence[int] = ()) -> Tensor:
        """Return probabilities ``(B, K)``, their mean over every combination of mirrored axes."""
        every: list[list[int]] = [[]]
        for axis in mirror_axes:
            every += [[*axes, axis + 2] for axes in every]
        turned = [self.logits(volume_BCXYZ.flip(axes) if axes else volume_BCXYZ).float().softmax(1) for axes in every]
        return torch.stack(turned).mean(0)
