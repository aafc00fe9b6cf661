"""From scores to label values: what a network's channels mean."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mim3d.inference.networks import Activation


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What the channels of a network mean.

    Attributes:
        empty: probability of each channel where nothing is: what voxels get that no window covers.
        activate: logits to probabilities; the axis of the channels is the second argument.
        decide: probabilities ``(K, ...)`` to label values ``(...)`` uint8 or int32.
        order_is_enough: whether ``decide`` gives the same for logits as for their probabilities (the most probable
            class has the largest logit), so that probabilities need not be computed.
    """

    empty: tuple[float, ...]
    activate: Activation
    decide: Callable[[Tensor], Tensor]
    order_is_enough: bool

    @property
    def num_channels(self) -> int:
        """Channels of the network."""
        return len(self.empty)


def most_probable(scores_K: Tensor) -> Tensor:
    """Index of the largest of ``(K, ...)`` scores, int64; the lower one of equals."""
    # On a CPU ``argmax`` along a leading axis takes three times as long.
    return scores_K.max(dim=0).indices


def classes_readout(num_classes: int, values: Tensor | None = None) -> Readout:
    """Classes of which every voxel has one, background first.

    Args:
        num_classes: channels of the network.
        values: label value of each class; its index if not given.
    """
    lookup = torch.arange(num_classes) if values is None else values
    lookup = lookup.to(torch.uint8 if int(lookup.max()) < 256 else torch.int32)

    def decide(scores_K: Tensor) -> Tensor:
        return lookup.to(scores_K.device)[most_probable(scores_K)]

    return Readout(empty=(1.0, *[0.0] * (num_classes - 1)), activate=torch.softmax, decide=decide, order_is_enough=True)
