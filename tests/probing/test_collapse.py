"""Measures of collapse, where their values are known."""

import pytest
import torch

from mim3d.probing.features import effective_rank, measure_collapse


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
