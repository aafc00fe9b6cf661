"""Scores of class probabilities, with intervals over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError, DataError
from mim3d.metrics import bootstrap as resampling
from mim3d.metrics.bootstrap import Bootstrap, Floats, Interval, grouped, plain, summed
from mim3d.metrics.class_statistics import Ints, confusion, defined_mean, rates, reliability, weighted_auc

#: Probabilities may miss a sum of 1 by this much, from rounding in a file.
SUM_TOLERANCE = 1e-2

#: What every number in a file of classification scores means; written into it.
CONVENTIONS = {
    "auc": (
        "Area under the receiver operating characteristic, ties count half. Two classes: of the positive class. More: "
        "macro, the mean over classes of each against the rest, over classes that occur."
    ),
    "predicted": (
        "The class that the file of predictions names, else the one of greatest probability (the first of equal ones)."
    ),
    "accuracy": "Share of cases whose predicted class is theirs.",
    "balanced_accuracy": "Mean over the classes that occur of the share of their cases that are predicted so (recall).",
    "f1_macro": "Mean over classes that occur or are predicted of 2 TP / (2 TP + FP + FN).",
    "sensitivity": "Two classes: share of positive cases predicted positive. specificity: the same of the negative.",
    "brier": (
        "Two classes: mean of (p - y)^2, p the probability of the positive class, y 1 for it and 0 otherwise. More: "
        "mean of the sum of (p - y)^2 over classes (Brier 1950), 0 to 2."
    ),
    "ece": (
        "Expected calibration error over num_bins bins of equal width from 0 to 1, closed above: mean over cases of "
        "|mean probability - frequency| of their bin. Two classes: of the positive class. More: of the most probable "
        "class and whether it is right (Guo et al. 2017)."
    ),
    "by_patient": "Where true, a patient is one case, whose probabilities are the mean over the patient's scans.",
    "ci95": resampling.CONVENTION,
    "baseline": (
        "AUC of one column of the references, where a larger value speaks for the positive class, on the same cases; "
        "difference is the AUC of the predictions less that of the baseline, with its paired interval."
    ),
    "comparison": (
        "Scores on the cases of both methods; difference is predictions less compare, with its paired interval."
    ),
}


@dataclass(frozen=True, kw_only=True)
class ClassifiedCases:
    """Cases with what was predicted of them.

    Attributes:
        probabilities_NK: Probability of each class; rows sum to 1.
        classes_N: Number of the true class, from 0.
        class_names: K names.
        patients: Whose case each is.
        predicted_N: Number of the predicted class.
        positive: Number of the positive class.
        baseline_N: A number of each case that the classifier is compared with, or None.
    """

    probabilities_NK: Floats
    classes_N: Ints
    class_names: tuple[str, ...]
    patients: tuple[str, ...]
    predicted_N: Ints
    positive: int
    baseline_N: Floats | None = None

    def __post_init__(self) -> None:
        shape = self.probabilities_NK.shape
        if len(shape) != 2 or shape[1] < 2 or not shape[0]:
            raise DataError(f"Probabilities have the shape {shape}; they take a row per case and two or more classes.")
        lengths = {shape[0], len(self.classes_N), len(self.patients), len(self.predicted_N)}
        if len(lengths) > 1 or len(self.class_names) != shape[1]:
            raise DataError(
                f"There are {shape[0]} rows of {shape[1]} probabilities, {len(self.classes_N)} classes, "
                f"{len(self.patients)} patients and {len(self.class_names)} class names; give each case one of each."
            )
        sums = self.probabilities_NK.sum(1)
        outside = (self.probabilities_NK < 0).any(1) | (self.probabilities_NK > 1).any(1)
        faults = np.flatnonzero(~np.isfinite(sums) | outside | (np.abs(sums - 1) > SUM_TOLERANCE))
        if faults.size:
            raise DataError(
                f"The probabilities {self.probabilities_NK[faults[0]].tolist()} of case {faults[0] + 1} are none; they "
                "lie from 0 to 1 and sum to 1."
            )
        numbers = np.concatenate([self.classes_N, self.predicted_N, [self.positive]])
        if numbers.min() < 0 or numbers.max() >= shape[1]:
            raise DataError(f"Classes count from 0 to {shape[1] - 1}, but {numbers.max()} or {numbers.min()} is there.")

    @property
    def is_binary(self) -> bool:
        """Whether there are two classes."""
        return len(self.class_names) == 2

    def of_patients(self) -> "ClassifiedCases":
        """The same with one case per patient: mean probabilities, mean baseline.

        Raises:
            DataError: A patient's scans have different classes.
        """
        names, of_case = grouped(self.patients)
        counts = summed(np.ones(len(of_case)), of_case, len(names))
        first = np.array([np.flatnonzero(of_case == place)[0] for place in range(len(names))])
        mixed = np.flatnonzero(self.classes_N != self.classes_N[first][of_case])
        if mixed.size:
            raise DataError(
                f"Patient {self.patients[mixed[0]]} has scans of different classes, so that one class for each patient "
                "does not exist; leave by_patient out."
            )
        probabilities = summed(self.probabilities_NK, of_case, len(names)) / counts[:, None]
        baseline = None if self.baseline_N is None else summed(self.baseline_N, of_case, len(names)) / counts
        return replace(
            self,
            probabilities_NK=probabilities,
            classes_N=self.classes_N[first],
            patients=tuple(names),
            predicted_N=probabilities.argmax(1),
            baseline_N=baseline,
        )


def classification_scores(
    probabilities: npt.ArrayLike,
    classes: npt.ArrayLike,
    *,
    class_names: Sequence[str] | None = None,
    predicted: npt.ArrayLike | None = None,
    patients: Sequence[str] | None = None,
    by_patient: bool = False,
    positive: int | None = None,
    baseline: npt.ArrayLike | None = None,
    num_bins: int = 10,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Score class probabilities, as :data:`CONVENTIONS` says.

    Args:
        probabilities: (N, K), rows sum to 1.
        classes: Number of the true class of each case, (N,), from 0.
        class_names: K names; numbers if left out.
        predicted: Number of the predicted class of each case; the most probable one if left out.
        patients: Whose case each is; each is its own patient's if left out.
        by_patient: Score patients, by their mean probabilities, not scans.
        positive: Number of the positive class; the last if left out.
        baseline: A number of each case, larger for the positive class, whose AUC the classifier is compared with.
        num_bins: Number of bins of the calibration error.
        bootstrap: How intervals are made; 2000 resamples if left out.

    Returns:
        ``{"mean": {score: value}, "mean_ci95": {score: [low, high]}, "per_class": {name: {...}}, "confusion": [[...]],
        "reliability": [...], "num_cases", "num_patients"}``, with "baseline" where there is one.

    Raises:
        DataError: Shapes that differ, values that are no probabilities, or a patient of several classes by patient.
        ConfigError: Fewer than one bin.
    """
    values = np.asarray(probabilities, dtype=np.float64)
    numbers = np.asarray(classes, dtype=np.int64)
    num_cases, num_classes = values.shape if values.ndim == 2 else (0, 0)
    cases = ClassifiedCases(
        probabilities_NK=values,
        classes_N=numbers,
        class_names=tuple(class_names or map(str, range(num_classes))),
        patients=tuple(patients or map(str, range(num_cases))),
        predicted_N=values.argmax(-1) if predicted is None else np.asarray(predicted, dtype=np.int64),
        positive=num_classes - 1 if positive is None else positive,
        baseline_N=None if baseline is None else np.asarray(baseline, dtype=np.float64),
    )
    return score_classes(cases.of_patients() if by_patient else cases, num_bins, bootstrap or Bootstrap())


