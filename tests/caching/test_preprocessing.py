"""A case is read, checked and resampled; scores find back to the scan's own grid."""

import numpy as np
import pytest

from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case, read_cases
from tests.nifti import affine_of, noise, write_nifti
from tests.restoring import restore


def case_of(folder, *images, label=None, affine=None):
    """A case of arrays written to files."""
    paths = [write_nifti(folder / f"i{n}.nii.gz", array, affine) for n, array in enumerate(images)]
    label_path = None if label is None else str(write_nifti(folder / "l.nii.gz", label, affine))
    return Case(id="a", images=tuple(map(str, paths)), label=label_path, patient="a")


def test_integers_are_kept_without_loss_on_their_own_grid(tmp_path):
    array = noise()
    prepared = prepare(case_of(tmp_path, array, label=(array > 0).astype(np.float32)), Preprocessing())
    assert prepared.image.dtype == np.int16
    np.testing.assert_array_equal(prepared.image[0], array)
    np.testing.assert_array_equal(prepared.label, array > 0)
    assert prepared.label.dtype == np.uint8
    assert prepared.statistics[0].minimum == -1000


@pytest.mark.parametrize(
    ("stored", "kept"),
    [(np.uint8, np.uint8), (np.int32, np.int16), (np.float32, np.float32), (np.float64, np.float32)],
)
def test_voxels_are_kept_in_the_smallest_type_that_holds_them(tmp_path, stored, kept):
    array = (np.arange(120).reshape(4, 5, 6) - (0 if stored == np.uint8 else 1)).astype(stored)
    prepared = prepare(case_of(tmp_path, array), Preprocessing())
    assert prepared.image.dtype == kept
    np.testing.assert_array_equal(prepared.image[0], array)


def test_channels_are_stacked_in_one_type_with_statistics_each(tmp_path):
    prepared = prepare(case_of(tmp_path, noise(), noise(seed=1, dtype=np.float32)), Preprocessing())
    assert prepared.image.shape == (2, 6, 7, 8)
    assert prepared.image.dtype == np.float32
    assert len(prepared.statistics) == 2


def test_resampling_moves_no_landmark_in_the_world(tmp_path):
    shape = (20, 24, 16)
    affine = affine_of((1.0, 1.5, 2.0), (-30.0, 12.0, 5.0), (-1, 1, 1))
    landmark = np.zeros(shape, np.float32)
    grid = np.indices(shape)
    landmark += 1000 * np.exp(-sum((axis - at) ** 2 for axis, at in zip(grid, (12, 9, 7), strict=True)) / 8)
    prepared = prepare(case_of(tmp_path, landmark, affine=affine), Preprocessing(spacing_mm=(0.8, 0.9, 1.1)))
    assert prepared.spacing_mm == pytest.approx((0.8, 0.9, 1.1))
    weight = prepared.image[0] / prepared.image[0].sum()
    centre = [(weight * axis).sum() for axis in np.indices(weight.shape)]
    expected = affine @ [12, 9, 7, 1]
    np.testing.assert_allclose((prepared.affine @ [*centre, 1])[:3], expected[:3], atol=0.05)


@pytest.mark.parametrize("spacing_mm", [(0.7, 1.0, 1.4), (2.0, 2.0, 2.0), None])
def test_scores_of_world_coordinates_come_back_to_the_voxels_they_belong_to(tmp_path, spacing_mm):
    shape, affine = (26, 22, 18), affine_of((1.0, 1.2, 2.0), (-5.0, 40.0, 3.0), (1, -1, 1))
    prepared = prepare(case_of(tmp_path, noise(shape), affine=affine), Preprocessing(spacing_mm=spacing_mm))

    def world(size, matrix):
        index = np.indices(size).reshape(3, -1)
        return (matrix[:3, :3] @ index + matrix[:3, 3:]).reshape(3, *size).astype(np.float32)

    restored = restore(world(prepared.image.shape[1:], prepared.affine), prepared)
    assert restored.shape == (3, *prepared.grid.ras_shape)
    inner = (slice(None), *(slice(4, -4),) * 3)
    np.testing.assert_allclose(restored[inner], world(shape, prepared.grid.ras_affine)[inner], atol=1e-3)


def test_undeclared_label_values_name_file_values_and_declaration(tmp_path):
    label = np.zeros((6, 7, 8), np.uint8)
    label[0, 0, :2] = (4, 9)
    case = case_of(tmp_path, noise(), label=label)
    with pytest.raises(
        DataError, match=r"l\.nii\.gz: label values 4, 9 are not declared \(declared: 0 background, 1 x\)"
    ):
        prepare(case, Preprocessing(), labels={0: "background", 1: "x"})
    assert prepare(case, Preprocessing(), with_label=False, labels={0: "background"}).label is None


def test_label_values_beyond_16_bits_are_refused(tmp_path):
    case = case_of(tmp_path, noise(), label=np.full((6, 7, 8), -3, np.int16))
    with pytest.raises(DataError, match="label values lie between 0 and 65535"):
        prepare(case, Preprocessing())
    many = case_of(tmp_path / "many", noise(), label=np.full((6, 7, 8), 300, np.int16))
    assert prepare(many, Preprocessing()).label.dtype == np.uint16


def test_a_label_on_another_grid_is_refused(tmp_path):
    case = case_of(tmp_path, noise(), label=np.zeros((6, 7, 9), np.uint8))
    with pytest.raises(DataError, match="does not lie on the grid"):
        prepare(case, Preprocessing())


