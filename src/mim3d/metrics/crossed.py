"""Scores of patients under several seeds: means, intervals over patients and seeds, and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mim3d.metrics.bootstrap import Bootstrap, Floats, Interval, interval
from mim3d.metrics.class_statistics import Ints, defined_mean, placements, ranked_pairs
from mim3d.metrics.paired import ROUNDING, signed_rank_p

CONVENTIONS = {
    "mean": "Mean over patients and seeds; a patient's score is the mean over labels and cases, where defined.",
    "ci95": (
        "95 % percentile interval: patients and seeds are drawn with replacement, independently of each other, and the "
        "mean is computed anew, num_bootstrap times. With few patients or seeds such intervals are somewhat too short; "
        "with one seed they say nothing of other seeds."
    ),
    "difference": "Mean of the arm less the reference, over the patients and seeds that both have; ci95 as above.",
    "p": (
        "Two-sided Wilcoxon signed-rank test of the patients' differences, each the mean over seeds; zero differences "
        "are dropped. p_holm is corrected over all tests of the table (Holm 1979)."
    ),
    "auc": (
        "Classes: the share of pairs of tested cases that are ranked rightly (ties count half), of all pairs in "
        "one fold: one network tested both, and probabilities of different networks have no common scale. It is taken "
        "for each seed, and the mean over seeds. Several classes: the mean over those that occur of each against the "
        "rest. Differences are over the cases and seeds that both have. p is two-sided, of DeLong's paired test "
        "(DeLong et al. 1988), for patients with several cases as Obuchowski (1997) extends it; what it is made of is "
        "averaged over seeds and classes. It is null where a class, or its rest, is of one tested patient."
    ),
}


@dataclass(frozen=True, eq=False)
class CrossedScores:
    """Scores of patients under seeds.

    Attributes:
        values_PS: Score of patient p under seed s, NaN where there is none.
    """

    values_PS: Floats

    def mean(self) -> float | None:
        """The mean of all that is there; None where nothing is."""
        known = self.values_PS[~np.isnan(self.values_PS)]
        return float(known.mean()) if known.size else None

    def interval(self, bootstrap: Bootstrap) -> Interval:
        """The interval of the mean over patients and seeds; None where fewer than two patients have a score."""
        defined_PS = ~np.isnan(self.values_PS)
        if not bootstrap.num_bootstrap or defined_PS.any(1).sum() < 2:
            return None
        sums_PS, numbers_PS = np.where(defined_PS, self.values_PS, 0.0), defined_PS.astype(np.float64)
        num_patients, num_seeds = sums_PS.shape
        rng = np.random.default_rng([bootstrap.seed, num_seeds])

        def means(counts_BP: Floats) -> Floats:
            seeds_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(counts_BP))
            with np.errstate(invalid="ignore"):
                drawn: Floats = ((counts_BP @ sums_PS) * seeds_BS).sum(1) / ((counts_BP @ numbers_PS) * seeds_BS).sum(1)
            return drawn

        return interval(bootstrap.resampled(num_patients, means))

    def less(self, other: "CrossedScores") -> "CrossedScores":
        """The differences to other scores of the same patients and seeds, where both are there."""
        return CrossedScores(self.values_PS - other.values_PS)

    def signed_rank_p(self) -> float | None:
        """Two-sided p of the signed-rank test that the patients' means over seeds lie around zero."""
        means = defined_mean(self.values_PS)
        return signed_rank_p(means[~np.isnan(means)])


