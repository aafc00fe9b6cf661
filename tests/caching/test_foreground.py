"""The foreground rule holds for CT and MRI without being told which it is."""

import math

import numpy as np
import pytest

from mim3d.caching import foreground as foreground_module
from mim3d.caching.foreground import (
    MAX_LOCATIONS,
    class_counts_of,
    class_locations_of,
    foreground_of,
    statistics_of,
    threshold_of,
)


def mask_of(array):
    """Voxels of the foreground."""
    return array > threshold_of(array)


def box_of(mask):
    """Box around voxels that are True."""
    return foreground_of(mask.astype(np.uint8)[None], [0.5]).box


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
    foreground = mask_of(array)
    assert foreground[middle].all()
    assert foreground.mean() == pytest.approx(1 / 8, abs=0.01)
    stats = statistics_of(array, threshold_of(array))
    assert stats.low == -1024
    assert stats.minimum == -3024
    assert stats.mean == pytest.approx(40 - 900 * 4**3 / 20**3, abs=5)


@pytest.mark.parametrize("scale", [1, 1e4])
def test_mri_foreground_leaves_out_zero_background_at_any_scale(scale):
    array, middle = body((40, 40, 40), 0, 100, 1)
    array = np.abs(array) * scale
    foreground = mask_of(array)
    assert foreground[middle].all()
    assert foreground.mean() == pytest.approx(1 / 8, abs=0.01)
    stats = statistics_of(array, threshold_of(array))
    assert stats.mean == pytest.approx(100 * scale, rel=0.05)
    assert stats.low == stats.minimum


def test_a_crop_of_pure_tissue_is_all_foreground():
    array = np.random.default_rng(0).uniform(100, 200, (20, 20, 20))
    assert mask_of(array).mean() > 0.9


def test_a_constant_scan_is_all_foreground():
    assert mask_of(np.zeros((5, 5, 5))).all()
    assert mask_of(np.full((5, 5, 5), -1000)).all()


def test_the_body_box_is_not_stretched_by_noise_or_a_thin_table():
    array, _ = body((40, 48, 56), -1000, 40, 0)
    array[np.random.default_rng(0).random(array.shape) < 0.02] = 0
    array[:, 2, :] = 100
    start, stop = box_of(mask_of(array))
    assert start == (8, 12, 12)
    assert stop == (32, 36, 44)


def test_the_body_box_of_nothing_is_the_whole_scan():
    assert box_of(np.zeros((3, 9, 5), dtype=bool)) == ((0, 0, 0), (3, 9, 5))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("most", [700, 10**6])
def test_statistics_plane_by_plane_are_those_of_all_foreground_voxels_at_once(monkeypatch, dtype, most):
    monkeypatch.setattr(foreground_module, "MAX_PERCENTILE_VOXELS", most)
    array, _ = body((31, 22, 17), 3, 120, 9)
    array = np.abs(array).astype(dtype)
    threshold = threshold_of(array)
    every = max(1, array.size // most)
    low, high = float(array.min()), float(np.percentile(array.ravel()[::every], 99.5))
    assert threshold == low + 0.05 * (high - low)
    voxels = array[array > threshold].astype(np.float64)
    stats = statistics_of(array, threshold)
    picked = voxels[:: max(1, voxels.size // most)]
    assert (stats.minimum, stats.maximum) == (array.min(), array.max())
    assert (stats.mean, stats.std) == pytest.approx((voxels.mean(), voxels.std()), rel=1e-12)
    found = [stats.percentile_00_1, stats.percentile_00_5, stats.percentile_99_5, stats.percentile_99_9]
    assert found == np.percentile(picked, (0.1, 0.5, 99.5, 99.9)).tolist()


def test_the_spread_of_a_large_constant_is_zero():
    stats = statistics_of(np.full((4, 5, 6), 30000.1, np.float32), -math.inf)
    assert stats.std == pytest.approx(0, abs=1e-3)
    assert stats.mean == pytest.approx(np.float32(30000.1))


@pytest.mark.parametrize("shape", [(70, 33, 40), (32, 64, 96), (5, 3, 1), (1, 130, 31)])
def test_shares_count_the_foreground_of_every_block_of_the_union_of_channels(shape):
    rng = np.random.default_rng(1)
    image = rng.normal(0, 1, (2, *shape)).astype(np.float32)
    inside = (image[0] > 0.5) | (image[1] > 1.0)
    shares = foreground_of(image, [0.5, 1.0]).shares
    assert shares.dtype == np.uint8
    assert shares.shape == tuple(-(-size // 32) for size in shape)
    for place in np.ndindex(shares.shape):
        block = inside[tuple(slice(32 * start, 32 * start + 32) for start in place)]
        assert shares[place] == np.rint(255 * block.mean())


def test_shares_of_whole_and_empty_blocks_are_exact():
    image = np.zeros((1, 64, 32, 40), np.int16)
    image[0, 32:] = 7
    assert foreground_of(image, [3.0]).shares.tolist() == [[[0, 0]], [[255, 255]]]
    assert (foreground_of(image, [-math.inf]).shares == 255).all()


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
