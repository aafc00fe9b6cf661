"""What a window becomes: logits averaged over mirrored windows, and probabilities averaged over networks."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor

# Shape suffixes: B windows, C channels, K classes, X Y Z space.

#: Maps windows ``(B, C, X, Y, Z)`` to logits ``(B, K, X, Y, Z)``.
Network = Callable[[Tensor], Tensor]

#: Maps logits to probabilities of the same shape; the axis of the classes comes second.
Activation = Callable[[Tensor, int], Tensor]


def mirrored_logits(network: Network, window_BCXYZ: Tensor, mirror_axes: Sequence[int]) -> Tensor:
    """Mean logits over every combination of mirrored axes, each turned back."""
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
    """One network's logits, or the mean of several networks' probabilities, for a batch of windows.

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
