"""Intervals and paired tests against loops, exact values and textbook examples."""

import itertools

import numpy as np
import pytest

from mim3d.core.errors import ConfigError
from mim3d.metrics import ABSENT, Bootstrap, LabelScore, compare_paired, summarise
from mim3d.metrics.paired import holm, signed_rank_p


def scored(dice):
    return ABSENT if dice is None else LabelScore(status="scored", dice=dice, hd95_mm=1.0 - dice, nsd=dice)


def cases_of(*columns):
    """Cases from the Dice of each label."""
    return [{name: scored(dice) for name, dice in zip("ab", row, strict=False)} for row in zip(*columns, strict=True)]


def test_the_interval_is_that_of_a_plain_loop_over_resampled_patients():
    dice = np.random.default_rng(0).random(12)
    patients = [f"p{position // 2}" for position in range(12)]
    found = summarise(cases_of(dice), ["a"], patients, Bootstrap(num_bootstrap=300, seed=4))
    rng, means = np.random.default_rng(4), []
    for counts in rng.multinomial(6, [1 / 6] * 6, size=300):
        drawn = [value for patient, count in enumerate(counts) for value in list(dice[2 * patient :][:2]) * count]
        means.append(np.mean(drawn))
    expected = np.percentile(means, [2.5, 97.5])
    assert found["per_label"]["a"]["ci95"]["dice"] == pytest.approx(expected)
    assert found["mean_ci95"]["dice"] == pytest.approx(expected)


def test_cases_of_one_patient_make_the_interval_wider():
    dice = np.repeat(np.random.default_rng(1).random(10), 4)
    widths = []
    for patients in ([str(n) for n in range(40)], [str(n // 4) for n in range(40)]):
        low, high = summarise(cases_of(dice), ["a"], patients, Bootstrap())["mean_ci95"]["dice"]
        widths.append(high - low)
    assert widths[1] > 1.5 * widths[0]


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(2), 0
    for seed in range(200):
        dice = rng.beta(8, 2, size=40)
        low, high = summarise(cases_of(dice), ["a"], None, Bootstrap(num_bootstrap=200, seed=seed))["mean_ci95"]["dice"]
        hits += low <= 0.8 <= high
    assert 0.88 <= hits / 200 <= 0.98


def test_the_same_seed_gives_the_same_interval_and_another_another():
    cases = cases_of(np.random.default_rng(3).random(9))
    first, again, other = (
        summarise(cases, ["a"], None, Bootstrap(num_bootstrap=200, seed=s))["mean_ci95"] for s in (0, 0, 1)
    )
    assert first == again != other


def test_a_label_of_a_single_patient_has_no_interval():
    found = summarise(cases_of([0.5, 0.6, 0.7], [0.9, None, None]), ["a", "b"], None, Bootstrap(num_bootstrap=100))
    assert found["per_label"]["b"]["ci95"]["dice"] is None
    assert found["per_label"]["a"]["ci95"]["dice"] is not None
    assert found["mean_ci95"]["dice"] is not None


def test_without_resampling_there_are_no_intervals():
    assert summarise(cases_of([0.5, 0.6]), ["a"], None, Bootstrap(num_bootstrap=0))["mean_ci95"]["dice"] is None


@pytest.mark.parametrize("settings", [{"num_bootstrap": 50}, {"num_bootstrap": -1}, {"seed": -1}])
def test_settings_of_intervals_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Bootstrap(**settings)


def test_differences_are_taken_case_by_case_and_over_pairs_alone():
    ours, theirs = cases_of([0.9, 0.8, None, 0.7]), cases_of([0.8, 0.8, 0.0, 0.4])
    row = compare_paired(ours, theirs, ["a"], list("wxyz"), Bootstrap(num_bootstrap=200))["per_label"]["a"]["dice"]
    assert row["difference"] == pytest.approx((0.1 + 0.0 + 0.3) / 3)
    assert (row["num_pairs"], row["num_unpaired"]) == (3, 1)
    assert row["ci95"][0] >= 0 and row["ci95"][1] <= 0.3 + 1e-9


def test_a_method_against_itself_differs_in_nothing():
    cases = cases_of([0.9, 0.8, 0.7], [0.3, 0.2, None])
    found = compare_paired(cases, cases, ["a", "b"], list("xyz"), Bootstrap(num_bootstrap=100))
    for row in (found["mean"]["dice"], found["per_label"]["b"]["hd95_mm"]):
        assert (row["difference"], row["ci95"], row["p"]) == (0.0, [0.0, 0.0], 1.0)


def exact_signed_rank_p(differences):
    """Two-sided p by going through every choice of signs."""
    ranks = np.argsort(np.argsort(np.abs(differences))) + 1
    observed = ranks[differences > 0].sum()
    sums = np.array([np.dot(signs, ranks) for signs in itertools.product((0, 1), repeat=len(ranks))])
    return min(1.0, 2 * min((sums <= observed).mean(), (sums >= observed).mean()))


@pytest.mark.parametrize("seed", range(3))
def test_the_signed_rank_test_is_exact_for_few_patients(seed):
    differences = np.random.default_rng(seed).normal(0.4, 1, size=9)
    assert signed_rank_p(differences) == pytest.approx(exact_signed_rank_p(differences))


def test_differences_of_zero_are_dropped_from_the_test():
    differences = np.array([0.3, -0.1, 0.5, 0.2, 0.7])
    assert signed_rank_p(np.append(differences, [0.0, 1e-16])) == pytest.approx(signed_rank_p(differences))
    assert signed_rank_p(np.zeros(4)) == 1.0
    assert signed_rank_p(np.array([])) is None


def test_cases_of_one_patient_are_one_difference_in_the_test():
    ours, theirs = cases_of([0.9, 0.7, 0.8, 0.6]), cases_of([0.8, 0.6, 0.7, 0.5])
    rows = [
        compare_paired(ours, theirs, ["a"], patients, Bootstrap(num_bootstrap=0))["mean"]["dice"]["p"]
        for patients in (["x", "x", "y", "y"], list("wxyz"))
    ]
    assert rows == [pytest.approx(0.5), pytest.approx(0.125)]


def test_holm_multiplies_the_smallest_most_and_never_falls():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]
