"""Masks are spatial, exact in number, and units are blocks of tokens."""

import numpy as np
import pytest
import torch

from mim3d.nn.tokens import draw_hidden_units, num_hidden, split_tokens, split_units, take_tokens, unit_mask


@pytest.mark.parametrize(
    ("units", "ratio", "hidden"),
    [(8, 0.5, 4), (216, 0.6, 130), (216, 0.5, 108), (5, 0.5, 3), (45, 0.7, 32), (64, 0.0, 0)],
)
def test_number_hidden_is_the_ratio_with_half_rounded_up(units: int, ratio: float, hidden: int) -> None:
    assert num_hidden(units, ratio) == hidden
    assert len(draw_hidden_units(units, ratio, np.random.default_rng(0))) == hidden


def test_hiding_a_cell_hides_exactly_its_block_of_tokens() -> None:
    mask = unit_mask(np.array([5]), (2, 2, 2), (3, 3, 3)).reshape(6, 6, 6)
    expected = np.zeros((6, 6, 6), dtype=bool)
    expected[3:, :3, 3:] = True  # raster index 5 is (1, 0, 1)
    assert (mask == expected).all()
    assert mask.sum() == 27


def test_units_of_a_non_cubic_grid_hold_their_own_tokens() -> None:
    grid = torch.arange(4 * 6 * 2, dtype=torch.float32).reshape(1, 4, 6, 2, 1)
    units = split_units(grid, (2, 3, 1))
    assert units.shape == (1, 6, 8, 1)
    assert torch.equal(units[0, 4, :, 0], grid[0, 2:4, 2:4, 0:2, 0].flatten())


def test_visible_tokens_come_in_raster_order() -> None:
    hidden = torch.tensor([[True, False, True, False], [False, False, True, True]])
    visible, places = split_tokens(hidden, 2)
    assert visible.tolist() == [[1, 3], [0, 1]]
    assert places.tolist() == [[0, 2], [2, 3]]
    tokens = torch.arange(8.0).reshape(2, 4, 1)
    assert take_tokens(tokens, visible).flatten().tolist() == [1, 3, 4, 5]


def test_a_sample_that_hides_another_number_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must hide 1 tokens"):
        split_tokens(torch.tensor([[True, False], [False, False]]), 1)
