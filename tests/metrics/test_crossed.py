"""Scores of patients under several seeds, against plain loops and scipy."""

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, wilcoxon

from mim3d.metrics.bootstrap import Bootstrap
from mim3d.metrics.crossed import CrossedClasses, CrossedScores

RNG = np.random.default_rng(5)
ONE = RNG.uniform(0.5, 0.9, (12, 3))
TWO = ONE + RNG.normal(0.02, 0.05, ONE.shape)
TWO[3, 1] = TWO[7] = np.nan


def test_the_mean_is_over_what_is_there():
    assert CrossedScores(ONE).mean() == pytest.approx(sum(map(sum, ONE.tolist())) / ONE.size)
    assert CrossedScores(TWO).mean() == pytest.approx(np.nanmean(TWO))
    assert CrossedScores(np.full((2, 2), np.nan)).mean() is None


def test_intervals_are_those_of_a_plain_loop_over_drawn_patients_and_seeds():
    bootstrap = Bootstrap(num_bootstrap=4000, seed=3)
    low, high = CrossedScores(TWO).interval(bootstrap) or (0, 0)
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        patients, seeds = rng.integers(12, size=12), rng.integers(3, size=3)
        drawn.append(np.nanmean(TWO[np.ix_(patients, seeds)]))
    assert [low, high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.004)


def test_more_seeds_that_agree_do_not_widen_an_interval_but_seeds_that_differ_do():
    bootstrap = Bootstrap(num_bootstrap=1000)
    alike = np.repeat(ONE[:, :1], 3, axis=1)
    apart = alike + np.array([-0.2, 0.0, 0.2])
    widths = [np.diff(CrossedScores(each).interval(bootstrap) or [0, 0])[0] for each in (alike, apart)]
    assert widths[1] > 2 * widths[0]


def test_p_is_scipys_signed_rank_test_of_the_patients_means():
    less = CrossedScores(TWO).less(CrossedScores(ONE))
    means = [np.nanmean(row) for row in TWO - ONE if not np.isnan(row).all()]
    assert len(means) == 11
    assert less.signed_rank_p() == pytest.approx(wilcoxon(means).pvalue)
    assert less.mean() == pytest.approx(np.nanmean(TWO - ONE))


def test_one_patient_has_no_interval():
    assert CrossedScores(ONE[:1]).interval(Bootstrap(num_bootstrap=100)) is None


def test_auc_of_classes_is_the_mean_over_seeds_of_the_mann_whitney_statistic():
    classes = np.array([0, 1] * 6)
    positive = np.clip(RNG.normal(0.4 + 0.2 * classes, 0.2, (2, 12)), 0, 1)
    scores = CrossedClasses(
        probabilities_SNK=np.stack([1 - positive, positive], axis=2),
        classes_N=classes,
        patients_N=np.arange(12) // 2,
        positive=1,
    )
    wins = [mannwhitneyu(seed[classes == 1], seed[classes == 0]).statistic / 36 for seed in positive]
    assert scores.mean() == pytest.approx(np.mean(wins))
    drawn = scores.drawn(Bootstrap(num_bootstrap=500))
    assert drawn.shape == (500,) and 0 <= np.nanmin(drawn) <= scores.mean() <= np.nanmax(drawn) <= 1