def test_channels_take_one_type_that_holds_all_of_them(tmp_path):
    small, wide = np.arange(120).reshape(4, 5, 6), np.arange(120).reshape(4, 5, 6) * 500
    for arrays, kept in (
        ((small.astype(np.uint8), wide.astype(np.uint16)), np.uint16),
        ((wide.astype(np.uint16), -small.astype(np.int16)), np.int32),
        ((small.astype(np.uint16), -small.astype(np.int16)), np.int16),
        ((small.astype(np.float32) / 2, small.astype(np.int16)), np.float32),
        ((wide.astype(np.uint16), small.astype(np.float64) / 2, small.astype(np.uint8)), np.float32),
    ):
        prepared = prepare(case_of(tmp_path, *arrays), Preprocessing())
        assert prepared.image.dtype == kept
        assert prepared.image.flags.c_contiguous
        np.testing.assert_array_equal(prepared.image, np.stack(arrays))


def test_values_beyond_single_precision_are_refused_on_either_grid(tmp_path):
    case = case_of(tmp_path, noise(dtype=np.float64) * 1e300)
    for spacing_mm in (None, (0.7, 0.7, 0.7)):
        with pytest.raises(DataError, match=r"i0\.nii\.gz: .* beyond 1e\+30"):
            prepare(case, Preprocessing(spacing_mm=spacing_mm))


def body_case(folder, channels=1):
    """A small noisy body far from the middle of a larger scan, with a label inside it, flipped on disk."""
    image = np.full((70, 60, 50), -1000, np.int16)
    image[16:40, 32:44, 4:20] = 40
    image += np.random.default_rng(0).integers(-20, 20, image.shape, dtype=np.int16)
    label = np.zeros(image.shape, np.uint8)
    label[20:30, 34:40, 8:12] = 2
    return case_of(
        folder, *[image] * channels, label=label, affine=affine_of((0.8, 1.0, 2.5), (7, -3, 60), (-1, -1, 1))
    )


@pytest.mark.parametrize("spacing_mm", [None, (1.0, 1.0, 2.0)])
def test_a_crop_keeps_the_body_and_eight_voxels_and_moves_none_in_the_world(tmp_path, spacing_mm):
    case = body_case(tmp_path, channels=2)
    whole = prepare(case, Preprocessing(spacing_mm=spacing_mm))
    crop = prepare(case, Preprocessing(spacing_mm=spacing_mm, body_crop=True))
    start = [max(0, voxel - 8) for voxel in whole.foreground.box[0]]
    stop = [min(size, voxel + 8) for voxel, size in zip(whole.foreground.box[1], whole.image.shape[1:], strict=True)]
    assert start[0] > 0 and stop[2] < whole.image.shape[3]
    box = tuple(slice(*span) for span in zip(start, stop, strict=True))
    np.testing.assert_array_equal(crop.image, whole.image[:, *box])
    np.testing.assert_array_equal(crop.label, whole.label[box])
    assert crop.image.flags.c_contiguous and crop.label.flags.c_contiguous
    for voxel in ((0, 0, 0), (5, 11, 3)):
        in_whole = [index + first for index, first in zip(voxel, start, strict=True)]
        np.testing.assert_allclose(crop.affine @ [*voxel, 1], whole.affine @ [*in_whole, 1])
    assert crop.spacing_mm == whole.spacing_mm
    assert crop.grid.ras_shape == whole.grid.ras_shape
    assert crop.statistics == whole.statistics


def test_the_foreground_of_a_crop_is_told_in_its_own_voxels(tmp_path):
    case = body_case(tmp_path)
    whole, crop = prepare(case, Preprocessing()), prepare(case, Preprocessing(body_crop=True))
    moved = [voxel - max(0, voxel - 8) for voxel in whole.foreground.box[0]]
    assert list(crop.foreground.box[0]) == moved
    inside = crop.image[0] > -950
    assert crop.foreground.shares.shape == tuple(-(-size // 32) for size in crop.image.shape[1:])
    assert crop.foreground.shares[0, 0, 0] == np.rint(255 * inside[:32, :32, :32].mean())


def test_a_scan_without_background_is_not_cropped(tmp_path):
    array = np.random.default_rng(0).integers(100, 200, (20, 21, 22)).astype(np.int16)
    assert prepare(case_of(tmp_path, array), Preprocessing(body_crop=True)).image.shape == (1, 20, 21, 22)


def test_an_impossible_spacing_is_refused_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match="three positive numbers"):
        Preprocessing(spacing_mm=(1.0, 0.0, 1.0))
    with pytest.raises(DataError, match="more than the memory available"):
        prepare(case_of(tmp_path, noise()), Preprocessing(spacing_mm=(1e-4, 1e-4, 1e-4)))


def test_real_labels_survive_a_round_trip_through_another_spacing(shared_data):
    for case in read_cases(shared_data / "sts_ct").cases[:2]:
        own = prepare(case, Preprocessing())
        finer = prepare(case, Preprocessing(spacing_mm=(1.5, 1.5, 2.0)))
        back = restore((finer.label == 1)[None].astype(np.float32), finer)[0] > 0.5
        overlap = 2 * (back & (own.label == 1)).sum() / (back.sum() + (own.label == 1).sum())
        assert overlap > 0.95
