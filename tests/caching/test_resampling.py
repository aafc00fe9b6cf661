"""Resampling keeps world coordinates: voxel centres, not corners or first voxels, are what is aligned."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim3d.caching import resampling
from mim3d.caching.resampling import plan_axis, plan_resampling, resample_labels, resample_linear, target_grid


def world_of(shape, affine, axis):
    """World coordinate of every voxel along one world axis."""
    index = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ index + affine[:3, 3:])[axis].reshape(shape)


def interior(array, margin=3):
    """Without the voxels that edges reach."""
    return array[(slice(margin, -margin),) * 3]


@pytest.mark.parametrize("wanted", [(0.5, 1.3, 2.0), (2.0, 2.0, 2.0), (1.7, 0.8, 3.1)])
def test_a_ramp_in_world_coordinates_stays_where_it_was(wanted):
    shape, spacing = (30, 34, 28), (1.0, 1.2, 2.0)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-20.0, 7.0, 100.0)
    new_shape, new_spacing, new_affine = target_grid(shape, affine, spacing, wanted)
    axes = plan_resampling(shape, spacing, new_shape, new_spacing)
    np.testing.assert_allclose(new_spacing, wanted)
    for axis in range(3):
        resampled = resample_linear(world_of(shape, affine, axis), axes)
        np.testing.assert_allclose(interior(resampled), interior(world_of(new_shape, new_affine, axis)), atol=1e-3)


def test_both_grids_share_their_centre_and_cover_the_same_extent():
    shape, spacing = (31, 40, 17), (0.9, 0.7, 3.0)
    affine = np.diag([*spacing, 1.0])
    new_shape, new_spacing, new_affine = target_grid(shape, affine, spacing, (1.0, 1.0, 1.0))
    centre = affine @ np.array([*(size - 1 for size in shape), 2]) / 2
    new_centre = new_affine @ np.array([*(size - 1 for size in new_shape), 2]) / 2
    np.testing.assert_allclose(new_centre, centre)
    for size, have, new, want in zip(shape, spacing, new_shape, new_spacing, strict=True):
        assert abs(size * have - new * want) <= want / 2 + 1e-9


def test_an_axis_that_fits_within_rounding_is_left_exactly_as_it_is():
    spacing = (1.0000001, 1.0, 2.0)
    affine = np.diag([*spacing, 1.0])
    shape, new_spacing, new_affine = target_grid((10, 10, 10), affine, spacing, (1.0, 1.0, 2.0))
    assert (shape, new_spacing) == ((10, 10, 10), spacing)
    np.testing.assert_array_equal(new_affine, affine)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.testing.assert_array_equal(resample_linear(array, plan_resampling(shape, spacing, shape, new_spacing)), array)


@given(num_in=st.integers(1, 60), num_out=st.integers(1, 60), step=st.floats(0.05, 20))
def test_weights_are_a_mean_and_a_constant_stays_constant(num_in, num_out, step):
    axis = plan_axis(num_in, num_out, step)
    np.testing.assert_allclose(axis.weight.sum(axis=1), 1, rtol=1e-5)
    assert (axis.weight >= 0).all()
    assert axis.index.min() >= 0 and axis.index.max() < num_in


def test_detail_finer_than_the_new_grid_does_not_alias():
    checker = (np.indices((40, 40, 40)).sum(axis=0) % 2).astype(np.float32)
    axes = plan_resampling((40, 40, 40), (1.0, 1.0, 1.0), (10, 10, 10), (4.0, 4.0, 4.0))
    np.testing.assert_allclose(resample_linear(checker, axes), 0.5, atol=0.02)


def test_labels_keep_their_volume_centre_and_values():
    label = np.zeros((24, 24, 24), np.uint8)
    label[4:12, 6:18, 8:16] = 3
    label[12:20, 6:18, 8:16] = 7
    for wanted in ((0.7, 0.7, 0.7), (1.5, 1.5, 2.0)):
        shape, spacing, affine = target_grid(label.shape, np.eye(4), (1.0, 1.0, 1.0), wanted)
        resampled = resample_labels(label, plan_resampling(label.shape, (1.0, 1.0, 1.0), shape, spacing))
        assert set(np.unique(resampled)) == {0, 3, 7}
        for value in (3, 7):
            volume_mm3 = (resampled == value).sum() * np.prod(spacing)
            assert volume_mm3 == pytest.approx((label == value).sum(), rel=0.15)
            centre = affine[:3, :3] @ np.argwhere(resampled == value).mean(axis=0) + affine[:3, 3]
            np.testing.assert_allclose(centre, np.argwhere(label == value).mean(axis=0), atol=0.4)


def test_labels_equal_the_arg_max_of_all_classes_resampled_in_full():
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 4, (4, 4, 4)), np.ones((3, 4, 5))).astype(np.uint8)
    shape, spacing, _ = target_grid(label.shape, np.eye(4), (1.0, 1.0, 1.0), (1.3, 0.6, 1.9))
    axes = plan_resampling(label.shape, (1.0, 1.0, 1.0), shape, spacing)
    shares = np.stack([resample_linear(label == value, axes) for value in range(4)])
    shares[0] -= 1e-5
    clear = np.sort(shares, axis=0)[-1] - np.sort(shares, axis=0)[-2] > 1e-4
    np.testing.assert_array_equal(resample_labels(label, axes)[clear], shares.argmax(axis=0)[clear])


def test_a_label_map_on_its_own_grid_is_untouched():
    label = np.random.default_rng(0).integers(0, 5, (5, 6, 7)).astype(np.uint16)
    axes = plan_resampling(label.shape, (1.0, 1.0, 1.0), label.shape, (1.0, 1.0, 1.0))
    np.testing.assert_array_equal(resample_labels(label, axes), label)


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
@pytest.mark.parametrize(
    "wanted", [(0.7, 1.3, 2.0), (1.9, 1.0, 0.6), (1.0, 1.4, 1.4), (6.5, 6.5, 6.5), (0.3, 0.4, 1.0)]
)
def test_slabs_of_the_output_are_the_whole_bit_by_bit(monkeypatch, wanted, dtype):
    array = np.random.default_rng(0).normal(0, 500, (41, 13, 17)).astype(dtype)
    shape, spacing, _ = target_grid(array.shape, np.eye(4), (1.0, 1.0, 1.0), wanted)
    axes = plan_resampling(array.shape, (1.0, 1.0, 1.0), shape, spacing)
    whole = resample_linear(array, axes, dtype)
    plain = array.astype(np.float32)
    for number, axis in enumerate(axes):
        taken = np.moveaxis(plain, number, -1)[..., axis.index]
        plain = np.moveaxis((taken * axis.weight).sum(axis=-1), -1, number)
    np.testing.assert_allclose(whole, plain, rtol=1e-4, atol=0.51 if dtype == np.int16 else 1e-2)
    monkeypatch.setattr(resampling, "_SLAB_VOXELS", 1)
    slabs = resample_linear(array, axes, dtype)
    assert slabs.dtype == dtype
    np.testing.assert_array_equal(slabs, whole)


def test_labels_are_the_same_in_slabs(monkeypatch):
    rng = np.random.default_rng(0)
    label = np.kron(rng.integers(0, 4, (9, 4, 4)), np.ones((5, 4, 5))).astype(np.uint8)
    label[22:24] = 9
    for wanted in ((0.7, 1.3, 1.1), (1.0, 0.8, 1.7), (2.3, 2.3, 2.3)):
        shape, spacing, _ = target_grid(label.shape, np.eye(4), (1.0, 1.0, 1.0), wanted)
        axes = plan_resampling(label.shape, (1.0, 1.0, 1.0), shape, spacing)
        monkeypatch.setattr(resampling, "_SLAB_VOXELS", 2**20)
        whole = resample_labels(label, axes)
        monkeypatch.setattr(resampling, "_SLAB_VOXELS", 1)
        np.testing.assert_array_equal(resample_labels(label, axes), whole)
        assert 9 in whole


def test_what_fills_less_than_half_of_a_larger_voxel_is_lost_from_its_label():
    """A sheet of probability 1 between slices, as docs/concepts/weights-to-prediction.md says of thin structures."""
    axis = plan_axis(50, 10, 5.0)
    for thickness, is_kept in ((2, False), (4, True)):
        sheet = np.zeros(50)
        sheet[27 - thickness // 2 : 27 - thickness // 2 + thickness] = 1
        assert bool((axis.weight * sheet[axis.index]).sum(axis=1).max() > 0.5) is is_kept
