"""Heads on features that are there already: a linear one and nearest neighbours, for classes and for numbers.

How strongly a head is regularised is chosen by folds inside what it learns from, never by what it is scored on.
Legend: N items to learn from, M items to answer for, D features, K classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.probing.items import Floats, Ints
from mim3d.probing.probe import linear_probabilities, neighbour_probabilities, standardised

#: Weights of the squared coefficients that are tried, the strongest first: half a decade apart.
L2_PATH = tuple(10 ** (2 - step / 2) for step in range(13))

#: Numbers of neighbours that are tried, the largest first.
NEIGHBOURS_PATH = (50.0, 20.0, 10.0, 5.0, 3.0, 1.0)

#: Places of items to learn from, and of items to answer for.
Fold = tuple[Ints, Ints]


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """What heads learn from.

    Attributes:
        features_ND: Features.
        targets_N: Class of each item, or a number of each.
        num_classes: K; None where targets are numbers.
        temperature: Temperature of the votes of neighbours.
    """

    features_ND: Floats
    targets_N: npt.NDArray[np.float64] | Ints
    num_classes: int | None
    temperature: float = 0.07

    def part(self, places: Ints) -> "Learned":
        """Some of the items."""
        return Learned(
            features_ND=self.features_ND[places],
            targets_N=self.targets_N[places],
            num_classes=self.num_classes,
            temperature=self.temperature,
        )

    @property
    def is_whole(self) -> bool:
        """Whether every class is there, and numbers that differ: what a head needs."""
        return len(np.unique(self.targets_N)) == self.num_classes or (
            self.num_classes is None and len(np.unique(self.targets_N)) > 1
        )

    def loss(self, answers: Floats) -> float:
        """How far answers for these items are off: squared errors, the mean over classes of the mean of each."""
        if self.num_classes is None:
            return float(np.square(answers - self.targets_N).mean())
        errors_N = np.square(answers - np.eye(self.num_classes)[self.targets_N.astype(np.int64)]).sum(1)
        return float(np.mean([errors_N[self.targets_N == value].mean() for value in np.unique(self.targets_N)]))


def _both(known: Learned, asked_MD: Floats) -> tuple[Tensor, Tensor]:
    """Standardised features, turned so that there are no more than items: what L2 does stays the same."""
    training_ND, queries_MD = torch.from_numpy(known.features_ND).double(), torch.from_numpy(asked_MD).double()
    first, second = (standardised(training_ND, features) for features in (training_ND, queries_MD))
    if first.shape[1] > len(first):
        _, _, turn = torch.linalg.svd(first, full_matrices=False)
        first, second = first @ turn.T, second @ turn.T
    return first, second


def linear_answers(known: Learned, asked_MD: Floats, l2: float) -> Floats:
    """Probabilities ``(M, K)`` of logistic regression, or numbers ``(M,)`` of ridge regression."""
    first_ND, second_MD = _both(known, asked_MD)
    targets = torch.from_numpy(known.targets_N)
    if known.num_classes is not None:
        found = linear_probabilities(first_ND, targets, second_MD, known.num_classes, l2=l2)
    else:
        mean = targets.mean()
        gram_DD = first_ND.T @ first_ND / len(first_ND) + l2 * torch.eye(first_ND.shape[1], dtype=torch.float64)
        found = second_MD @ torch.linalg.solve(gram_DD, first_ND.T @ (targets - mean) / len(first_ND)) + mean
    answers: Floats = found.numpy()
    return answers


def neighbour_answers(known: Learned, asked_MD: Floats, num_neighbours: float) -> Floats:
    """Votes ``(M, K)`` of the nearest items by cosine, or the mean of their numbers ``(M,)``, weighed alike."""
    first_ND, second_MD = _both(known, asked_MD)
    if first_ND.shape[1] == 1:
        # The cosine of single numbers is their sign; beside a constant it tells how far they are apart.
        first_ND, second_MD = (F.pad(features, (0, 1), value=1.0) for features in (first_ND, second_MD))
    targets = torch.from_numpy(known.targets_N)
    if known.num_classes is not None:
        found = neighbour_probabilities(
            first_ND,
            targets,
            second_MD,
            known.num_classes,
            num_neighbours=int(num_neighbours),
            temperature=known.temperature,
        )
    else:
        cosines_MN = F.normalize(second_MD, dim=1) @ F.normalize(first_ND, dim=1).T
        nearest, places = cosines_MN.topk(min(int(num_neighbours), len(first_ND)), dim=1)
        found = ((nearest / known.temperature).softmax(1) * targets[places]).sum(1)
    answers: Floats = found.numpy()
    return answers


#: Head -> what computes its answers, and the settings that are tried.
HEADS: Mapping[str, tuple[Callable[[Learned, Floats, float], Floats], tuple[float, ...]]] = {
    "linear": (linear_answers, L2_PATH),
    "neighbours": (neighbour_answers, NEIGHBOURS_PATH),
}

#: What is taken where no fold inside can tell.
USUAL = {"linear": 1e-2, "neighbours": 20.0}


def chosen_setting(head: str, known: Learned, folds: Sequence[Fold]) -> float:
    """The setting of a head that errs least on the folds inside what it learns from; the stronger one of equals.

    Args:
        head: Name of the head.
        known: What it learns from.
        folds: Places in it of items to learn from and items to compare on. One that lacks a class is passed over.
    """
    answers, path = HEADS[head]
    usable = [(known.part(first), known.part(second)) for first, second in folds]
    usable = [(first, second) for first, second in usable if first.is_whole and len(second.targets_N)]
    if not usable:
        return USUAL[head]
    losses = [
        math.fsum(second.loss(answers(first, second.features_ND, setting)) for first, second in usable)
        for setting in path
    ]
    return path[int(np.argmin(losses))]
