"""Scores of a classifier of items and their intervals over patients, and measures of collapse, which need no label.

Legend: B weightings, N items, K classes, P patients, D features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.metrics import bootstrap as resampling
from mim3d.metrics.bootstrap import Bootstrap, grouped, plain
from mim3d.metrics.class_statistics import defined_mean, rates, weighted_auc
from mim3d.probing.items import Floats, Ints

CONVENTIONS = {
    "balanced_accuracy": "Mean over the labels or classes that occur of the share of their items that is right.",
    "f1_macro": "Mean over labels or classes that occur or are predicted of 2 TP / (2 TP + FP + FN), a Dice of items.",
    "auc": (
        "Classes of scans alone: area under the receiver operating characteristic, ties count half; the mean over "
        "classes of each against the rest."
    ),
    "ci95": resampling.CONVENTION,
    "feature_std": (
        "Standard deviation over the training items of features scaled to length 1, mean over features, times the "
        "square root of their number: 1 for directions that are spread evenly, 0 for one direction alone (Chen and He, "
        "CVPR 2021)."
    ),
    "effective_rank": (
        "exp of the entropy of the singular values of the feature matrix, as shares of their sum: 1 to the number of "
        "features (RankMe; Garrido et al., ICML 2023)."
    ),
    "mean_cosine": "Mean cosine between two different training items.",
}

#: The same of scores of numbers.
NUMBER_CONVENTIONS = {
    "r2": "1 less the squared errors over the squared distances from the mean of the items that are scored.",
    "mae": "Mean absolute error, in the unit of the numbers.",
    "pearson": "Correlation of answers and truth; not defined for answers that are all the same.",
    "ci95": resampling.CONVENTION,
}

#: Rows whose singular values are taken, evenly spaced: what more of them add is small.
MAX_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Scored:
    """What a classifier made of held-out items.

    Attributes:
        probabilities_NK: Probability of each class.
        classes_N: The true ones.
        patients: Whose item each is.
        with_auc: Whether items are scans, whose probabilities are ranked too.
    """

    probabilities_NK: Floats
    classes_N: Ints
    patients: tuple[str, ...]
    with_auc: bool = False

    def statistics(self, counts_BP: Floats) -> dict[str, Floats]:
        """Every score (B,), each patient counted so many times."""
        confusion_BKK = np.tensordot(counts_BP, self.confusion_PKK(), axes=1)
        found = rates(confusion_BKK)
        scores = {name: found[name] for name in ("balanced_accuracy", "f1_macro")}
        if self.with_auc:
            weights_BN = counts_BP[:, grouped(self.patients)[1]]
            columns = [
                weighted_auc(self.probabilities_NK[:, k], self.classes_N == k, weights_BN)
                for k in range(self.probabilities_NK.shape[1])
            ]
            scores["auc"] = defined_mean(np.stack(columns, axis=1))
        return scores

    def confusion_PKK(self) -> Floats:
        """Items of each patient by class (rows) and predicted class (columns)."""
        names, of_item = grouped(self.patients)
        num_classes = self.probabilities_NK.shape[1]
        counts = np.zeros((len(names), num_classes, num_classes))
        np.add.at(counts, (of_item, self.classes_N, self.probabilities_NK.argmax(1)), 1)
        return counts

    @property
    def num_patients(self) -> int:
        """P."""
        return len(set(self.patients))

    def values(self) -> dict[str, float]:
        """Every score."""
        return {name: float(value[0]) for name, value in self.statistics(np.ones((1, self.num_patients))).items()}

    def f1(self) -> list[float | None]:
        """F1 of each class; None where it neither occurs nor is predicted."""
        found = rates(self.confusion_PKK().sum(0)[None])["f1"][0]
        return [plain(value) for value in found]


@dataclass(frozen=True, eq=False)
class ScoredNumbers:
    """What a regression made of held-out items.

    Attributes:
        answers_N: Numbers that it gives.
        truth_N: The true ones.
        patients: Whose item each is.
    """

    answers_N: Floats
    truth_N: Floats
    patients: tuple[str, ...]

    @property
    def num_patients(self) -> int:
        """P."""
        return len(set(self.patients))

    def statistics(self, counts_BP: Floats) -> dict[str, Floats]:
        """Every score (B,), each patient counted so many times."""
        weights_BN = counts_BP[:, grouped(self.patients)[1]]
        total_B = weights_BN.sum(1)

        def mean(values_N: Floats) -> Floats:
            return np.asarray(weights_BN @ values_N / total_B)

        # Around a value of their own size, so that squares cancel nothing.
        answers_N, truth_N = self.answers_N - self.truth_N.mean(), self.truth_N - self.truth_N.mean()
        spread_B = mean(truth_N**2) - mean(truth_N) ** 2
        of_answers_B = mean(answers_N**2) - mean(answers_N) ** 2
        shared_B = mean(answers_N * truth_N) - mean(answers_N) * mean(truth_N)
        varies_B = (spread_B > 0) & (of_answers_B > 1e-12 * mean(answers_N**2))
        errors_N = answers_N - truth_N
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "r2": np.where(spread_B > 0, 1 - mean(errors_N**2) / spread_B, np.nan),
                "mae": mean(np.abs(errors_N)),
                "pearson": np.where(varies_B, shared_B / np.sqrt(spread_B * of_answers_B), np.nan),
            }

    def values(self) -> dict[str, float]:
        """Every score."""
        return {name: float(value[0]) for name, value in self.statistics(np.ones((1, self.num_patients))).items()}


def intervals(scored: Scored | ScoredNumbers, bootstrap: Bootstrap) -> dict[str, list[float] | None]:
    """The interval of each score; None where none can be made."""
    return bootstrap.intervals(scored.num_patients, scored.statistics)


def differences(
    ours: Scored | ScoredNumbers, theirs: Scored | ScoredNumbers, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Each score of ours less theirs on the same patients, with its paired interval."""
    first, second = ours.values(), theirs.values()

    def both(counts_BP: Floats) -> dict[str, Floats]:
        one, other = ours.statistics(counts_BP), theirs.statistics(counts_BP)
        return {name: one[name] - other[name] for name in one}

    found = bootstrap.intervals(ours.num_patients, both)
    return {name: {"difference": first[name] - second[name], "ci95": found[name]} for name in first}


@dataclass(frozen=True)
class Collapse:
    """Measures of collapse, see :data:`CONVENTIONS`."""

    feature_std: float
    effective_rank: float
    mean_cosine: float


def measure_collapse(features_ND: Tensor) -> Collapse:
    """Measures of features as the encoder gives them, ``(N, D)`` float64, two rows or more."""
    number, dim = features_ND.shape
    normed_ND = F.normalize(features_ND, dim=1)
    # The squared length of the sum holds every pair twice and every row with itself once.
    pairs = normed_ND.sum(0).square().sum() - normed_ND.square().sum()
    return Collapse(
        feature_std=float(normed_ND.std(0, correction=0).mean() * dim**0.5),
        effective_rank=effective_rank(features_ND),
        mean_cosine=float(pairs / (number * (number - 1))),
    )


def effective_rank(features_ND: Tensor) -> float:
    """RankMe of a feature matrix; 0 where all of it is zero."""
    rows = features_ND[:: -(-len(features_ND) // MAX_ROWS)]
    values = torch.linalg.svdvals(rows)
    if not values.sum() > 0:
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())
