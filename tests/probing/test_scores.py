"""Scores of a probe, their intervals, and measures of collapse, where their values are known."""

import numpy as np
import pytest
import torch

from mim3d.metrics import Bootstrap
from mim3d.probing.scores import Scored, differences, effective_rank, intervals, measure_collapse


def scored(predicted: list[int], truth: list[int], patients: list[str], num_classes: int = 3, **more: bool) -> Scored:
    return Scored(np.eye(num_classes)[predicted], np.array(truth), tuple(patients), **more)


PATIENTS = ["a", "a", "b", "b", "c", "c"]


def test_scores_are_those_of_the_counts():
    found = scored([0, 0, 1, 2, 2, 0], [0, 0, 1, 1, 2, 2], PATIENTS)
    assert found.values()["balanced_accuracy"] == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert found.f1() == pytest.approx([0.8, 2 / 3, 0.5])
    assert found.values()["f1_macro"] == pytest.approx(np.mean([0.8, 2 / 3, 0.5]))


def test_a_class_that_neither_occurs_nor_is_predicted_is_left_out():
    found = scored([0, 1, 1, 1], [0, 0, 1, 1], ["a", "b", "c", "d"])
    assert found.f1()[2] is None
    assert found.values()["balanced_accuracy"] == pytest.approx(0.75)


def test_whole_patients_are_drawn():
    found = scored([0, 0, 1, 1], [0, 0, 0, 0], ["a", "a", "b", "b"])
    assert intervals(found, Bootstrap(num_bootstrap=500))["balanced_accuracy"] == [0.0, 1.0]
    assert intervals(found, Bootstrap(num_bootstrap=0)) == {"balanced_accuracy": None, "f1_macro": None}


def test_differences_are_paired():
    better = scored([0, 1, 1, 0, 2, 2], [0, 1, 1, 0, 2, 2], PATIENTS)
    worse = scored([0, 0, 0, 0, 2, 2], [0, 1, 1, 0, 2, 2], PATIENTS)
    found = differences(better, worse, Bootstrap(num_bootstrap=500))["balanced_accuracy"]
    assert found["difference"] == pytest.approx(1 / 3)
    assert found["ci95"][0] >= 0
    same = differences(better, better, Bootstrap(num_bootstrap=500))["balanced_accuracy"]
    assert (same["difference"], same["ci95"]) == (0, [0, 0])


def test_scans_have_an_area_under_the_curve():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.2, 0.8]])
    found = Scored(probabilities, np.array([0, 0, 1, 1]), ("a", "b", "c", "d"), with_auc=True)
    assert found.values()["auc"] == pytest.approx(0.75)


def test_independent_directions_are_spread_and_of_full_rank():
    features = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = measure_collapse(features)
    assert found.feature_std == pytest.approx(1, abs=0.02)
    assert found.effective_rank == pytest.approx(16, abs=0.1)
    assert found.mean_cosine == pytest.approx(0, abs=0.01)


def test_one_direction_alone_is_collapsed():
    features = torch.linspace(1, 2, 50, dtype=torch.float64)[:, None] * torch.arange(1, 9, dtype=torch.float64)
    found = measure_collapse(features)
    assert found.feature_std == pytest.approx(0, abs=1e-7)
    assert found.effective_rank == pytest.approx(1)
    assert found.mean_cosine == pytest.approx(1)


def test_the_rank_follows_the_entropy_of_singular_values():
    features = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert effective_rank(features) == pytest.approx(2)
    assert effective_rank(torch.zeros(3, 3, dtype=torch.float64)) == 0


def test_the_mean_cosine_is_that_of_all_pairs():
    features = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    normed = torch.nn.functional.normalize(features, dim=1)
    pairs = [float(normed[i] @ normed[j]) for i in range(7) for j in range(7) if i != j]
    assert measure_collapse(features).mean_cosine == pytest.approx(sum(pairs) / len(pairs))
