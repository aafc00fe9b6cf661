"""What a window becomes and what it means: mean logits, mean probabilities, and label values."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Shape suffixes: B windows, C channels, K classes, X Y Z space.

#: Maps windows ``(B, C, X, Y, Z)`` to logits ``(B, K, X, Y, Z)``.
Network = Callable[[Tensor], Tensor]

#: Maps logits to probabilities of the same shape; the axis of the classes comes second.
Activation = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadedNetwork:
    """A network whose last layer is linear and sees one voxel at a time.

    Attributes:
        logits: Maps windows to logits.
        features: Maps windows ``(B, C, X, Y, Z)`` to what the last layer sees, ``(B, F, X, Y, Z)``.
        weight_KF: Weight of the last layer, float32.
        bias_K: Its bias, float32.
    """

    logits: Network
    features: Network
    weight_KF: Tensor
    bias_K: Tensor

    def __call__(self, window_BCXYZ: Tensor) -> Tensor:
        return self.logits(window_BCXYZ)

    @property
    def num_features(self) -> int:
        """Channels that the last layer sees."""
        return self.weight_KF.shape[1]

    def summed_logits(self, sums_FN: Tensor, weights_N: Tensor) -> Tensor:
        """Return weighted sums of logits ``(N, K)`` of weighted sums of features and the sums of their weights."""
        # Sums lie on the CPU where a GPU has no room for them.
        weight_KF, bias_K = self.weight_KF.to(sums_FN.device), self.bias_K.to(sums_FN.device)
        return torch.addmm(torch.outer(weights_N, bias_K), sums_FN.T, weight_KF.T)


def mirrored_logits(network: Network, window_BCXYZ: Tensor, mirror_axes: Sequence[int]) -> Tensor:
    """Return the mean logits over every combination of mirrored axes, each turned back."""
    logits = network(window_BCXYZ)
    combinations = [
        [axis + 2 for axis in axes]
        for number in range(1, len(mirror_axes) + 1)
        for axes in itertools.combinations(mirror_axes, number)
    ]
    for axes in combinations:
        logits = logits + network(window_BCXYZ.flip(axes)).flip(axes)
    return logits / (1 + len(combinations)) if combinations else logits


def ensemble_of(networks: Sequence[Network], mirror_axes: Sequence[int], activate: Activation) -> Network:
    """Return a network that gives one network's logits, or the mean of several networks' probabilities.

    Networks take turns at every batch, so that an ensemble holds no more scores of a scan than one network does.
    """

    def scores(window_BCXYZ: Tensor) -> Tensor:
        if len(networks) == 1:
            return mirrored_logits(networks[0], window_BCXYZ, mirror_axes).float()
        total = None
        for network in networks:
            probabilities = activate(mirrored_logits(network, window_BCXYZ, mirror_axes).float(), 1)
            total = probabilities if total is None else total.add_(probabilities)
        assert total is not None
        return total.div_(len(networks))

    return scores


@dataclass(frozen=True, kw_only=True)
class Readout:
    """What the channels of a network mean.

    Attributes:
        empty: Probability of each channel where nothing is: what voxels get that no window covers.
        activate: Maps logits to probabilities. The axis of the channels is its second argument.
        decide: Maps probabilities ``(K, ...)`` to label values ``(...)`` uint8 or int32.
        order_is_enough: Whether ``decide`` gives the same for logits as for their probabilities (the most probable
            class has the largest logit), so that probabilities need not be computed.
        values: Label value of each channel where every voxel gets that of its most probable one, the lower of equals;
            None where labels are decided in another way.
    """

    empty: tuple[float, ...]
    activate: Activation
    decide: Callable[[Tensor], Tensor]
    order_is_enough: bool
    values: Tensor | None = None

    @property
    def num_channels(self) -> int:
        """Number of channels of the network."""
        return len(self.empty)


def classes_readout(num_classes: int, values: Tensor | None = None) -> Readout:
    """Return the readout of classes of which every voxel has one, background first.

    Args:
        num_classes: Number of channels of the network.
        values: Label value of each class; its index if not given.
    """
    lookup = torch.arange(num_classes) if values is None else values
    lookup = lookup.to(torch.uint8 if int(lookup.max()) < 256 else torch.int32)

    def decide(scores_K: Tensor) -> Tensor:
        return lookup.to(scores_K.device)[most_probable(scores_K)]

    return Readout(
        empty=(1.0, *[0.0] * (num_classes - 1)),
        activate=torch.softmax,
        decide=decide,
        order_is_enough=True,
        values=lookup,
    )


def most_probable(scores_K: Tensor) -> Tensor:
    """Return the channel ``(...)`` int64 of the largest of scores ``(K, ...)``, the lower one of equals."""
    if scores_K.device.type == "cpu" and scores_K.stride(0) == 1 and scores_K.ndim > 1:
        # Where channels lie side by side numpy is ten times as fast.
        return torch.from_numpy(np.asarray(scores_K.movedim(0, -1).numpy().argmax(-1)))
    # On a CPU ``argmax`` along a leading axis takes three times as long.
    return scores_K.max(dim=0).indices
