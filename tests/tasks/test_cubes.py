"""Boxes in millimetres: the same place and scale whatever the voxel size, read and resampled exactly."""

import pickle

import numpy as np
import pytest
import torch

from mim3d.inference import padding_values
from mim3d.loading.samples import SampleDataset
from mim3d.scans.intensity import Intensity
from mim3d.tasks.classification.cubes import Cube, CubeFinisher, CubeSampler, centre_of_label, centre_of_scan, cut_from
from tests.array_scans import ArrayScan

PLAIN = Intensity(window=(0.0, 1.0))


def ramp_scan(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float], axis: int) -> ArrayScan:
    """The place along an axis, in millimetres from the scan's middle, mapped into 0 to 1 by a hundredth."""
    places = (np.arange(shape[axis]) - (shape[axis] - 1) / 2) * spacing_mm[axis]
    line = np.moveaxis(np.broadcast_to(places, (*np.delete(shape, axis), shape[axis])), -1, axis)
    return ArrayScan((line[None] / 100 + 0.5).astype(np.float32), spacing_mm=spacing_mm, class_name="b")


def box_of(scan: ArrayScan, sampler: CubeSampler) -> np.ndarray:
    return SampleDataset([scan], sampler, PLAIN, 0, CubeFinisher())[0]["image"][0].numpy()


def exact(cube: Cube, *, around_label: bool = False) -> CubeSampler:
    return CubeSampler(cube, around_label, ("a", "b"))


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.703, 0.703, 2.5), (0.4, 0.9, 1.7), (2.0, 3.1, 0.31)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_voxel_of_a_box_lies_at_its_place_in_millimetres(spacing_mm, axis):
    scan = ramp_scan(tuple(int(60 / edge) for edge in spacing_mm), spacing_mm, axis)
    box = box_of(scan, exact(Cube((8, 8, 8), (1.5, 2.0, 2.5))))
    places = (np.arange(8) - 3.5) * (1.5, 2.0, 2.5)[axis]
    expected = np.moveaxis(np.broadcast_to(places, (8, 8, 8)), -1, axis)
    np.testing.assert_allclose((box[0] - 0.5) * 100, expected, atol=2e-2)


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.7, 0.7, 2.5), (0.3, 0.3, 1.3)])
def test_a_ball_has_the_same_size_in_the_box_whatever_the_voxels_of_its_scan(spacing_mm):
    shape = tuple(int(48 / edge) for edge in spacing_mm)
    places = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1) * spacing_mm
    distance = np.linalg.norm(places - (np.array(shape) - 1) / 2 * spacing_mm, axis=-1)
    scan = ArrayScan((distance < 9).astype(np.float32)[None], spacing_mm=spacing_mm, class_name="a")
    box = box_of(scan, exact(Cube((32, 32, 32), (1.5, 1.5, 1.5))))
    assert box.sum() * 1.5**3 == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.06)


def test_a_box_lies_around_the_labels_centre_of_mass_where_there_is_one():
    scan = ramp_scan((40, 30, 30), (1.0, 1.0, 1.0), 0)
    cube = Cube((4, 4, 4), (1.0, 1.0, 1.0))
    middle = box_of(scan, exact(cube, around_label=True)).mean()
    scan.class_locations = {2: np.array([[10, 4, 4], [12, 5, 6]])}
    around = box_of(scan, exact(cube, around_label=True)).mean()
    assert (middle - 0.5) * 100 == pytest.approx(0.0, abs=1e-3)
    assert (around - 0.5) * 100 == pytest.approx(11 - 19.5, abs=1e-3)
    assert centre_of_label({1: np.zeros((0, 3), np.int32)}) is None


def test_beyond_the_scan_there_is_its_lowest_value():
    scan = ArrayScan(np.full((1, 6, 6, 6), 0.8, np.float32), class_name="a")
    scan.image[0, 0, 0, 0] = 0.1
    box = box_of(scan, exact(Cube((16, 16, 16), (1.0, 1.0, 1.0))))
    assert box[0, 0, 0, 0] == pytest.approx(0.1)
    assert box[0, 8, 8, 8] == pytest.approx(0.8)


