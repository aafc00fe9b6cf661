"""Two methods on the same cases: differences, their intervals, and tests."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.metrics.bootstrap import Bootstrap, Floats, grouped, interval, summed_defined
from mim3d.metrics.class_statistics import defined_mean
from mim3d.metrics.label_scores import LabelScore

#: Scores that two methods are compared by; those of lesions where they were scored.
PAIRED_NAMES = ("dice", "hd95_mm", "nsd", "volume_error_ml", "volume_error_ratio")
PAIRED_LESION_NAMES = ("sensitivity", "precision", "f1", "false_positives")

#: Smaller differences of equal scores that were averaged apart are rounding, no ranks.
ROUNDING = 1e-12

CONVENTIONS = {
    "difference": (
        "The score of predictions less that of compare, per case, then the mean over cases; ci95 is its bootstrap "
        "interval. Better is more for dice, nsd and lesion scores, less for hd95_mm, volume errors and "
        "lesion_false_positives. In the mean row a case's difference is its mean over labels."
    ),
    "pairs": (
        "A case enters where both methods define the score; num_unpaired counts cases where one alone does (a label "
        "that only one of them predicts where there is none)."
    ),
    "p": (
        "Two-sided Wilcoxon signed-rank test of the patients' mean differences; zero differences are dropped, and p is "
        "1 if all are zero. Exact for up to 50 patients (up to 13 with ties or zeros among them), else by the normal "
        "approximation (scipy.stats.wilcoxon)."
    ),
    "p_holm": "p corrected over labels, for each score by itself (Holm 1979); the mean row is no part of it.",
}


def paired_value(score: LabelScore, key: str) -> float | None:
    """A score by its name; those of lesions begin with ``lesion_``."""
    if not key.startswith("lesion_"):
        value: float | None = getattr(score, key)
        return value
    return None if score.lesions is None else getattr(score.lesions, key.removeprefix("lesion_"))


def compare_paired(
    ours: Sequence[Mapping[str, LabelScore]],
    theirs: Sequence[Mapping[str, LabelScore]],
    names: Sequence[str],
    patients: Sequence[str],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Compare two methods, as :data:`CONVENTIONS` says.

    Args:
        ours: Scores by label name, for each case.
        theirs: The same cases by the other method.
        names: Label names, in the order of the table.
        patients: Whose case each is.
        bootstrap: How intervals are made.

    Returns:
        ``{"mean": {score: {"difference", "ci95", "p", "num_pairs", "num_unpaired"}}, "per_label": {name: {score: {...,
        "p_holm"}}}}``.
    """
    with_lesions = any(score.lesions is not None for case in ours for score in case.values())
    keys = [*PAIRED_NAMES, *(f"lesion_{key}" for key in PAIRED_LESION_NAMES if with_lesions)]
    known, of_case = grouped(patients)
    mean: dict[str, Any] = {}
    per_label: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key in keys:
        # None becomes NaN.
        first, second = (
            np.array([[paired_value(case[name], key) for name in names] for case in cases], dtype=np.float64).reshape(
                len(cases), len(names)
            )
            for cases in (ours, theirs)
        )
        differences_NL = first - second
        is_unpaired_NL = np.isnan(first) != np.isnan(second)
        rows = [_compared(column, of_case, len(known), bootstrap) for column in differences_NL.T]
        for name, row, num_unpaired, p_holm in zip(
            names, rows, is_unpaired_NL.sum(0), holm([row["p"] for row in rows]), strict=True
        ):
            per_label[name][key] = {**row, "num_unpaired": int(num_unpaired), "p_holm": p_holm}
        of_cases = defined_mean(differences_NL)
        mean[key] = {
            **_compared(of_cases, of_case, len(known), bootstrap),
            "num_unpaired": int((np.isnan(of_cases) & is_unpaired_NL.any(1)).sum()),
        }
    return {"mean": mean, "per_label": per_label}


def _compared(
    differences_N: Floats, of_case: npt.NDArray[np.int64], num_patients: int, bootstrap: Bootstrap
) -> dict[str, Any]:
    """The mean of differences, NaN where a case has none, its interval and test."""
    sums, numbers = summed_defined(differences_N, of_case, num_patients)
    num_pairs, held = int(numbers.sum()), numbers > 0
    with_interval = bootstrap.num_bootstrap and held.sum() > 1
    return {
        "difference": float(sums.sum() / num_pairs) if num_pairs else None,
        "ci95": interval(bootstrap.resampled_means(sums, numbers)) if with_interval else None,
        "p": signed_rank_p(sums[held] / numbers[held]),
        "num_pairs": num_pairs,
    }


def signed_rank_p(differences: Floats) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test (Wilcoxon 1945); None without a difference to test.

    Args:
        differences: One of each patient, (N,).
    """
    from scipy.stats import wilcoxon

    if not differences.size:
        return None
    moved = differences[np.abs(differences) > ROUNDING]
    return float(wilcoxon(moved).pvalue) if moved.size else 1.0


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number (Holm 1979); None stays and does not count."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        corrected[place] = highest
    return corrected
