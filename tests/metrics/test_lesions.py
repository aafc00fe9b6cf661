"""Lesions against an implementation by hand, and in the cases where conventions decide."""

import numpy as np
import pytest

from mim3d.core.errors import ConfigError
from mim3d.metrics import LesionScore, LesionSettings, score_regions, summarise
from mim3d.metrics.lesions import score_lesions


def masks(*boxes, shape=(20, 8, 8)):
    mask = np.zeros(shape, dtype=bool)
    for start, stop in boxes:
        mask[start:stop, 2:4, 2:4] = True
    return mask


def components(mask):
    """Sets of voxels that hang together through faces, edges or corners, by flooding."""
    left, found = {tuple(voxel) for voxel in np.argwhere(mask)}, []
    while left:
        edge, whole = [left.pop()], set()
        while edge:
            voxel = edge.pop()
            whole.add(voxel)
            near = [other for other in left if max(abs(a - b) for a, b in zip(voxel, other, strict=True)) <= 1]
            left -= set(near)
            edge += near
        found.append(whole)
    return sorted(found, key=min)


def by_hand(prediction, reference, overlap):
    """Numbers of detected and true lesions, and Dice of every reference lesion, with many-to-many matching."""
    ours, theirs = components(prediction), components(reference)
    matches = {
        (r, p)
        for r, ref in enumerate(theirs)
        for p, pred in enumerate(ours)
        if ref & pred and len(ref & pred) / len(ref | pred) >= overlap
    }
    dice = []
    for r, ref in enumerate(theirs):
        found = set().union(*(ours[p] for p in range(len(ours)) if (r, p) in matches))
        dice.append(2 * len(ref & found) / (len(ref) + len(found)) if found else 0.0)
    return len(theirs), len(ours), len({r for r, _ in matches}), len({p for _, p in matches}), sorted(dice)


@pytest.mark.parametrize("overlap", [0.0, 0.15, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_random_lesions_are_matched_as_by_hand(seed, overlap):
    rng = np.random.default_rng(seed)
    reference = rng.random((12, 9, 7)) > 0.93
    prediction = (reference & (rng.random(reference.shape) > 0.4)) | (rng.random(reference.shape) > 0.97)
    found = score_lesions(prediction, reference, 0.001, LesionSettings(overlap=overlap))
    expected = by_hand(prediction, reference, overlap)
    counts = found.num_reference, found.num_predicted, found.num_detected, found.num_true
    assert counts == expected[:4]
    assert sorted(found.reference_dice) == pytest.approx(expected[4])
    assert found.sensitivity == found.num_detected / found.num_reference
    assert found.precision == found.num_true / found.num_predicted
    assert found.false_positives == found.num_predicted - found.num_true


def test_voxels_that_touch_at_a_corner_are_one_lesion():
    mask = np.zeros((4, 4, 4), dtype=bool)
    mask[1, 1, 1] = mask[2, 2, 2] = True
    assert score_lesions(mask, mask, 1.0).num_reference == 1


def test_one_prediction_over_two_lesions_counts_for_both_or_for_one():
    reference, prediction = masks((2, 5), (7, 12)), masks((2, 12))
    many = score_lesions(prediction, reference, 1.0)
    assert (many.num_detected, many.num_true, many.f1) == (2, 1, 1.0)
    one = score_lesions(prediction, reference, 1.0, LesionSettings(matching="one_to_one"))
    assert (one.num_detected, one.num_true, one.sensitivity, one.precision) == (1, 1, 0.5, 1.0)
    assert one.f1 == pytest.approx(2 / 3)
    assert one.reference_dice == pytest.approx((0.0, 2 * 20 / (20 + 40)))


def test_one_to_one_makes_as_many_pairs_as_there_can_be():
    # The first prediction overlaps both lesions, the second one only the lesion that the first fits best.
    reference, prediction = masks((0, 4), (6, 16)), masks((3, 14), (15, 18))
    found = score_lesions(prediction, reference, 1.0, LesionSettings(matching="one_to_one"))
    assert (found.num_detected, found.num_true) == (2, 2)


def test_a_lesion_below_the_least_size_counts_on_neither_side():
    reference, prediction = masks((1, 2), (5, 10), (14, 15)), masks((1, 2), (5, 10), (18, 19))
    settings = LesionSettings(min_ml=0.005)
    found = score_lesions(prediction, reference, 0.001, settings)
    assert (found.num_reference, found.num_predicted, found.num_detected, found.num_true) == (1, 1, 1, 1)


def test_a_prediction_on_a_lesion_left_out_for_its_size_is_neither_true_nor_false():
    reference, prediction = masks((1, 2), (5, 10)), masks((0, 4))
    found = score_lesions(prediction, reference, 0.001, LesionSettings(min_ml=0.005))
    assert (found.num_predicted, found.false_positives, found.sensitivity, found.precision) == (0, 0, 0.0, None)


def test_a_lesion_of_exactly_the_least_size_is_one():
    mask = masks((1, 3))
    assert score_lesions(mask, mask, 0.7**3 / 1000, LesionSettings(min_ml=8 * 0.7**3 / 1000)).num_reference == 1


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (masks(), masks((1, 3)), (0.0, None, 0.0, 0.0, 0)),
        (masks((1, 3)), masks(), (None, 0.0, 0.0, None, 1)),
        (masks((1, 3)), masks((8, 9)), (0.0, 0.0, 0.0, 0.0, 1)),
        (masks((0, 20)), masks((0, 20)), (1.0, 1.0, 1.0, 1.0, 0)),
        (masks(), masks(), (None, None, None, None, 0)),
    ],
    ids=["nothing predicted", "nothing there", "elsewhere", "perfect", "both empty"],
)
def test_rates_of_empty_and_disjoint_maps_follow_the_conventions(prediction, reference, expected):
    found = score_lesions(prediction, reference, 1.0)
    assert (found.sensitivity, found.precision, found.f1, found.dice, found.false_positives) == expected


def test_lesions_of_all_cases_are_taken_together_and_scans_without_any_count():
    maps = [(masks((1, 3)), masks((1, 3), (8, 9))), (masks((1, 3), (12, 14)), masks((12, 14))), (masks(), masks())]
    cases = [
        score_regions(*(m.astype(np.uint8) for m in pair), (1.0, 1.0, 1.0), {"a": (1,)}, lesions=LesionSettings())
        for pair in maps
    ]
    assert cases[2]["a"].lesions == LesionScore()
    found = summarise(cases, ["a"])["per_label"]["a"]["lesions"]
    assert found["sensitivity"] == found["precision"] == found["f1"] == pytest.approx(2 / 3)
    assert found["false_positives_per_scan"] == pytest.approx(1 / 3)
    assert found["dice"] == pytest.approx(2 / 3)
    assert (found["num_reference"], found["num_detected"], found["false_positives"]) == (3, 2, 1)


def test_lesions_are_scored_of_the_chosen_regions_alone():
    mask = masks((1, 3)).astype(np.uint8)
    found = score_regions(
        mask, mask, (1.0, 1.0, 1.0), {"a": (1,), "b": (1,)}, lesions=LesionSettings(), lesions_of={"b"}
    )
    assert found["a"].lesions is None and found["b"].lesions is not None


@pytest.mark.parametrize("settings", [{"overlap": 1.5}, {"overlap": -0.1}, {"min_ml": -1.0}, {"min_ml": float("nan")}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ConfigError, match=f"lesion_{next(iter(settings))}"):
        LesionSettings(**settings)