@dataclass(frozen=True, eq=False, kw_only=True)
class CrossedClasses:
    """Probabilities of cases under several seeds.

    Attributes:
        probabilities_SNK: Probability of each class, NaN where a seed has none of a case.
        classes_N: Number of the true class.
        patients_N: Number of the patient, from 0.
        folds_N: Number of the fold in which the case is tested. Cases are ranked within their fold.
        positive: Number of the positive class of two; None scores the mean over classes of each against the rest.
    """

    probabilities_SNK: Floats
    classes_N: Ints
    patients_N: Ints
    folds_N: Ints
    positive: int | None

    def auc(self, seed: int, counts_BP: Floats) -> Floats:
        """AUC (B,) of a seed where each patient is there so many times."""
        probabilities_NK, folds, each = self.probabilities_SNK[seed], self._folds(seed), []
        for name in self._scored():
            wins, pairs = np.zeros(len(counts_BP)), np.zeros(len(counts_BP))
            for inside in folds:
                is_positive, weights_BN = self.classes_N[inside] == name, counts_BP[:, self.patients_N[inside]]
                of_fold = ranked_pairs(probabilities_NK[inside, name], is_positive, weights_BN)
                wins, pairs = wins + of_fold[0], pairs + of_fold[1]
            with np.errstate(invalid="ignore"):
                each.append(wins / pairs)
        return defined_mean(np.stack(each, axis=1))

    def mean(self) -> float | None:
        """The mean over seeds of the AUC; None where none is defined."""
        whole = np.ones((1, int(self.patients_N.max()) + 1))
        return CrossedScores(np.stack([self.auc(s, whole) for s in range(len(self.probabilities_SNK))], axis=1)).mean()

    def interval(self, bootstrap: Bootstrap) -> Interval:
        """The interval of the mean over patients and seeds; None where fewer than two patients are known."""
        return interval(self._drawn(bootstrap)) if self._has_interval(bootstrap) else None

    def against(self, other: "CrossedClasses", bootstrap: Bootstrap) -> tuple[float | None, Interval, float | None]:
        """The mean less that of another arm on the cases and seeds that both have, its interval, and p."""
        unknown_SN1 = np.isnan(self.probabilities_SNK + other.probabilities_SNK).any(2, keepdims=True)
        ours, theirs = (
            replace(each, probabilities_SNK=np.where(unknown_SN1, np.nan, each.probabilities_SNK))
            for each in (self, other)
        )
        first, second = ours.mean(), theirs.mean()
        if first is None or second is None:
            return None, None, None
        ends = None
        if ours._has_interval(bootstrap):
            ends = interval(ours._drawn(bootstrap) - theirs._drawn(bootstrap))
        return first - second, ends, _delong_p(ours, theirs)

    def influence(self, seed: int) -> Floats:
        """How far each patient (P,) moves the AUC of a seed: what its pairs win less what all win on average.

        The sum of their squares is the variance of the AUC: that of DeLong et al. (1988) where each patient has one
        case and there is one fold. NaN where a side has fewer than two patients.
        """
        probabilities_NK, folds, each = self.probabilities_SNK[seed], self._folds(seed), []
        for name in self._scored():
            is_positive = self.classes_N == name
            wins_N, pairs_N = np.zeros(len(is_positive)), np.zeros(len(is_positive))
            for inside in folds:
                side = is_positive[inside]
                pairs_N[inside] = np.where(side, (~side).sum(), side.sum())
                wins_N[inside] = placements(probabilities_NK[inside, name], side) * pairs_N[inside]
            if not (num_pairs := pairs_N[is_positive].sum()):
                # As in the mean: over the classes that occur.
                continue
            left_N = (wins_N - pairs_N * wins_N[is_positive].sum() / num_pairs) / num_pairs
            moved = np.zeros(int(self.patients_N.max()) + 1)
            for side in (is_positive & (pairs_N > 0), ~is_positive & (pairs_N > 0)):
                num_patients = len(np.unique(self.patients_N[side]))
                spare = num_patients / (num_patients - 1) if num_patients > 1 else np.nan
                moved += np.bincount(self.patients_N[side], left_N[side], len(moved)) * spare**0.5
            each.append(moved)
        return np.mean(each, axis=0) if each else np.full(int(self.patients_N.max()) + 1, np.nan)

    def _folds(self, seed: int) -> list[Ints]:
        """The places of the cases of each fold that a seed has probabilities of."""
        known = np.flatnonzero(~np.isnan(self.probabilities_SNK[seed]).any(1))
        return [known[self.folds_N[known] == fold] for fold in np.unique(self.folds_N[known])]

    def _scored(self) -> Sequence[int]:
        return range(self.probabilities_SNK.shape[2]) if self.positive is None else [self.positive]

    def _has_interval(self, bootstrap: Bootstrap) -> bool:
        known_N = ~np.isnan(self.probabilities_SNK).any(2).all(0)
        return bool(bootstrap.num_bootstrap) and len(np.unique(self.patients_N[known_N])) > 1

    def _drawn(self, bootstrap: Bootstrap) -> Floats:
        """AUC (num_bootstrap,) with patients and seeds drawn anew, the same ones for every arm."""
        num_seeds = len(self.probabilities_SNK)
        rng = np.random.default_rng([bootstrap.seed, num_seeds])

        def means(counts_BP: Floats) -> Floats:
            seeds_BS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=len(counts_BP))
            values_BS = np.stack([self.auc(seed, counts_BP) for seed in range(num_seeds)], axis=1)
            weights_BS = np.where(np.isnan(values_BS), 0, seeds_BS)
            with np.errstate(invalid="ignore"):
                drawn: Floats = np.nansum(values_BS * weights_BS, axis=1) / weights_BS.sum(1)
            return drawn

        return bootstrap.resampled(int(self.patients_N.max()) + 1, means)


def _delong_p(ours: CrossedClasses, theirs: CrossedClasses) -> float | None:
    """Two-sided p that the AUCs of the same cases are the same; None where their difference has no variance."""
    seeds = range(len(ours.probabilities_SNK))
    moved_SP = np.stack([ours.influence(seed) - theirs.influence(seed) for seed in seeds])
    whole = np.ones((1, moved_SP.shape[1]))
    apart_S = np.array([float((ours.auc(seed, whole) - theirs.auc(seed, whole))[0]) for seed in seeds])
    defined = ~np.isnan(apart_S)
    difference, variance = float(apart_S[defined].mean()), float((moved_SP[defined].mean(0) ** 2).sum())
    if abs(difference) < ROUNDING:
        return 1.0
    # Without any variance, as of classifiers that are never wrong, there is nothing to test by.
    return math.erfc(abs(difference) / math.sqrt(2 * variance)) if variance > ROUNDING**2 else None
