"""Losses of pre-training: reconstruction of hidden tokens, alignment, overlaps, contrast, and signs of collapse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape suffixes: B batch, C channels, H hidden, N values of a channel, P voxels of a patch, R crops, K places or base
# crops, D width.

#: Keeps the logarithm of :func:`overlap_losses` finite.
_EPSILON = 1e-6


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision in float32; what is computed in float64 stays there."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normalise_tokens(target_BHP: Tensor, eps: float = 1e-6) -> Tensor:
    """Each token's voxels at mean 0 and variance 1 (unbiased variance; MAE's normalised pixels)."""
    mean = target_BHP.mean(-1, keepdim=True)
    variance = target_BHP.var(-1, keepdim=True)
    return (target_BHP - mean) / (variance + eps).sqrt()


def reconstruction_target(hidden_BHP: Tensor, *, normalised: bool = True) -> Tensor:
    """What is to be predicted of hidden tokens, in float32 at least: their voxels, normalised or as they are."""
    voxels_BHP = at_least_float32(hidden_BHP)
    return normalise_tokens(voxels_BHP) if normalised else voxels_BHP


@dataclass(frozen=True)
class Error:
    """A mean difference of prediction and target.

    Attributes:
        mean: The difference.
        best_constant: For values ``(N, C)`` the constant ``(C,)`` from which each channel differs least.
    """

    mean: Callable[[Tensor, Tensor], Tensor]
    best_constant: Callable[[Tensor], Tensor]

    def __call__(self, predicted: Tensor, target: Tensor) -> Tensor:
        """The difference, in float32 at least."""
        return self.mean(at_least_float32(predicted), at_least_float32(target))

    @torch.no_grad()
    def guess(self, target: Tensor, num_channels: int) -> Tensor:
        """The difference of who has learned nothing but one number for each channel, the last axis of the target."""
        values_NC = at_least_float32(target).reshape(-1, num_channels)
        return self.mean(self.best_constant(values_NC).expand_as(values_NC), values_NC)


SQUARED_ERROR = Error(F.mse_loss, lambda values_NC: values_NC.mean(0))
ABSOLUTE_ERROR = Error(F.l1_loss, lambda values_NC: values_NC.median(0).values)


def alignment_logits(child_BD: Tensor, places_KD: Tensor, temperature: float) -> Tensor:
    """Cosine similarities ``(B, K)`` over temperature; places are ``(K, D)`` shared or ``(B, K, D)`` per child."""
    child = F.normalize(at_least_float32(child_BD), dim=-1)
    places = F.normalize(at_least_float32(places_KD), dim=-1)
    subscripts = "bd,kd->bk" if places.ndim == 2 else "bd,bkd->bk"
    return torch.einsum(subscripts, child, places) / temperature


def contrastive_alignment(logits_BK: Tensor, own_B: Tensor, usable_BK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy with the child's own place as the label, the accuracy of the nearest place, and both of a guess.

    A guess tells no places from each other: its loss is the logarithm of the number of places that take part, a child's
    own among them, and its accuracy one in that number, on average over children.

    Args:
        logits_BK: Similarity of each child with each candidate place.
        own_B: Index of the child's own place.
        usable_BK: False for places left out as negatives; the own place always counts.
    """
    own_place = F.one_hot(own_B, logits_BK.shape[1]).bool()
    candidates = usable_BK | own_place
    logits = logits_BK.masked_fill(~candidates, float("-inf"))
    number_B = candidates.sum(1).float()
    accuracy = (logits.argmax(1) == own_B).float().mean()
    return F.cross_entropy(logits, own_B), accuracy, number_B.log().mean(), number_B.reciprocal().mean()


def cosine_alignment(predicted_BD: Tensor, own_place_BD: Tensor) -> Tensor:
    """``2 - 2 cos(prediction of the child, stop-gradient of its place)`` (BYOL, Grill et al. 2020, equation 2)."""
    predicted, own_place = at_least_float32(predicted_BD), at_least_float32(own_place_BD.detach())
    return (2 - 2 * F.cosine_similarity(predicted, own_place, dim=-1)).mean()


def spread(vectors_KD: Tensor) -> Tensor:
    """How much the directions of vectors differ: about 1 as if drawn at random, 0 where all are the same."""
    normed = F.normalize(vectors_KD.float(), dim=-1)
    return normed.std(0, correction=0).mean() * normed.shape[1] ** 0.5


def overlap_losses(similarity_BRK: Tensor, overlap_BRK: Tensor) -> tuple[Tensor, Tensor]:
    """VoCo's positive and negative loss, means over the batch (Wu, Zhuang & Chen 2024).

    The similarity of a crop with a base crop should be the share of its volume that lies there: the distance of the two
    counts by that share, and any similarity with a base crop that is not touched counts by its square.

    Args:
        similarity_BRK: Similarity of each crop with each base crop, from 0 to 1.
        overlap_BRK: Share of each crop's volume in each base crop.
    """
    # Rounding makes similarities of nearly the same vectors exceed 1.
    log_BRK = torch.log((1 - (overlap_BRK - similarity_BRK).abs()).clamp(min=0) + _EPSILON)
    positive_B = -(overlap_BRK * log_BRK).sum((1, 2)) / overlap_BRK.sum((1, 2))
    apart_BRK = overlap_BRK == 0
    negative_B = (similarity_BRK.square() * apart_BRK).sum((1, 2)) / apart_BRK.sum((1, 2)).clamp(min=1)
    return positive_B.mean(), negative_B.mean()


def view_contrast(vectors_VD: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of telling the other view of a crop from the views of other crops (NT-Xent, Chen et al. 2020).

    Args:
        vectors_VD: Vectors of one view of every crop, then of the other view of every crop, in the same order.
        temperature: What cosines are divided by.
    """
    normed_VD = F.normalize(vectors_VD.float(), dim=-1)
    views_V = torch.arange(len(normed_VD), device=normed_VD.device)
    itself_VV = views_V[:, None] == views_V
    logits_VV = (normed_VD @ normed_VD.T / temperature).masked_fill(itself_VV, float("-inf"))
    return F.cross_entropy(logits_VV, views_V.roll(len(views_V) // 2))


def pair_cosines(vectors_VD: Tensor) -> dict[str, Tensor]:
    """Mean cosine of two views of one crop (``positive``), and of two crops' where there are two (``negative``).

    Args:
        vectors_VD: As :func:`view_contrast` takes them.
    """
    first_BD, second_BD = F.normalize(vectors_VD.float(), dim=-1).chunk(2)
    cosines = {"positive": (first_BD * second_BD).sum(-1).mean()}
    if len(first_BD) > 1:
        normed_VD, crop_V = torch.cat([first_BD, second_BD]), torch.arange(len(first_BD)).repeat(2)
        different_VV = (crop_V[:, None] != crop_V).to(normed_VD)
        cosines["negative"] = (normed_VD @ normed_VD.T * different_VV).sum() / different_VV.sum()
    return cosines