def score_classes(cases: ClassifiedCases, num_bins: int = 10, bootstrap: Bootstrap = Bootstrap()) -> dict[str, Any]:
    """What :func:`classification_scores` returns, of checked cases."""
    if num_bins < 1:
        raise ConfigError(f"num_bins is {num_bins}, but a calibration error takes one bin or more.")
    classes, whole = cases.classes_N, np.ones((1, len(cases.classes_N)))
    values = _statistics(cases, num_bins, whole)
    matrix = confusion(classes, cases.predicted_N, len(cases.class_names), whole)
    of_class = rates(matrix)
    bins = reliability(*_judged_probabilities(cases), num_bins, whole)
    content = {
        "mean": {key: plain(value[0]) for key, value in values.items()},
        "mean_ci95": _intervals(cases, bootstrap, partial(_statistics, cases, num_bins)),
        "per_class": {
            name: {
                "num_cases": int((classes == k).sum()),
                "num_predicted": int((cases.predicted_N == k).sum()),
                **{key: plain(of_class[key][0, k]) for key in ("recall", "precision", "f1")},
                "auc": plain(weighted_auc(cases.probabilities_NK[:, k], classes == k, whole)[0]),
            }
            for k, name in enumerate(cases.class_names)
        },
        "confusion": matrix[0].astype(int).tolist(),
        "reliability": [
            {
                "from": place / num_bins,
                "to": (place + 1) / num_bins,
                "num_cases": int(bins.weight_BM[0, place]),
                "mean_probability": plain(bins.mean_probability_BM[0, place]),
                "frequency": plain(bins.frequency_BM[0, place]),
            }
            for place in range(num_bins)
        ],
        "num_cases": len(classes),
        "num_patients": len(set(cases.patients)),
    }
    if cases.baseline_N is not None:
        content["baseline"] = _baseline(cases, bootstrap)
    return content


