"""Where training crops come from."""

import numpy as np

from mim3d.tasks.segmentation.crops import CropSampler, place_crop
from tests.array_scans import ArrayScan


def scan_with(locations: dict[int, list[tuple[int, int, int]]], shape: tuple[int, int, int]) -> ArrayScan:
    return ArrayScan(
        np.zeros((1, *shape), np.float32),
        class_locations={value: np.array(places) for value, places in locations.items()},
    )


def crops(sampler: CropSampler, scan: ArrayScan, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    drawn = [sampler.draw(scan, np.random.default_rng(seed)) for seed in range(number)]
    reads = [sample.images["image"][0] for sample in drawn]
    return [(np.array(read.origin), np.array(read.footprint)) for read in reads]


def test_a_positive_crop_is_centred_on_a_voxel_of_a_class_when_there_is_room():
    scan = scan_with({2: [(20, 30, 25)]}, (60, 60, 60))
    for origin, footprint in crops(CropSampler((8, 12, 16), 1.0), scan, 10):
        assert tuple(origin + footprint // 2) == (20, 30, 25)


def test_crops_stay_inside_a_scan_that_is_large_enough():
    scan = scan_with({2: [(0, 59, 30)]}, (60, 60, 60))
    for origin, footprint in crops(CropSampler((16, 16, 16), 0.5), scan, 50):
        assert (origin >= 0).all() and (origin + footprint <= 60).all()


def test_a_scan_smaller_than_the_patch_is_covered_whole():
    scan = scan_with({1: [(2, 2, 2)]}, (10, 40, 12))
    for origin, footprint in crops(CropSampler((16, 16, 16), 0.5), scan, 50):
        assert (origin[[0, 2]] <= 0).all()
        assert ((origin + footprint)[[0, 2]] >= np.array([10, 12])).all()


def test_every_class_is_visited_equally_often_whatever_its_size():
    scan = scan_with({1: [(5, 5, 5)], 9: [(40, 40, 40)] * 1000}, (50, 50, 50))
    near_small = sum(origin[0] < 10 for origin, _ in crops(CropSampler((4, 4, 4), 1.0), scan, 400))
    assert 150 < near_small < 250


def test_the_positive_ratio_is_kept_and_other_crops_lie_anywhere():
    scan = scan_with({1: [(25, 25, 25)]}, (50, 50, 50))
    origins = np.array([origin for origin, _ in crops(CropSampler((10, 10, 10), 0.25), scan, 400)])
    centred = (origins == 20).all(1)
    assert 60 < centred.sum() < 140
    assert origins[~centred].min() == 0 and origins[~centred].max() == 40


def test_a_scan_without_a_class_gives_crops_all_the_same():
    assert len(crops(CropSampler((8, 8, 8), 1.0), scan_with({}, (20, 20, 20)), 5)) == 5


def test_crops_for_an_affine_change_are_larger_about_the_same_centre():
    scan = scan_with({1: [(25, 25, 25)]}, (50, 50, 50))
    for origin, footprint in crops(CropSampler((10, 10, 20), 1.0, affine_prob=1.0, margin_ratio=0.25), scan, 5):
        assert tuple(footprint) == (16, 16, 30)
        assert tuple(origin + footprint // 2) == (25, 25, 25)


def test_label_and_image_are_read_at_one_place_and_draws_are_pure_functions_of_the_generator():
    scan = scan_with({1: [(25, 25, 25)]}, (50, 50, 50))
    sampler = CropSampler((10, 10, 10), 0.5, affine_prob=0.5, margin_ratio=0.2)
    first, second = (sampler.draw(scan, np.random.default_rng(3)) for _ in range(2))
    assert first == second
    assert first.images["image"] == first.labels["label"]


def test_place_crop_moves_no_further_than_the_border_asks():
    rng = np.random.default_rng(0)
    assert place_crop(100, 10, 50, rng) == 45
    assert place_crop(100, 10, 2, rng) == 0
    assert place_crop(100, 10, 99, rng) == 90
    assert place_crop(10, 10, 7, rng) == 0
