"""Statistics of a classifier under weights of its cases: one formula for the score and for every resampling of it.

Legend: B weightings, N cases, K classes, M bins.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def weighted_auc(scores_N: Floats, is_positive_N: npt.NDArray[np.bool_], weights_BN: Floats) -> Floats:
    """Area (B,) under the receiver operating characteristic: the chance that a positive case scores higher.

    The Mann-Whitney statistic over its greatest value, with half a win for a tie (Hanley and McNeil 1982); NaN where a
    weighting leaves one side empty.
    """
    wins, pairs = ranked_pairs(scores_N, is_positive_N, weights_BN)
    with np.errstate(invalid="ignore"):
        return wins / pairs


def ranked_pairs(scores_N: Floats, is_positive_N: npt.NDArray[np.bool_], weights_BN: Floats) -> tuple[Floats, Floats]:
    """Weight (B,) of the pairs of a positive and another case that the positive one wins, ties half, and of all."""
    if not scores_N.size:
        return np.zeros(len(weights_BN)), np.zeros(len(weights_BN))
    order = np.argsort(scores_N, kind="stable")
    ordered = scores_N[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positive = is_positive_N[order]
    weights = weights_BN[:, order]
    # Weight of either side at every distinct score, (B, number of distinct scores).
    won = np.add.reduceat(weights * positive, starts, axis=1)
    lost = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(lost, axis=1) - lost
    return np.asarray((won * (below + lost / 2)).sum(1)), np.asarray(won.sum(1) * lost.sum(1))


def placements(scores_N: Floats, is_positive_N: npt.NDArray[np.bool_]) -> Floats:
    """Of each case, the share of the other side's cases that are ordered rightly against it, with half for a tie.

    Their mean over either side is the AUC. DeLong et al. (1988) call them its structural components.
    """
    sides = np.sort(scores_N[~is_positive_N]), np.sort(scores_N[is_positive_N])
    below, above = (
        (np.searchsorted(side, scores_N) + np.searchsorted(side, scores_N, "right")) / 2 / max(len(side), 1)
        for side in sides
    )
    return np.where(is_positive_N, below, 1 - above)


def roc_points(scores_N: Floats, is_positive_N: npt.NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """False positive rate and sensitivity at every threshold, from (0, 0) to (1, 1); equal scores are one step.

    The area under their straight lines is the :func:`weighted_auc` of equal weights. Both sides hold a case at least.
    """
    order = np.argsort(-scores_N, kind="stable")
    ordered, positive = scores_N[order], is_positive_N[order]
    ends = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    hits, alarms = np.cumsum(positive)[ends], np.cumsum(~positive)[ends]
    return np.r_[0.0, alarms / alarms[-1]], np.r_[0.0, hits / hits[-1]]


def confusion(classes_N: Ints, predicted_N: Ints, num_classes: int, weights_BN: Floats) -> Floats:
    """Weights (B, K, K) of the cases by class (rows) and predicted class (columns)."""
    cells = np.zeros((len(classes_N), num_classes * num_classes))
    cells[np.arange(len(classes_N)), classes_N * num_classes + predicted_N] = 1
    return (weights_BN @ cells).reshape(len(weights_BN), num_classes, num_classes)


def rates(confusion_BKK: Floats) -> dict[str, Floats]:
    """Accuracy, balanced accuracy and macro F1 (B,), and recall, precision and F1 of each class (B, K)."""
    hit = np.diagonal(confusion_BKK, axis1=1, axis2=2)
    held, called = confusion_BKK.sum(2), confusion_BKK.sum(1)
    with np.errstate(invalid="ignore"):
        recall, precision, f1 = hit / held, hit / called, 2 * hit / (held + called)
        accuracy = hit.sum(1) / held.sum(1)
    return {
        "accuracy": accuracy,
        "balanced_accuracy": defined_mean(recall),
        "f1_macro": defined_mean(f1),
        "recall": recall,
        "precision": precision,
        "f1": f1,
    }


def defined_mean(values: Floats, axis: int = 1) -> Floats:
    """Mean along an axis over what is not NaN; NaN where nothing is."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(defined, values, 0).sum(axis) / defined.sum(axis))


@dataclass(frozen=True)
class Reliability:
    """Cases by how sure the classifier was, under weights.

    Attributes:
        weight_BM: Weight of each bin.
        mean_probability_BM: Mean probability in each bin; NaN where it is empty.
        frequency_BM: How often the event came true there.
    """

    weight_BM: Floats
    mean_probability_BM: Floats
    frequency_BM: Floats

    @property
    def ece(self) -> Floats:
        """Expected calibration error (B,): mean gap between the two, weighted by cases (Naeini et al. 2015)."""
        gaps = np.nan_to_num(np.abs(self.mean_probability_BM - self.frequency_BM))
        return np.asarray((gaps * self.weight_BM).sum(1) / self.weight_BM.sum(1))


def reliability(
    probabilities_N: Floats, came_true_N: npt.NDArray[np.bool_], num_bins: int, weights_BN: Floats
) -> Reliability:
    """Sort cases into bins of equal width from 0 to 1; a probability on an edge belongs to the bin below it."""
    bins = np.clip(np.ceil(np.round(probabilities_N * num_bins, 9)).astype(np.int64) - 1, 0, num_bins - 1)
    cells = np.zeros((len(bins), num_bins))
    cells[np.arange(len(bins)), bins] = 1
    weight = weights_BN @ cells
    with np.errstate(invalid="ignore"):
        return Reliability(
            weight,
            (weights_BN @ (cells * probabilities_N[:, None])) / weight,
            (weights_BN @ (cells * came_true_N[:, None])) / weight,
        )
