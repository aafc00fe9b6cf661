"""Heads on features: against plain formulas, and settings that are chosen by what is held out inside."""

import numpy as np
import pytest
import torch

from mim3d.metrics import Bootstrap
from mim3d.probing.heads import L2_PATH, NEIGHBOURS_PATH, Learned, chosen_setting, linear_answers, neighbour_answers
from mim3d.probing.probe import linear_probabilities, standardised
from mim3d.probing.scores import ScoredNumbers, intervals


def learned(features, targets, num_classes=None):
    return Learned(features_ND=features, targets_N=targets, num_classes=num_classes)


def test_ridge_regression_is_the_closed_form():
    rng = np.random.default_rng(0)
    features, asked = rng.normal(3, 2, (40, 5)), rng.normal(3, 2, (7, 5))
    targets = features @ rng.normal(size=5) + rng.normal(size=40)
    found = linear_answers(learned(features, targets), asked, 0.3)
    scaled = (features - features.mean(0)) / features.std(0)
    weights = np.linalg.solve(scaled.T @ scaled / 40 + 0.3 * np.eye(5), scaled.T @ (targets - targets.mean()) / 40)
    np.testing.assert_allclose(
        found, (asked - features.mean(0)) / features.std(0) @ weights + targets.mean(), rtol=1e-9
    )


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_more_features_than_items_are_turned_without_changing_the_answers(l2):
    rng = np.random.default_rng(1)
    features, asked, classes = rng.normal(size=(12, 50)), rng.normal(size=(6, 50)), np.arange(12) % 3
    found = linear_answers(learned(features, classes, 3), asked, l2)
    known, queries = (standardised(torch.from_numpy(features), torch.from_numpy(each)) for each in (features, asked))
    plain = linear_probabilities(known, torch.from_numpy(classes), queries, 3, l2=l2)
    np.testing.assert_allclose(found, plain.numpy(), atol=1e-3)


def test_neighbours_of_numbers_are_their_weighed_mean():
    rng = np.random.default_rng(2)
    features, targets = rng.normal(size=(30, 4)), rng.normal(size=30)
    found = neighbour_answers(learned(features, targets), features[:3], 1)
    np.testing.assert_allclose(found, targets[:3])


def test_a_single_number_has_neighbours_by_its_distance():
    numbers = np.arange(20.0)[:, None]
    found = neighbour_answers(learned(numbers, (np.arange(20) % 20 >= 15).astype(np.int64), 2), numbers, 1)
    assert found.argmax(1).tolist() == [0] * 15 + [1] * 5


def test_the_setting_is_the_one_that_errs_least_on_what_is_held_out_inside():
    rng = np.random.default_rng(3)
    features = rng.normal(size=(60, 30))
    folds = [(np.arange(20, 60), np.arange(20)), (np.r_[0:20, 40:60], np.arange(20, 40))]
    noise = learned(features, rng.normal(size=60))
    assert chosen_setting("linear", noise, folds) >= 1
    exact = learned(features, features @ rng.normal(size=30))
    assert chosen_setting("linear", exact, folds) == L2_PATH[-1]
    assert chosen_setting("neighbours", noise, folds) == NEIGHBOURS_PATH[0]
    # Where no fold has every class to learn from, nothing can be chosen.
    rare = learned(features, np.r_[np.ones(1, np.int64), np.zeros(59, np.int64)], 2)
    assert chosen_setting("linear", rare, [(np.arange(20, 60), np.arange(20))]) == 1e-2


def test_scores_of_numbers_are_those_of_numpy_and_have_intervals():
    rng = np.random.default_rng(4)
    truth = rng.normal(50, 10, 40)
    answers = truth + rng.normal(0, 5, 40)
    scored = ScoredNumbers(answers, truth, tuple(f"p{place // 2}" for place in range(40)))
    values = scored.values()
    assert values["r2"] == pytest.approx(1 - ((answers - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert values["mae"] == pytest.approx(np.abs(answers - truth).mean())
    assert values["pearson"] == pytest.approx(np.corrcoef(answers, truth)[0, 1])
    low, high = intervals(scored, Bootstrap(num_bootstrap=200))["r2"]
    assert low < values["r2"] < high
    constant = ScoredNumbers(np.full(40, truth.mean()), truth, scored.patients).values()
    assert constant["r2"] == pytest.approx(0) and np.isnan(constant["pearson"])