def test_a_whole_scan_is_stretched_onto_the_box_where_nothing_is_known_of_millimetres():
    scan = ramp_scan((32, 16, 8), (1.0, 1.0, 1.0), 2)
    box = box_of(scan, exact(Cube((8, 8, 16), None)))
    assert box.shape == (1, 8, 8, 16)
    inner = (box[0, 4, 4, 2:-2] - 0.5) * 100
    np.testing.assert_allclose(np.diff(inner), 0.5, atol=1e-3)


def test_a_coarse_box_is_read_in_a_coarser_resolution():
    cut = Cube((16, 16, 16), (6.0, 6.0, 5.0)).cut(np.array([100.0, 90.0, 80.0]), np.array([6.0, 6.0, 5.0]))
    assert np.array_equal(np.array(cut.read.footprint), 4 * np.array(cut.read.size))
    assert all(first % 4 == 0 for first in cut.read.origin)
    scan = ramp_scan((200, 200, 200), (1.0, 1.0, 1.0), 1)
    box = box_of(scan, exact(Cube((8, 8, 8), (6.0, 6.0, 5.0))))
    np.testing.assert_allclose((box[0, 4, :, 4] - 0.5) * 100, (np.arange(8) - 3.5) * 6, atol=2e-2)


@pytest.mark.parametrize("voxel_mm", [(1.5, 1.5, 1.5), (5.0, 6.0, 7.0), None])
def test_a_scan_in_memory_gives_the_box_that_the_loader_gives(voxel_mm):
    rng = np.random.default_rng(0)
    scan = ArrayScan(rng.uniform(0, 1, (2, 31, 22, 17)).astype(np.float32), spacing_mm=(1.0, 1.2, 2.5), class_name="a")
    cube = Cube((8, 12, 8), voxel_mm)
    cut = cube.cut(centre_of_scan(scan.shape), cube.step(scan.shape, scan.spacing_mm))
    mapped = PLAIN.apply(scan.image, scan.statistics)
    np.testing.assert_allclose(
        cut_from(mapped, cut, padding_values(PLAIN, scan.statistics)), box_of(scan, exact(cube)), atol=1e-6
    )


def test_training_boxes_are_moved_and_enlarged_within_bounds_and_their_class_is_a_number():
    scan = ArrayScan(np.zeros((1, 40, 40, 40), np.float32), class_name="b")
    cube = Cube((16, 16, 16), (1.0, 1.0, 1.0))
    sampler = CubeSampler(cube, False, ("a", "b"), shift_ratio=0.25, affine_prob=0.5, margin_ratio=0.25)
    samples = [sampler.draw(scan, np.random.default_rng(seed)) for seed in range(60)]
    sizes = {tuple(sample.arrays["size"]) for sample in samples}
    assert sizes == {(16, 16, 16), (24, 24, 24)}
    middles = []
    for sample in samples:
        (read,) = sample.images["image"]
        middles.append(np.array(read.origin) + (np.array(read.footprint) - 1) / 2 + sample.arrays["shift"])
    moved = np.array(middles) - 19.5
    assert np.abs(moved).max() <= 4.0
    assert np.abs(moved).max(axis=0).min() > 2.0
    assert {int(sample.arrays["class"][0]) for sample in samples} == {1}
    scan.class_name = "c"
    assert sampler.draw(scan, np.random.default_rng(0)).arrays["class"] == -1


def test_the_finisher_travels_to_other_processes_and_hands_boxes_to_the_augmentation():
    seen = []

    def augment(sample, seed):
        seen.append((tuple(sample["label"].shape), seed))
        return {"image": sample["image"] + 1, "label": sample["label"]}

    scan = ArrayScan(np.zeros((1, 10, 10, 10), np.float32), class_name="a")
    sampler = exact(Cube((4, 4, 8), (1.0, 1.0, 1.0)))
    sample = SampleDataset([scan], sampler, PLAIN, 0, CubeFinisher(augment))[0]
    assert set(sample) == {"image", "class"}
    assert seen[0][0] == (1, 4, 4, 8)
    assert torch.equal(sample["image"], torch.ones(1, 1, 4, 4, 8))
    assert pickle.loads(pickle.dumps(CubeFinisher())) == CubeFinisher()
