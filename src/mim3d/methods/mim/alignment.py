"""Cross-level alignment: each child volume against the place in its parent that it was cut from (METHOD: MiM)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.nn.losses import alignment_logits, contrastive_alignment, cosine_alignment

# Shape suffixes: M parent volumes, H hidden places of a parent, K children, A alignment width.


@dataclass(frozen=True)
class Places:
    """The hidden places of parent volumes.

    Attributes:
        units_MH: Their raster indices among the parent's units.
        vectors_MHA: Their projected mean decoder tokens.
        varied_MH: False for air, which is no negative.
    """

    units_MH: Tensor
    vectors_MHA: Tensor
    varied_MH: Tensor


def align(
    child_KA: Tensor,
    places: Places,
    own_unit_K: Tensor,
    *,
    temperature: float,
    batch_negatives: bool,
    predict: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Alignment loss of children with their parents' places, and what to log about it.

    Args:
        child_KA: Projected mean token of every child, children of one parent side by side.
        places: Candidate places of all parents.
        own_unit_K: The unit that each child was cut from.
        temperature: Temperature of the contrastive form.
        batch_negatives: Contrast with the hidden places of every parent, not only the child's own.
        predict: The child's predictor; the cosine form when given, else the contrastive one.
    """
    num_parents, num_places = places.units_MH.shape
    parent_K = torch.arange(num_parents, device=child_KA.device).repeat_interleave(len(child_KA) // num_parents)
    own_K = (places.units_MH[parent_K] == own_unit_K[:, None]).int().argmax(1)
    if batch_negatives:
        label_K = own_K + parent_K * num_places
        logits = alignment_logits(child_KA, places.vectors_MHA.flatten(0, 1), temperature)
        usable = places.varied_MH.flatten().expand_as(logits)
    else:
        label_K = own_K
        logits = alignment_logits(child_KA, places.vectors_MHA[parent_K], temperature)
        usable = places.varied_MH[parent_K]
    loss, accuracy = contrastive_alignment(logits, label_K, usable)
    if predict is not None:
        loss = cosine_alignment(predict(child_KA), places.vectors_MHA[parent_K, own_K])
    normed = F.normalize(child_KA.detach().float(), dim=-1)
    return loss, {
        "loss": loss.detach(),
        "accuracy": accuracy.detach(),
        "chance": torch.full_like(accuracy, 1.0 / logits.shape[1]),
        "spread": normed.std(0, correction=0).mean() * normed.shape[1] ** 0.5,
    }
