"""The segmentation network, encoder and decoder, and the loss that it learns by."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from monai.losses.dice import DiceLoss
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.contract import Encoder
from mim3d.objective import Batch, StepOutput
from mim3d.tasks.freezing import FreezingObjective
from mim3d.tasks.segmentation.decoders import DECODERS, SegmentationDecoder
from mim3d.tasks.segmentation.targets import Targets, channels_of

if TYPE_CHECKING:
    from mim3d.tasks.segmentation.task import Segmentation

# Shape suffixes: B samples, C channels of the input, K channels of the output, X Y Z space.

#: Takes a channel out of a softmax without the infinities whose gradients are not numbers.
_NEVER = -1e4


class SegmentationLoss(nn.Module):
    """The terms of the loss of one map of logits: Dice (Milletari et al. 2016), cross-entropy, focal (Lin et al. 2017).

    Args:
        targets: What the channels stand for.
        settings: The task, whose settings name the terms and weigh them.
    """

    def __init__(self, targets: Targets, settings: "Segmentation") -> None:
        super().__init__()
        self.targets, self.settings = targets, settings
        background = settings.background_in_dice or targets.activation == "sigmoid"
        self.dice = DiceLoss(include_background=background, batch=settings.batch_dice)
        # Label values need not be consecutive; channels are.
        self.register_buffer("table", targets.table(), persistent=False)
        given = settings.class_weights or {}
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
        logits, channels, known = logits_BKXYZ, channels_of(label_BXYZ, self.table), self.targets.known(label_BXYZ)
        is_exclusive, settings = self.targets.activation == "softmax", self.settings
        mask = None if known is None else known[:, None].float()
        if annotated_BK is not None and is_exclusive:
            logits, channels = _marginal(logits, channels, annotated_BK)
        elif annotated_BK is not None:
            # Regions have channels of their own, which are left out instead.
            seen = annotated_BK[:, :, None, None, None].float()
            mask = seen if mask is None else mask * seen
        terms = {}
        if settings.dice_weight:
            probabilities = self.targets.probabilities(logits, dim=1)
            terms["dice"] = self.dice(*(x if mask is None else x * mask for x in (probabilities, channels)))
        if not settings.cross_entropy_weight and not settings.focal_weight:
            return terms
        if is_exclusive:
            classes = channels.argmax(1)
            entropy = F.cross_entropy(logits, classes, reduction="none")[:, None]
            weights = self.class_weights[classes][:, None]
        else:
            entropy = F.binary_cross_entropy_with_logits(logits, channels, reduction="none")
            weights = self.class_weights[:, None, None, None].expand_as(entropy)
        if mask is not None:
            weights = weights * mask
        if settings.cross_entropy_weight:
            terms["cross_entropy"] = _mean(entropy, weights, settings.top_k_ratio)
        if settings.focal_weight:
            # exp(-entropy) is the probability given to the truth.
            terms["focal"] = _mean((1 - torch.exp(-entropy)) ** settings.focal_gamma * entropy, weights, 1.0)
        return terms


def _marginal(logits: Tensor, channels: Tensor, annotated_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that a sample has no annotations of become background: their probabilities are added to its own.

    Shi et al., "Marginal loss and exclusion loss for partially supervised multi-organ segmentation", Medical Image
    Analysis 2021, equation 4.
    """
    shown = annotated_BK.clone()
    shown[:, 0] = False
    hidden = ~shown[:, :, None, None, None]
    background = torch.logsumexp(logits.masked_fill(~hidden, _NEVER), dim=1, keepdim=True)
    merged = torch.cat([background, logits.masked_fill(hidden, _NEVER)[:, 1:]], dim=1)
    kept = channels[:, 1:] * ~hidden[:, 1:]
    return merged, torch.cat([1 - kept.sum(1, keepdim=True), kept], dim=1)


