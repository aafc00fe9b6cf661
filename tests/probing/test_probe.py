"""The two classifiers of a probe, against solutions that are known."""

import math

import pytest
import torch

from mim3d.probing.probe import linear_probabilities, neighbour_probabilities, standardised


def blobs(number: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(number) % 3
    centres = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]], dtype=torch.float64)
    return centres[classes] + torch.randn(number, 4, generator=generator, dtype=torch.float64), classes


def test_blobs_are_told_apart_by_both():
    features, classes = blobs(300)
    queries, truth = blobs(150, seed=1)
    known, asked = standardised(features, features), standardised(features, queries)
    linear = linear_probabilities(known, classes, asked, 3, l2=1e-2)
    near = neighbour_probabilities(known, classes, asked, 3, num_neighbours=20, temperature=0.07)
    for found in (linear, near):
        torch.testing.assert_close(found.sum(1), torch.ones(150, dtype=torch.float64))
        assert (found.argmax(1) == truth).double().mean() > 0.9


def test_the_linear_classifier_sits_where_its_gradient_vanishes():
    features, classes = blobs(60)
    features, classes = features[:45], classes[:45].clamp_max(1)
    counts = torch.bincount(classes).double()
    given = linear_probabilities(features, classes, features, 2, l2=0.1)
    # Two classes with one shared pull: the optimum has w_0 = -w_1, so that the logit is 2 (w x + b); solve for it.
    weight = torch.zeros(5, dtype=torch.float64)
    rows = torch.cat([features, torch.ones(45, 1, dtype=torch.float64)], 1)
    decay = torch.tensor([0.1] * 4 + [0.0], dtype=torch.float64)
    each = (1 / (2 * counts))[classes]
    for _ in range(50):
        p = torch.sigmoid(2 * rows @ weight)
        gradient = 2 * rows.T @ (each * (p - classes.double())) + 2 * decay * weight
        hessian = 4 * (rows.T * (each * p * (1 - p))) @ rows + 2 * torch.diag(decay)
        weight = weight - torch.linalg.solve(hessian, gradient)
    torch.testing.assert_close(given[:, 1], torch.sigmoid(2 * rows @ weight), atol=1e-4, rtol=0)


def test_rare_classes_count_as_much_as_common_ones():
    features = torch.tensor([[1.0, 0]] * 30 + [[-1.0, 0]] * 2, dtype=torch.float64)
    classes = torch.tensor([0] * 30 + [1] * 2)
    between = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for found in (
        linear_probabilities(features, classes, between, 2, l2=1.0),
        neighbour_probabilities(features, classes, between, 2, num_neighbours=32, temperature=1.0),
    ):
        assert found[0, 1] == pytest.approx(0.5, abs=1e-4)


def test_neighbours_vote_by_their_cosines():
    angles = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5.0], [0.1]])
    query = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    found = neighbour_probabilities(features, torch.tensor([0, 1, 1]), query, 2, num_neighbours=2, temperature=0.5)
    votes = math.exp(1 / 0.5), math.exp(math.cos(0.5) / 0.5) / 2
    assert found[0].tolist() == pytest.approx([vote / sum(votes) for vote in votes])


def test_features_that_do_not_vary_change_nothing():
    features, classes = blobs(90)
    constant = torch.cat([features, torch.full((90, 1), 7.0, dtype=torch.float64)], 1)
    one, other = (standardised(given, given) for given in (features, constant))
    assert (other[:, -1] == 0).all()
    found = [linear_probabilities(given, classes, given, 3, l2=1e-2) for given in (one, other)]
    torch.testing.assert_close(found[0], found[1])
