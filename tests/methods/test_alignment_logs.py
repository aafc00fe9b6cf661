"""What alignment logs against collapse: accuracy beside its chance, and how far child vectors spread."""

import pytest
import torch

from mim3d.methods.mim.objective import Places, align


def logs(children: torch.Tensor, vectors: torch.Tensor, own: torch.Tensor) -> dict[str, float]:
    parents, hidden = vectors.shape[:2]
    units = torch.arange(hidden).expand(parents, hidden)
    places = Places(units, vectors, torch.ones(parents, hidden, dtype=torch.bool))
    _, named = align(children, places, own, temperature=0.1, batch_negatives=False, predict=None)
    return {name: float(value) for name, value in named.items()}


def test_children_that_spread_in_all_directions_are_at_one_and_collapsed_ones_at_zero():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(64, 8, 32, generator=generator)
    own = torch.randint(8, (256,), generator=generator)
    spread = logs(torch.randn(256, 32, generator=generator), vectors, own)
    assert spread["spread"] == pytest.approx(1, abs=0.05)
    collapsed = logs(torch.ones(256, 32), vectors, own)
    assert collapsed["spread"] == pytest.approx(0, abs=1e-6)
    # A child that says nothing of its place is right as often as chance.
    assert collapsed["chance"] == 1 / 8
    assert collapsed["accuracy"] == pytest.approx(1 / 8, abs=0.08)


def test_chance_counts_the_places_that_take_part_alone():
    generator = torch.Generator().manual_seed(0)
    vectors, own = torch.randn(2, 8, 32, generator=generator), torch.tensor([0, 7])
    # Of the first parent three places vary, its child's among them; of the second two, its child's not among them.
    varied = torch.zeros(2, 8, dtype=torch.bool)
    varied[0, :3] = varied[1, 3:5] = True
    places = Places(torch.arange(8).expand(2, 8), vectors, varied)
    _, named = align(torch.randn(2, 32), places, own, temperature=0.1, batch_negatives=False, predict=None)
    assert float(named["chance"]) == pytest.approx(1 / 3)
    _, named = align(torch.randn(2, 32), places, own, temperature=0.1, batch_negatives=True, predict=None)
    # The varied places of both parents, and for the second child its own.
    assert float(named["chance"]) == pytest.approx((1 / 5 + 1 / 6) / 2)


def test_children_that_are_their_places_are_always_right():
    vectors = torch.randn(4, 8, 32, generator=torch.Generator().manual_seed(1))
    own = torch.tensor([0, 3, 5, 7])
    assert logs(vectors[torch.arange(4), own], vectors, own)["accuracy"] == 1
