"""Scores of patients under several seeds, against plain loops and scipy."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import mannwhitneyu, norm, wilcoxon

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
        folds_N=np.zeros(12, np.int64),
        positive=1,
    )
    wins = [mannwhitneyu(seed[classes == 1], seed[classes == 0]).statistic / 36 for seed in positive]
    assert scores.mean() == pytest.approx(np.mean(wins))
    low, high = scores.interval(Bootstrap(num_bootstrap=500)) or (1, 0)
    assert 0 <= low <= scores.mean() <= high <= 1
    assert scores.interval(Bootstrap(num_bootstrap=0)) is None


def two_arms(cases_per_patient: int, num_seeds: int) -> tuple[CrossedClasses, CrossedClasses]:
    """Two classifiers of forty cases; patients have cases of both classes where they have several."""
    rng, classes = np.random.default_rng(7), np.arange(40) % 2
    arms = []
    for gain in (0.5, 0.2):
        positive = np.round(1 / (1 + np.exp(-rng.normal(gain * classes, 0.7, (num_seeds, 40)))), 1)
        probabilities = np.stack([1 - positive, positive], axis=2)
        patients = np.arange(40) // cases_per_patient
        folds = np.zeros(40, np.int64)
        arms.append(
            CrossedClasses(
                probabilities_SNK=probabilities, classes_N=classes, patients_N=patients, folds_N=folds, positive=1
            )
        )
    return arms[0], arms[1]


def wins(scores: np.ndarray) -> np.ndarray:
    """Which of the odd cases (rows) beat which of the even ones (columns), half a win for a tie."""
    return np.array([[(a > b) + (a == b) / 2 for b in scores[::2]] for a in scores[1::2]])


def test_p_of_classes_is_that_of_delong_where_each_patient_has_one_case():
    one, two = two_arms(1, num_seeds=1)
    tables = [wins(arm.probabilities_SNK[0, :, 1]) for arm in (one, two)]
    of_positive = np.cov([table.mean(1) for table in tables])
    of_negative = np.cov([table.mean(0) for table in tables])
    covariance = (of_positive + of_negative) / 20
    difference = tables[0].mean() - tables[1].mean()
    z = difference / np.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found, ends, p = one.against(two, Bootstrap(num_bootstrap=2000))
    assert found == pytest.approx(difference) and p == pytest.approx(2 * norm.sf(abs(z))) and 0.001 < p < 0.5
    assert ends is not None and ends[0] < difference < ends[1]


def test_p_of_patients_with_several_cases_and_seeds_is_about_that_of_drawing_patients_anew():
    one, two = two_arms(4, num_seeds=2)
    difference, _, p = one.against(two, Bootstrap(num_bootstrap=0))
    first, second = (np.mean([wins(seed[:, 1]) for seed in arm.probabilities_SNK], axis=0) for arm in (one, two))
    rng, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        # Two of the four cases of each patient are positive.
        cases = (2 * rng.integers(10, size=10)[:, None] + np.arange(2)).ravel()
        drawn.append((first - second)[np.ix_(cases, cases)].mean())
    assert 2 * norm.sf(abs(difference) / np.std(drawn)) == pytest.approx(p, rel=0.3)


def test_classes_are_compared_on_the_cases_and_seeds_that_both_have():
    one, two = two_arms(2, num_seeds=2)
    expected = one.against(two, Bootstrap(num_bootstrap=200))
    cases = np.concatenate([np.arange(40), np.arange(4)])
    longer = [
        CrossedClasses(
            probabilities_SNK=np.concatenate([arm.probabilities_SNK[:, cases], np.ones((1, 44, 2)) / 2]),
            classes_N=np.concatenate([arm.classes_N, np.zeros(4, np.int64)]),
            patients_N=np.concatenate([arm.patients_N, np.zeros(4, np.int64)]),
            folds_N=np.zeros(44, np.int64),
            positive=1,
        )
        for arm in (one, two)
    ]
    longer[0].probabilities_SNK[2] = longer[1].probabilities_SNK[:, 40:] = np.nan
    found = longer[0].against(longer[1], Bootstrap(num_bootstrap=0))
    assert (found[0], found[2]) == pytest.approx((expected[0], expected[2]))
    assert one.against(one, Bootstrap(num_bootstrap=200)) == (0.0, [0.0, 0.0], 1.0)
    never = replace(two, probabilities_SNK=np.full_like(two.probabilities_SNK, np.nan))
    assert one.against(never, Bootstrap(num_bootstrap=200)) == (None, None, None)


def of_patients(probabilities: np.ndarray, classes: np.ndarray) -> CrossedClasses:
    """One seed of patients with a case each, of several classes."""
    patients, folds = np.arange(len(classes)), np.zeros(len(classes), np.int64)
    return CrossedClasses(
        probabilities_SNK=probabilities[None], classes_N=classes, patients_N=patients, folds_N=folds, positive=None
    )


def test_several_classes_have_a_p_and_perfect_classifiers_none():
    rng, classes = np.random.default_rng(2), np.arange(30) % 3
    one, two, best, worst = (
        of_patients(each, classes)
        for each in (rng.dirichlet(np.ones(3), 30), rng.dirichlet(np.ones(3), 30), np.eye(3)[classes], np.ones((30, 3)))
    )
    assert 0 < (one.against(two, Bootstrap(num_bootstrap=0))[2] or 0) < 1
    assert best.against(worst, Bootstrap(num_bootstrap=0)) == (0.5, None, None)


def test_p_of_several_classes_is_over_those_that_are_tested():
    rng, classes = np.random.default_rng(4), np.arange(30) % 3
    one, two = (of_patients(each, classes) for each in rng.dirichlet(np.ones(3), (2, 30)))
    four_one, four_two = (
        replace(arm, probabilities_SNK=np.pad(arm.probabilities_SNK, ((0, 0), (0, 0), (0, 1)))) for arm in (one, two)
    )
    found, expected = (
        first.against(second, Bootstrap(num_bootstrap=0)) for first, second in ((four_one, four_two), (one, two))
    )
    assert found == pytest.approx(expected) and expected[2] is not None
    alone = [replace(arm, classes_N=np.where(np.arange(30) == 0, 3, classes)) for arm in (four_one, four_two)]
    assert alone[0].against(alone[1], Bootstrap(num_bootstrap=0))[2] is None


def test_cases_are_ranked_within_the_fold_that_one_network_tested():
    one, two = (replace(arm, folds_N=np.arange(40) // 4 % 3) for arm in two_arms(4, num_seeds=2))
    shares = []
    for seed in one.probabilities_SNK[:, :, 1]:
        same_fold = one.folds_N[1::2, None] == one.folds_N[None, ::2]
        shares.append((wins(seed) * same_fold).sum() / same_fold.sum())
    assert one.mean() == pytest.approx(np.mean(shares))
    # Another network's scale changes nothing.
    moved = replace(one, probabilities_SNK=one.probabilities_SNK * 2.0 ** -one.folds_N[:, None])
    settings = Bootstrap(num_bootstrap=200)
    assert moved.interval(settings) == pytest.approx(one.interval(settings))
    assert moved.against(two, settings) == one.against(two, settings)


def test_the_variance_over_several_folds_is_that_of_drawing_patients_anew():
    rng = np.random.default_rng(3)
    patients, classes = np.arange(400) // 2, rng.integers(2, size=400)
    logits = classes + rng.normal(size=400) + rng.normal(size=200)[patients] + patients // 50
    positive = 1 / (1 + np.exp(-logits))
    arm = CrossedClasses(
        probabilities_SNK=np.stack([1 - positive, positive], axis=1)[None],
        classes_N=classes,
        patients_N=patients,
        folds_N=patients // 50,
        positive=1,
    )
    ends = arm.interval(Bootstrap(num_bootstrap=4000))
    half = 1.96 * np.sqrt((arm.influence(0) ** 2).sum())
    assert ends == pytest.approx((arm.mean() - half, arm.mean() + half), abs=0.15 * half)
