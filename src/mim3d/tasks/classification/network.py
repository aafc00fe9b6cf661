"""The classification network and its loss."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.objective import Batch, StepOutput
from mim3d.tasks.freezing import FreezingObjective

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
        pooling: How tokens become one vector.
        class_weights: Weight of each class in the loss.
        dropout: Share of the pooled features that a training step leaves out.
        label_smoothing: Share of the target that is spread over all classes.
        freeze_encoder: Whether pooling and linear layer alone are trained, on features that stay as they are.
        unfreeze_ratio: Share of training after which all of the encoder learns, see ``Freezing``.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        num_classes: int,
        pooling: Literal["mean", "attention"],
        class_weights: Sequence[float],
        dropout: float,
        label_smoothing: float,
        freeze_encoder: bool = False,
        unfreeze_ratio: float | None = None,
    ) -> None:
        super().__init__(encoder, freeze_encoder=freeze_encoder, unfreeze_ratio=unfreeze_ratio)
        self.label_smoothing = label_smoothing
        width = encoder.widths[-1]
        self.pool = AttentionPool(width) if pooling == "attention" else MeanPool()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=_HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("class_weights", torch.tensor(class_weights, dtype=torch.float32), persistent=False)
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
        if self.training:
            self.freezing.at(progress)
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