def _mean(values: Tensor, weights: Tensor, ratio: float) -> Tensor:
    """Return the weighted mean, of the share of voxels with the highest values; 0 where no voxel has a weight."""
    if ratio < 1:
        top = (values.detach() * weights).flatten().topk(max(1, int(ratio * values.numel()))).indices
        values, weights = values.flatten()[top], weights.flatten()[top]
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)


class SegmentationObjective(FreezingObjective):
    """Encoder and decoder, trained with Dice and cross-entropy.

    Args:
        encoder: Gives the feature maps.
        in_channels: Number of channels of the input.
        targets: What the channels of the output stand for.
        settings: The task: what the decoder is like, what the loss is made of, and which part of the encoder learns.
    """

    def __init__(self, encoder: Encoder, *, in_channels: int, targets: Targets, settings: "Segmentation") -> None:
        super().__init__(encoder, freeze_encoder=settings.freeze_encoder, unfreeze_ratio=settings.unfreeze_ratio)
        self.targets = targets
        assert settings.decoder is not None
        self.decoder = DECODERS[settings.decoder](
            in_channels=in_channels,
            strides=encoder.strides,
            widths=encoder.widths,
            feature_dim=settings.feature_dim,
            num_classes=len(targets.names),
            deep_supervision=bool(settings.deep_supervision),
        )
        self.loss = SegmentationLoss(targets, settings)

    def logits(self, volume_BCXYZ: Tensor) -> Tensor:
        """Return logits ``(B, K, X, Y, Z)`` of the input; its axes must be multiples of the encoder's token edge."""
        logits: Tensor = self.decoder(volume_BCXYZ, self.features(volume_BCXYZ))
        return logits

    def finest_features(self, volume_BCXYZ: Tensor) -> Tensor:
        """Return what the last layer of the decoder sees of the input, ``(B, F, X, Y, Z)``."""
        features: Tensor = self.decoder.finest(volume_BCXYZ, self.features(volume_BCXYZ))
        return features

    @property
    def linear_head(self) -> tuple[Tensor, Tensor] | None:
        """Weight ``(K, F)`` and bias ``(K,)`` that make the logits of the finest features; None where more does."""
        is_plain = (
            type(self).logits is SegmentationObjective.logits
            and type(self.decoder).forward is SegmentationDecoder.forward
        )
        return self.decoder.linear_head if is_plain else None

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Return the weighted sum of the terms of the loss, each logged; with deep supervision their mean over heads.

        Args:
            batch: ``image`` ``(B, 1, C, X, Y, Z)``, ``label`` ``(B, 1, X, Y, Z)`` in label values, and where cases are
                annotated in part, ``annotated`` ``(B, K)``.
            progress: Decides which layers of the encoder learn.
        """
        self.unfreeze(progress)
        image, label = batch["image"].flatten(0, 1), batch["label"].flatten(0, 1)
        heads = self.decoder.heads_of(image, self.features(image)) if self.decoder.deep_heads else [self.logits(image)]
        means: dict[str, Tensor] = {}
        for share, logits in zip(head_weights(len(heads)), heads, strict=True):
            terms = self.loss(logits.float(), shrunk(label, label.shape[1] // logits.shape[2]), batch.get("annotated"))
            means = {name: means.get(name, 0.0) + share * term for name, term in terms.items()}
        settings = self.loss.settings
        weights = {
            "dice": settings.dice_weight,
            "cross_entropy": settings.cross_entropy_weight,
            "focal": settings.focal_weight,
        }
        total = torch.stack([weights[name] * term for name, term in means.items()]).sum()
        return StepOutput(total, {f"loss/{name}": term.detach() for name, term in means.items()})

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


def head_weights(number: int) -> Sequence[float]:
    """Return weights 1, 1/2, 1/4, ... of the heads of deep supervision, finest first, as shares of one."""
    raw = [0.5**index for index in range(number)]
    return [weight / math.fsum(raw) for weight in raw]
