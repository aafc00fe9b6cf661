"""Scores of patients under several seeds: means, intervals over patients and seeds, and paired differences."""

from dataclasses import dataclass

import numpy as np

from mim3d.metrics.bootstrap import Bootstrap, Floats, Interval, interval
from mim3d.metrics.class_statistics import Ints, defined_mean, weighted_auc
from mim3d.metrics.paired import signed_rank_p

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
        "are dropped. p_holm is corrected over all tests of the table (Holm 1979). None for classes."
    ),
    "auc": "Classes: AUC of all tested cases together, for each seed, and the mean over seeds.",
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
        positive: Number of the positive class of two; None scores the mean over classes of each against the rest.
    """

    probabilities_SNK: Floats
    classes_N: Ints
    patients_N: Ints
    positive: int | None

    def auc(self, seed: int, counts_BP: Floats) -> Floats:
        """AUC (B,) of a seed where each patient is there so many times."""
        probabilities_NK = self.probabilities_SNK[seed]
        known = ~np.isnan(probabilities_NK).any(1)
        weights_BN = counts_BP[:, self.patients_N[known]]
        classes = range(probabilities_NK.shape[1]) if self.positive is None else [self.positive]
        each = [
            weighted_auc(probabilities_NK[known, name], self.classes_N[known] == name, weights_BN) for name in classes
        ]
        return defined_mean(np.stack(each, axis=1))

    def mean(self) -> float | None:
        """The mean over seeds of the AUC; None where none is defined."""
        whole = np.ones((1, int(self.patients_N.max()) + 1))
        return CrossedScores(np.stack([self.auc(s, whole) for s in range(len(self.probabilities_SNK))], axis=1)).mean()

    def drawn(self, bootstrap: Bootstrap) -> Floats:
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
