"""What becomes of intensities: nothing where they are lossless, at most half a step elsewhere; and their pyramid."""

import numpy as np
import pytest

from mim3d.caching import stored_voxels
from mim3d.caching.foreground import statistics_of, threshold_of
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.stored_voxels import Shown, StoredIntensity, halved, level_shapes, levels_of, reduction_of, to_stored
from mim3d.core.errors import ConfigError

WINDOW = (-1000.0, 1000.0)


def stored_of(image, intensities, window=WINDOW):
    """Stored numbers, what they mean, and their values."""
    statistics = [statistics_of(channel, threshold_of(channel)) for channel in image]
    in_hu = [channel.min() < -200 for channel in image]
    stored, lines = to_stored(image, statistics, intensities, window, in_hu)
    values = np.stack([part * line.scale + line.offset for part, line in zip(stored.astype(float), lines, strict=True)])
    return stored, lines, values


def ct(shape=(1, 30, 20, 10), dtype=np.int16):
    """Noise over more than the window."""
    return np.random.default_rng(0).integers(-1024, 3000, shape).astype(dtype)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Many slabs per scan, the last one smaller."""
    monkeypatch.setattr(stored_voxels, "_SLAB_VOXELS", 1500)


@pytest.mark.parametrize(
    ("image", "dtype"),
    [
        (ct(), np.int16),
        (ct(dtype=np.float32), np.int16),
        (np.arange(240).reshape(2, 4, 5, 6).astype(np.float32), np.uint8),
        (np.arange(0, 60000, 500).reshape(1, 4, 5, 6), np.uint16),
        (np.arange(-120, 0).reshape(1, 4, 5, 6) * 10**6, np.int32),
        (np.arange(120).reshape(1, 4, 5, 6) * 3 * 10**7, np.uint32),
    ],
)
def test_lossless_keeps_whole_numbers_bit_by_bit_in_the_smallest_type(image, dtype):
    stored, lines, _ = stored_of(image, "lossless")
    assert stored.dtype == dtype
    assert lines == (StoredIntensity(1.0, 0.0),) * len(image)
    np.testing.assert_array_equal(stored, image)


def test_fractions_take_65536_steps_over_each_channels_own_range():
    rng = np.random.default_rng(0)
    image = np.stack([rng.normal(0, 1e-3, (20, 20, 9)), rng.normal(0, 1e6, (20, 20, 9))]).astype(np.float32)
    stored, lines, values = stored_of(image, "lossless")
    assert stored.dtype == np.int16
    for part, channel, line, value in zip(stored, image, lines, values, strict=True):
        assert (part.min(), part.max()) == (-32768, 32767)
        assert line.scale == pytest.approx(float(np.ptp(channel)) / 65535)
        assert np.abs(value - channel).max() <= line.scale * 0.5001


def test_a_whole_channel_beside_fractions_stays_exact():
    image = np.stack([np.arange(120) + 40000.0, np.arange(120) / 7, np.full(120, 2.5)]).reshape(3, 4, 5, 6)
    _, lines, values = stored_of(image.astype(np.float32), "lossless")
    np.testing.assert_array_equal(values[0], image[0])
    np.testing.assert_array_equal(values[2], image[2])
    assert lines[0].scale == 1.0


def test_numbers_beyond_32_bits_are_stored_in_steps():
    image = np.array([0.0, 1e30, 3e38, -3e38], np.float32).reshape(1, 4, 1, 1)
    stored, lines, values = stored_of(image, "lossless")
    assert stored.dtype == np.int16
    assert np.abs(values - image).max() <= lines[0].scale * 0.5001


@pytest.mark.parametrize("window", [WINDOW, (-160.0, 240.0)])
def test_eight_bits_of_a_ct_lie_within_half_a_step_inside_the_window_and_are_clipped_outside(window):
    image = ct()
    stored, lines, values = stored_of(image, "8-bit", window)
    low, high = window
    assert stored.dtype == np.uint8
    assert lines[0].scale == pytest.approx((high - low) / 255)
    assert np.abs(values - np.clip(image, low, high)).max() <= lines[0].scale * 0.5001
    assert set(np.unique(stored)) >= {0, 255}


def test_eight_bits_of_other_modalities_cover_each_channels_own_foreground():
    rng = np.random.default_rng(0)
    image = np.stack([rng.gamma(4.0, 50.0, (20, 20, 20)), rng.gamma(4.0, 7000.0, (20, 20, 20))]).astype(np.float32)
    image[:, :6] = 0
    _, lines, values = stored_of(image, "8-bit")
    for channel, line, value in zip(image, lines, values, strict=True):
        low, high = np.percentile(channel[channel > threshold_of(channel)], (0.1, 99.9))
        assert line.offset == pytest.approx(low)
        assert line.offset + 255 * line.scale == pytest.approx(high)
        assert np.abs(value - np.clip(channel, low, high)).max() <= line.scale * 0.5001


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_eight_bits_hold_what_was_made_from_eight_bits_exactly(dtype):
    image = (np.arange(240).reshape(1, 6, 8, 5) + 10).astype(dtype)
    _, _, values = stored_of(image, "8-bit")
    np.testing.assert_array_equal(values, image)


@pytest.mark.parametrize("value", [0, 5, -3.25, 1e-30])
@pytest.mark.parametrize("intensities", ["lossless", "8-bit"])
def test_a_scan_of_one_value_keeps_it(value, intensities):
    _, _, values = stored_of(np.full((1, 4, 4, 4), value, np.float32), intensities)
    np.testing.assert_allclose(values, value, rtol=1e-6)


def test_the_nearest_stored_number_is_within_the_type():
    line = StoredIntensity(2.0, -1000.0)
    assert [line.nearest(value, np.dtype(np.uint8)) for value in (-1024.0, -997.2, 5000.0)] == [0, 1, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32])
@pytest.mark.parametrize("shape", [(2, 8, 6, 4), (1, 7, 9, 5), (1, 61, 33, 3), (1, 1, 1, 1), (2, 2, 1, 3)])
def test_a_level_is_the_mean_of_what_blocks_show_rounded_half_to_even(dtype, shape):
    limits = np.iinfo(dtype)
    rng = np.random.default_rng(0)
    for low, high in ((limits.min, int(limits.max) + 1), (0, 4)):
        image = rng.integers(low, high, shape).astype(dtype)
        middle = (low + high) // 2
        # Clipped on neither side, on one, on both; beyond an odd edge stands a number of each channel's own.
        for limits_shown in ((limits.min, limits.max), (middle, limits.max), (middle, min(middle + 1, limits.max))):
            lowest, highest = (int(number) for number in limits_shown)
            shown = [Shown(lowest, highest, lowest + min(channel, highest - lowest)) for channel in range(shape[0])]
            averaged = []
            for channel, seen in zip(image.astype(np.float64), shown, strict=True):
                odd = [(0, size % 2) for size in shape[1:]]
                padded = np.pad(channel.clip(lowest, highest), odd, constant_values=seen.outside)
                blocks = padded.reshape([part for size in padded.shape for part in (size // 2, 2)])
                averaged.append(np.rint(blocks.mean(axis=(1, 3, 5))))
            half = halved(image, shown)
            assert half.dtype == dtype
            np.testing.assert_array_equal(half, averaged)


def test_levels_have_the_shapes_that_are_told():
    image = ct((2, 21, 8, 3))
    shapes = level_shapes((21, 8, 3), 4)
    assert shapes == ((21, 8, 3), (11, 4, 2), (6, 2, 1), (3, 1, 1))
    assert [level.shape[1:] for level in levels_of(image, 4, [Shown(-1000, 1000, 0)] * 2)] == list(shapes)


@pytest.mark.parametrize(
    ("footprint", "size", "factor"),
    [
        ((64, 64, 32), (32, 32, 16), 2),
        ((384, 384, 192), (96, 96, 48), 4),
        ((96, 96, 96), (96, 96, 96), 1),
        ((96, 96, 96), (32, 32, 32), 1),
        ((64, 64, 64), (32, 32, 64), 1),
        ((65, 65, 65), (32, 32, 32), 1),
        ((16, 16, 16), (32, 32, 32), 1),
    ],
)
def test_only_one_power_of_two_along_all_axes_is_a_reduction(footprint, size, factor):
    assert reduction_of(footprint, size) == factor


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"intensities": "7-bit"}, "auto, lossless or 8-bit"),
        ({"window": (100.0, -100.0)}, "two rising numbers"),
        ({"window": (0.0, float("inf"))}, "two rising numbers"),
        ({"window": (float("nan"), 1.0)}, "two rising numbers"),
        ({"num_levels": 0}, "between 1"),
        ({"num_levels": 9}, "between 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        Preprocessing(**settings)


def test_auto_is_lossless_where_there_are_labels():
    assert Preprocessing().settled(True).intensities == "lossless"
    assert Preprocessing().settled(False).intensities == "8-bit"
    assert Preprocessing(intensities="8-bit").settled(True).intensities == "8-bit"
