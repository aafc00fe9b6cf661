"""Losses of masked pre-training: normalised targets, and alignment with its chance level."""

import math

import pytest
import torch

from mim3d.nn.losses import (
    ABSOLUTE_ERROR,
    SQUARED_ERROR,
    Error,
    alignment_logits,
    contrastive_alignment,
    cosine_alignment,
    normalise_tokens,
    reconstruction_target,
)


def test_targets_are_normalised_per_token_with_unbiased_variance() -> None:
    torch.manual_seed(0)
    normed = normalise_tokens(torch.randn(2, 3, 64) * 5 + 2)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(-1), torch.ones(2, 3), atol=1e-4, rtol=0)


def test_a_constant_guess_costs_one() -> None:
    torch.manual_seed(0)
    target = torch.randn(4, 8, 512)
    assert SQUARED_ERROR(torch.zeros_like(target), reconstruction_target(target)).item() == pytest.approx(
        511 / 512, rel=1e-4
    )


@pytest.mark.parametrize("error", [SQUARED_ERROR, ABSOLUTE_ERROR])
def test_no_constants_of_the_channels_are_better_than_a_guess(error: Error) -> None:
    # Mostly air: the mean is far from the median. Channels differ in their level, as sequences of MR do.
    voxels = torch.rand(3000, 2).square() * (torch.rand(3000, 2) < 0.4) + torch.tensor([0.0, 5.0])
    guess = float(error.guess(voxels.reshape(3, 10, 200), 2))
    tried = [
        [
            float((voxels[:, channel] - constant).abs().pow(2 if error is SQUARED_ERROR else 1).mean())
            for constant in grid
        ]
        for channel, grid in enumerate((torch.linspace(-1, 2, 3001), torch.linspace(4, 7, 3001)))
    ]
    assert guess == pytest.approx(sum(map(min, tried)) / 2, rel=1e-3)


def test_constant_child_vectors_cost_the_logarithm_of_the_number_of_places() -> None:
    places = torch.ones(6, 4, 8)
    logits = alignment_logits(torch.ones(6, 8), places, 0.1)
    loss, *_ = contrastive_alignment(logits, torch.arange(6) % 4, torch.ones(6, 4, dtype=torch.bool))
    assert loss.item() == pytest.approx(math.log(4), rel=1e-5)


def test_air_is_no_negative_but_the_own_place_always_counts() -> None:
    logits = torch.zeros(1, 4)
    usable = torch.tensor([[False, False, True, True]])
    loss, _, guess, chance = contrastive_alignment(logits, torch.tensor([0]), usable)
    assert loss.item() == guess.item() == pytest.approx(math.log(3), rel=1e-5)
    assert chance.item() == pytest.approx(1 / 3)


def test_a_child_that_matches_its_place_is_found() -> None:
    places = torch.eye(4)[None].expand(4, 4, 4)
    loss, accuracy, *_ = contrastive_alignment(
        alignment_logits(torch.eye(4), places, 0.1), torch.arange(4), torch.ones(4, 4, dtype=torch.bool)
    )
    assert accuracy.item() == 1
    assert loss.item() < 1e-3


def test_cosine_form_sends_no_gradient_to_the_place() -> None:
    child, place = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    cosine_alignment(child, place).backward()
    assert child.grad is not None
    assert place.grad is None
