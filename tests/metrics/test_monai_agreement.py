"""Where MONAI's metrics have the same conventions, they give the same numbers."""

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric, SurfaceDiceMetric

from mim3d.metrics import label_scores
from tests.metrics.label_maps import score_labels

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (2.5, 0.9, 1.3)]


def box(shape, start, stop):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*side) for side in zip(start, stop, strict=True))] = True
    return mask


def random_masks(seed, shape=(13, 11, 9)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) > 0.6, rng.random(shape) > 0.8


PAIRS = {
    "random": random_masks(0),
    "sparse": tuple(mask & (np.random.default_rng(5).random(mask.shape) > 0.8) for mask in random_masks(1)),
    "one voxel": (box((5, 6, 7), (2, 2, 2), (3, 3, 3)), box((5, 6, 7), (4, 2, 1), (5, 3, 2))),
    "full": (np.ones((6, 5, 4), dtype=bool), box((6, 5, 4), (1, 1, 1), (4, 3, 3))),
    "full both": (np.ones((6, 5, 4), dtype=bool), np.ones((6, 5, 4), dtype=bool)),
    "at the border": (box((8, 8, 8), (0, 0, 0), (4, 8, 3)), box((8, 8, 8), (0, 3, 0), (5, 8, 8))),
    "one slice": (box((8, 9, 1), (0, 2, 0), (5, 6, 1)), box((8, 9, 1), (2, 2, 0), (8, 8, 1))),
}


def monai_scores(prediction, reference, spacing_mm, tolerance_mm):
    one_hot = [torch.from_numpy(np.stack([~mask, mask])[None].astype(np.float32)) for mask in (prediction, reference)]
    dice = DiceMetric(include_background=False)(*one_hot)
    hd95 = HausdorffDistanceMetric(include_background=False, percentile=95)(*one_hot, spacing=spacing_mm)
    nsd = SurfaceDiceMetric(class_thresholds=[tolerance_mm], include_background=False, use_subvoxels=True)(
        *one_hot, spacing=spacing_mm
    )
    return [float(value) for value in (dice, hd95, nsd)]


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize("name", PAIRS)
def test_dice_hd95_and_surface_dice_agree_with_monai(name, spacing_mm):
    prediction, reference = PAIRS[name]
    found = score_labels(
        prediction.astype(np.uint8), reference.astype(np.uint8), spacing_mm, [1], nsd_tolerance_mm=1.1
    )[1]
    expected = monai_scores(prediction, reference, spacing_mm, 1.1)
    assert [found.dice, found.hd95_mm, found.nsd] == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_working_in_slabs_and_in_parts_changes_nothing(monkeypatch):
    maps = [mask.astype(np.uint8) for mask in random_masks(3, (17, 12, 10))]
    whole = score_labels(*maps, (0.9, 1.1, 2.0), [1])
    monkeypatch.setattr(label_scores, "SLAB_VOXELS", 250)
    monkeypatch.setattr(label_scores, "_POINTS_AT_ONCE", 7)
    assert score_labels(*maps, (0.9, 1.1, 2.0), [1]) == whole


def test_ten_voxels_of_a_tenth_of_a_millimetre_lie_within_one_millimetre():
    reference = box((30, 4, 4), (3, 1, 1), (13, 3, 3))
    maps = [mask.astype(np.uint8) for mask in (np.roll(reference, 10, axis=0), reference)]
    assert score_labels(*maps, (0.1, 0.1, 0.1), [1], nsd_tolerance_mm=1.0)[1].nsd == 1.0