def compare_classes(
    ours: ClassifiedCases, theirs: ClassifiedCases, num_bins: int, bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """For each score, that of both methods on the same cases, and the paired interval of their difference."""

    def differences(weights_BN: Floats) -> dict[str, Floats]:
        first, second = (_statistics(cases, num_bins, weights_BN) for cases in (ours, theirs))
        return {key: first[key] - second[key] for key in first}

    whole = np.ones((1, len(ours.patients)))
    first, second = (_statistics(cases, num_bins, whole) for cases in (ours, theirs))
    return {
        key: {
            "value": plain(first[key][0]),
            "compared": plain(second[key][0]),
            "difference": plain(first[key][0] - second[key][0]),
            "ci95": ends,
        }
        for key, ends in _intervals(ours, bootstrap, differences).items()
    }


def _intervals(
    cases: ClassifiedCases, bootstrap: Bootstrap, statistics: Callable[[Floats], dict[str, Floats]]
) -> dict[str, Interval]:
    """Intervals of statistics of the cases' weights (B, N)."""
    names, of_case = grouped(cases.patients)
    return bootstrap.intervals(len(names), lambda counts_BP: statistics(counts_BP[:, of_case]))


def _statistics(cases: ClassifiedCases, num_bins: int, weights_BN: Floats) -> dict[str, Floats]:
    """Every score (B,) under weights."""
    probabilities, classes = cases.probabilities_NK, cases.classes_N
    num_classes = len(cases.class_names)
    found = rates(confusion(classes, cases.predicted_N, num_classes, weights_BN))
    ranked = [cases.positive] if cases.is_binary else range(num_classes)
    of_classes = [weighted_auc(probabilities[:, k], classes == k, weights_BN) for k in ranked]
    scores = {"auc": defined_mean(np.stack(of_classes, axis=1))}
    scores |= {key: found[key] for key in ("accuracy", "balanced_accuracy", "f1_macro")}
    errors = (probabilities - np.eye(num_classes)[classes]) ** 2
    if cases.is_binary:
        scores["sensitivity"] = found["recall"][:, cases.positive]
        scores["specificity"] = found["recall"][:, 1 - cases.positive]
        errors = errors[:, [cases.positive]]
    scores["brier"] = (weights_BN @ errors.sum(1)) / weights_BN.sum(1)
    scores["ece"] = reliability(*_judged_probabilities(cases), num_bins, weights_BN).ece
    return scores


def _judged_probabilities(cases: ClassifiedCases) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The probability whose calibration is looked at, and whether its event came true."""
    if cases.is_binary:
        return cases.probabilities_NK[:, cases.positive], cases.classes_N == cases.positive
    return cases.probabilities_NK.max(1), cases.probabilities_NK.argmax(1) == cases.classes_N


def _baseline(cases: ClassifiedCases, bootstrap: Bootstrap) -> dict[str, Any]:
    """AUC of the baseline's number and of the probability of the positive class, and their difference."""
    assert cases.baseline_N is not None
    is_positive = cases.classes_N == cases.positive
    columns = (cases.probabilities_NK[:, cases.positive], cases.baseline_N)

    def aucs(weights_BN: Floats) -> dict[str, Floats]:
        ours, theirs = (weighted_auc(column, is_positive, weights_BN) for column in columns)
        return {"predictions": ours, "baseline": theirs, "difference": ours - theirs}

    ends = _intervals(cases, bootstrap, aucs)
    point = aucs(np.ones((1, len(is_positive))))
    return {name: {"auc": plain(value[0]), "ci95": ends[name]} for name, value in point.items()}
