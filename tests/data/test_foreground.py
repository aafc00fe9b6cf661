"""The foreground rule holds for CT and MRI without being told which it is."""

import numpy as np
import pytest

from mim3d.data.foreground import (
    MAX_LOCATIONS,
    body_box_of,
    class_counts_of,
    class_locations_of,
    foreground_of,
    statistics_of,
)


def body(shape, background, inside, noise_std, seed=0):
    """A box of tissue in the middle of background."""
    rng = np.random.default_rng(seed)
    array = np.full(shape, float(background))
    middle = tuple(slice(size // 4, size - size // 4) for size in shape)
    array[middle] = inside
    return array + rng.normal(0, noise_std, shape), middle


def test_ct_foreground_leaves_out_noisy_air_and_padding_but_keeps_lung():
    array, middle = body((40, 40, 40), -1000, 40, 15)
    array[18:22, 18:22, 18:22] = -860
    array[:4] = -3024
    foreground = foreground_of(array)
    assert foreground[middle].all()
    assert foreground.mean() == pytest.approx(1 / 8, abs=0.01)
    stats = statistics_of(array, foreground)
    assert stats.low == -1024
    assert stats.minimum == -3024
    assert stats.mean == pytest.approx(40 - 900 * 4**3 / 20**3, abs=5)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_mri_foreground_leaves_out_zero_background_at_any_scale(scale):
    array, middle = body((40, 40, 40), 0, 100, 1)
    array = np.abs(array) * scale
    foreground = foreground_of(array)
    assert foreground[middle].all()
    assert foreground.mean() == pytest.approx(1 / 8, abs=0.01)
    stats = statistics_of(array, foreground)
    assert stats.mean == pytest.approx(100 * scale, rel=0.05)
    assert stats.low == stats.minimum


def test_a_crop_of_pure_tissue_is_all_foreground():
    array = np.random.default_rng(0).uniform(100, 200, (20, 20, 20))
    assert foreground_of(array).mean() > 0.9


def test_a_constant_scan_is_all_foreground():
    assert foreground_of(np.zeros((5, 5, 5))).all()
    assert foreground_of(np.full((5, 5, 5), -1000)).all()


def test_the_body_box_is_not_stretched_by_noise_or_a_thin_table():
    array, _ = body((40, 48, 56), -1000, 40, 0)
    array[np.random.default_rng(0).random(array.shape) < 0.02] = 0
    array[:, 2, :] = 100
    start, stop = body_box_of(foreground_of(array))
    assert start == (8, 12, 12)
    assert stop == (32, 36, 44)


def test_the_body_box_of_nothing_is_the_whole_scan():
    assert body_box_of(np.zeros((3, 9, 5), dtype=bool)) == ((0, 0, 0), (3, 9, 5))


def test_class_locations_lie_in_their_class_are_limited_and_repeat():
    label = np.zeros((30, 20, 10), np.uint8)
    label[:20] = 2
    label[25, 3, 4] = 5
    rows = class_locations_of(label, class_counts_of(label))
    assert set(rows[:, 0]) == {2, 5}
    assert (label[tuple(rows[:, 1:].T)] == rows[:, 0]).all()
    assert (rows[:, 0] == 2).sum() == MAX_LOCATIONS
    assert rows[rows[:, 0] == 5].tolist() == [[5, 25, 3, 4]]
    np.testing.assert_array_equal(rows, class_locations_of(label, class_counts_of(label)))
    empty = np.zeros((2, 2, 2), np.uint8)
    assert class_locations_of(empty, class_counts_of(empty)).shape == (0, 4)
