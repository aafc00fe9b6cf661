"""Means of scores over cases and labels, with their intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.metrics.bootstrap import Bootstrap, Floats, Interval, grouped, interval, plain, summed, summed_defined
from mim3d.metrics.class_statistics import defined_mean
from mim3d.metrics.label_scores import SCORE_NAMES, LabelScore
from mim3d.metrics.lesions import detection_rates

CONVENTIONS = {
    "means": (
        "per_label averages over cases, std is the deviation over cases (population); mean averages "
        "per_label over labels, so that every label weighs the same; mean_std is the deviation over cases of each "
        "case's own mean over labels. null marks what no case defines."
    ),
}

#: Counts of lesions that are summed over cases, and what is made of them.
_LESION_COUNTS = ("num_reference", "num_predicted", "num_detected", "num_true", "false_positives")
LESION_RATES = ("sensitivity", "precision", "f1", "dice", "false_positives_per_scan")


def summarise(
    cases: Sequence[Mapping[str, LabelScore]],
    names: Sequence[str],
    patients: Sequence[str] | None = None,
    bootstrap: Bootstrap | None = None,
) -> dict[str, Any]:
    """Means over cases and labels, as :data:`CONVENTIONS` states them.

    Args:
        cases: Scores by label name, for each case.
        names: Label names, in the order of the table.
        patients: Whose case each is; each is its own patient's if left out.
        bootstrap: How intervals are made; none are if left out.

    Returns:
        ``{"mean": {score: value}, "mean_std": {...}, "mean_ci95": {score: [low, high]}, "per_label": {name: {score:
        value, "std": {...}, "ci95": {...}, "num_cases": ...}}}``, in ``per_label`` with "lesions" where they were
        scored; a value that nothing defines is None.
    """
    known, of_case = grouped(patients or [str(position) for position in range(len(cases))])
    resampling = bootstrap or Bootstrap(num_bootstrap=0)
    # None becomes NaN.
    rows = [[[getattr(case[name], key) for key in SCORE_NAMES] for name in names] for case in cases]
    values_NLS = np.array(rows, dtype=float).reshape(len(cases), len(names), len(SCORE_NAMES))
    label_intervals, mean_intervals = _intervals(values_NLS, of_case, len(known), resampling)
    per_label: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        scores = [case[name] for case in cases]
        counts = Counter(score.status for score in scores)
        per_label[name] = {
            **_by_score(defined_mean(values_NLS[:, place], 0)),
            "std": _by_score(_nan_std(values_NLS[:, place])),
            "ci95": dict(zip(SCORE_NAMES, label_intervals[place], strict=True)),
            "num_cases": len(scores) - counts["absent"],
            **{f"num_{status}": counts[status] for status in ("missed", "invented", "absent")},
        }
        lesions = _lesions(scores, of_case, len(known), resampling)
        if lesions is not None:
            per_label[name]["lesions"] = lesions
    return {
        "mean": _by_score(defined_mean(defined_mean(values_NLS, 0), 0)),
        "mean_std": _by_score(_nan_std(defined_mean(values_NLS, 1))),
        "mean_ci95": dict(zip(SCORE_NAMES, mean_intervals, strict=True)),
        "per_label": per_label,
    }


def _by_score(values: Floats) -> dict[str, float | None]:
    return {key: plain(value) for key, value in zip(SCORE_NAMES, values, strict=True)}


def _nan_std(values: Floats) -> Floats:
    """Population deviation over the first axis of what is defined."""
    return np.sqrt(defined_mean((values - defined_mean(values, 0)) ** 2, 0))


def _intervals(
    values_NLS: Floats, of_case: npt.NDArray[np.int64], num_patients: int, bootstrap: Bootstrap
) -> tuple[list[list[Interval]], list[Interval]]:
    """Intervals of the means (L, S) over cases, and (S,) over cases and labels."""
    _, num_labels, num_scores = values_NLS.shape
    none: list[Interval] = [None] * num_scores
    if not bootstrap.num_bootstrap or not num_labels:
        return [none] * num_labels, none
    sums, numbers = summed_defined(values_NLS, of_case, num_patients)
    means_BLS = bootstrap.resampled_means(sums, numbers)
    # A single patient's value would pass for one that is certain.
    enough_LS = (numbers > 0).sum(0) > 1
    per_label = [
        [interval(means_BLS[:, place, s]) if enough_LS[place, s] else None for s in range(num_scores)]
        for place in range(num_labels)
    ]
    enough_S = (numbers > 0).any(1).sum(0) > 1
    means_BS = defined_mean(means_BLS, 1)
    return per_label, [interval(means_BS[:, s]) if enough_S[s] else None for s in range(num_scores)]


def _lesions(
    scores: Sequence[LabelScore], of_case: npt.NDArray[np.int64], num_patients: int, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Lesions of all cases together; None where they were not scored."""
    found = [score.lesions for score in scores if score.lesions is not None]
    if not found or len(found) != len(scores):
        return None
    rows = [[getattr(each, key) for key in _LESION_COUNTS] + [sum(each.reference_dice), 1] for each in found]
    counts_PC = summed(np.array(rows, dtype=np.float64), of_case, num_patients)
    rates = _rates(counts_PC.sum(0)[None])[0]
    intervals: list[Interval] = [None] * len(LESION_RATES)
    if bootstrap.num_bootstrap and num_patients > 1:
        resampled_BR = bootstrap.resampled(num_patients, lambda drawn_BP: _rates(drawn_BP @ counts_PC))
        num_defining_R = (~np.isnan(_rates(counts_PC))).sum(0)
        intervals = [
            interval(column) if num > 1 else None for column, num in zip(resampled_BR.T, num_defining_R, strict=True)
        ]
    return {
        **{key: plain(value) for key, value in zip(LESION_RATES, rates, strict=True)},
        "ci95": dict(zip(LESION_RATES, intervals, strict=True)),
        **{key: int(value) for key, value in zip(_LESION_COUNTS, counts_PC.sum(0), strict=False)},
    }


def _rates(counts_BC: Floats) -> Floats:
    """:data:`LESION_RATES` (B, 5) of sums of :data:`_LESION_COUNTS`, of Dice, and of cases (B, 7)."""
    references, predictions, detected, true, false, dice, num_cases = counts_BC.T
    with np.errstate(invalid="ignore"):
        return np.stack(
            [*detection_rates(references, predictions, detected, true), dice / references, false / num_cases], axis=1
        )
