"""Scores against an implementation that shares nothing with ours, and on masks that break naive ones."""

import itertools
import json

import numpy as np
import pytest
from monai.metrics.utils import get_code_to_measure_table

from mim3d.core.errors import DataError
from mim3d.metrics import ABSENT, CONVENTIONS, LabelScore, summarise, values_in
from tests.metrics.label_maps import score_labels

SPACINGS = [(1.0, 1.0, 1.0), (0.7, 0.7, 5.0), (2.5, 0.9, 1.3)]


def surface_points(mask, spacing_mm):
    """Voxels with a face neighbour outside, in millimetres, by asking every voxel."""
    padded = np.pad(mask, 1)
    points = []
    for voxel in np.argwhere(padded):
        neighbours = [tuple(voxel + step * np.eye(3, dtype=int)[axis]) for axis in range(3) for step in (-1, 1)]
        if not all(padded[place] for place in neighbours):
            points.append(voxel * np.array(spacing_mm))
    return np.array(points)


def nearest_mm(points, others):
    return np.sqrt(((points[:, None] - others[None]) ** 2).sum(-1)).min(1)


def brute_hd95(prediction, reference, spacing_mm):
    ours, theirs = surface_points(prediction, spacing_mm), surface_points(reference, spacing_mm)
    return max(np.percentile(nearest_mm(ours, theirs), 95), np.percentile(nearest_mm(theirs, ours), 95))


def surface_elements(mask, spacing_mm, area_of):
    """Position in millimetres and area of the surface in every 2 x 2 x 2 neighbourhood it passes through."""
    padded = np.pad(mask, 1).astype(int)
    points, areas = [], []
    for corner in itertools.product(*(range(size - 1) for size in padded.shape)):
        cell = padded[tuple(slice(start, start + 2) for start in corner)]
        if 0 < cell.sum() < 8:
            points.append(np.array(corner) * np.array(spacing_mm))
            areas.append(area_of(cell, spacing_mm))
    return np.array(points), np.array(areas)


def brute_nsd(prediction, reference, spacing_mm, tolerance_mm, area_of):
    ours, our_areas = surface_elements(prediction, spacing_mm, area_of)
    theirs, their_areas = surface_elements(reference, spacing_mm, area_of)
    near = our_areas[nearest_mm(ours, theirs) <= tolerance_mm].sum()
    near += their_areas[nearest_mm(theirs, ours) <= tolerance_mm].sum()
    return near / (our_areas.sum() + their_areas.sum())


def table_area(cell, spacing_mm):
    table, _ = get_code_to_measure_table(spacing_mm)
    return float(table[int("".join(str(bit) for bit in cell.ravel()), 2)])


def box_area(cell, spacing_mm):
    """Area in a neighbourhood of a box, by geometry: a face, a bevelled edge or a cut corner."""
    x, y, z = spacing_mm
    axes = [axis for axis in range(3) if cell.take(0, axis).sum() != cell.take(1, axis).sum()]
    if cell.sum() == 4:
        return (y * z, x * z, x * y)[axes[0]]
    if cell.sum() == 2:
        along = next(axis for axis in range(3) if axis not in axes)
        first, second = (spacing_mm[axis] / 2 for axis in axes)
        return np.hypot(first, second) * spacing_mm[along]
    triangle = np.diag(spacing_mm) / 2
    return np.linalg.norm(np.cross(triangle[1] - triangle[0], triangle[2] - triangle[0])) / 2


def blobs(seed, shape=(9, 8, 7)):
    rng = np.random.default_rng(seed)
    return rng.random(shape) > 0.6, rng.random(shape) > 0.7


def score(prediction, reference, spacing_mm=(1.0, 1.0, 1.0), **settings) -> LabelScore:
    maps = (np.asarray(mask).astype(np.uint8) for mask in (prediction, reference))
    return score_labels(*maps, spacing_mm, [1], **settings)[1]


def box(shape, start, stop):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(*side) for side in zip(start, stop, strict=True))] = True
    return mask


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_masks_score_as_brute_force_says(seed, spacing_mm):
    prediction, reference = blobs(seed)
    found = score(prediction, reference, spacing_mm, nsd_tolerance_mm=0.8)
    voxel_ml = np.prod(spacing_mm) / 1000
    assert found.dice == pytest.approx(2 * (prediction & reference).sum() / (prediction.sum() + reference.sum()))
    assert found.hd95_mm == pytest.approx(brute_hd95(prediction, reference, spacing_mm), rel=1e-6)
    assert found.nsd == pytest.approx(brute_nsd(prediction, reference, spacing_mm, 0.8, table_area), rel=1e-5)
    assert found.volume_ml == pytest.approx(prediction.sum() * voxel_ml)
    assert found.volume_error_ml == pytest.approx(abs(int(prediction.sum()) - int(reference.sum())) * voxel_ml)
    assert found.volume_error_ratio == pytest.approx(found.volume_error_ml / found.reference_volume_ml)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_surface_areas_of_boxes_follow_from_geometry_alone(spacing_mm):
    reference = box((14, 12, 10), (2, 2, 2), (9, 8, 7))
    prediction = box((14, 12, 10), (4, 2, 2), (12, 8, 8))
    found = score(prediction, reference, spacing_mm, nsd_tolerance_mm=1.0)
    assert found.nsd == pytest.approx(brute_nsd(prediction, reference, spacing_mm, 1.0, box_area), rel=1e-5)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        (box((5, 5, 5), (2, 2, 2), (3, 3, 3)), box((5, 5, 5), (2, 2, 2), (3, 3, 3))),
        (box((5, 5, 5), (0, 0, 0), (1, 1, 1)), box((5, 5, 5), (4, 4, 4), (5, 5, 5))),
        (box((5, 5, 5), (0, 0, 0), (5, 5, 5)), box((5, 5, 5), (1, 1, 1), (4, 4, 4))),
        (box((6, 7, 1), (0, 0, 0), (6, 3, 1)), box((6, 7, 1), (0, 2, 0), (6, 7, 1))),
        (box((1, 1, 9), (0, 0, 0), (1, 1, 4)), box((1, 1, 9), (0, 0, 2), (1, 1, 9))),
    ],
    ids=["one voxel", "opposite corners", "whole scan", "one slice", "one column"],
)
def test_degenerate_masks_score_as_brute_force_says(prediction, reference):
    spacing_mm = (0.8, 1.1, 3.0)
    found = score(prediction, reference, spacing_mm)
    assert found.hd95_mm == pytest.approx(brute_hd95(prediction, reference, spacing_mm), rel=1e-6)
    assert found.nsd == pytest.approx(brute_nsd(prediction, reference, spacing_mm, 1.0, table_area), rel=1e-5)


def test_a_perfect_prediction_is_perfect():
    mask = blobs(3)[0]
    found = score(mask, mask, (0.5, 0.5, 2.0))
    assert (found.dice, found.hd95_mm, found.nsd, found.volume_error_ml) == (1.0, 0.0, 1.0, 0.0)


def test_a_shift_by_one_slice_costs_one_slice_thickness():
    reference = box((20, 20, 20), (5, 5, 5), (15, 15, 15))
    found = score(np.roll(reference, 1, axis=2), reference, (1.0, 1.0, 4.0))
    assert found.hd95_mm == 4.0
    assert found.nsd < 0.9
    assert score(np.roll(reference, 1, axis=2), reference, (1.0, 1.0, 4.0), nsd_tolerance_mm=4.0).nsd == 1.0


def test_scores_do_not_depend_on_how_much_scan_lies_around():
    prediction, reference = blobs(4)
    close = score(prediction, reference, (0.9, 1.1, 2.0))
    large = [np.pad(mask, ((40, 3), (0, 25), (17, 30))) for mask in (prediction, reference)]
    assert score(*large, (0.9, 1.1, 2.0)) == close


def test_a_label_is_scored_the_same_among_others():
    prediction, reference = blobs(5)
    alone = score(prediction, reference)
    maps = [mask.astype(np.int32) * 7 for mask in (prediction, reference)]
    for labels in maps:
        labels[labels == 0] = 3
    assert score_labels(*maps, (1.0, 1.0, 1.0), [3, 7])[7] == alone


def test_swapping_prediction_and_reference_keeps_the_distances():
    prediction, reference = blobs(6)
    one, other = score(prediction, reference), score(reference, prediction)
    assert one.dice == other.dice and one.hd95_mm == other.hd95_mm
    assert one.nsd == pytest.approx(other.nsd)


def test_a_tolerance_of_1_mm_takes_a_spacing_that_a_header_has_rounded():
    reference = box((12, 12, 12), (3, 3, 3), (8, 8, 8))
    prediction = np.roll(reference, 1, axis=0)
    exact = score(prediction, reference, (1.0, 1.0, 1.0))
    assert score(prediction, reference, (1.0000001, 0.99999994, 1.0)).nsd == exact.nsd


def test_a_label_in_neither_mask_has_no_scores():
    empty = np.zeros((4, 4, 4))
    assert score(empty, empty) == ABSENT


@pytest.mark.parametrize(("missing", "status"), [("prediction", "missed"), ("reference", "invented")])
def test_a_label_in_one_mask_only_is_penalised_by_the_diagonal(missing, status):
    empty, mask = np.zeros((10, 10, 20)), box((10, 10, 20), (1, 1, 1), (3, 3, 3))
    pair = (empty, mask) if missing == "prediction" else (mask, empty)
    found = score(*pair, (2.0, 1.0, 1.0))
    assert found.status == status
    assert (found.dice, found.nsd) == (0.0, 0.0)
    assert found.hd95_mm == pytest.approx(np.linalg.norm([20, 10, 20]))
    assert found.volume_error_ratio == (1.0 if status == "missed" else None)


def test_means_leave_out_absent_labels_and_count_failures():
    whole = LabelScore(status="scored", dice=0.8, hd95_mm=2.0, nsd=0.9, volume_error_ratio=0.1)
    missed = LabelScore(status="missed", dice=0.0, hd95_mm=50.0, nsd=0.0, volume_error_ratio=1.0)
    table = summarise([{"a": whole, "b": ABSENT}, {"a": missed, "b": ABSENT}, {"a": ABSENT, "b": ABSENT}], ["a", "b"])
    first, second = table["per_label"]["a"], table["per_label"]["b"]
    assert (first["dice"], first["hd95_mm"], first["std"]["dice"]) == (0.4, 26.0, 0.4)
    assert (first["num_cases"], first["num_missed"], first["num_invented"], first["num_absent"]) == (2, 1, 0, 1)
    assert (second["dice"], second["num_cases"], second["num_absent"]) == (None, 0, 3)
    assert table["mean"]["dice"] == 0.4
    assert table["mean"]["volume_ml"] is None


def test_every_label_weighs_the_same_in_the_mean():
    good, bad = LabelScore(status="scored", dice=1.0), LabelScore(status="scored", dice=0.0)
    cases = [{"a": good, "b": bad}, {"a": good, "b": ABSENT}, {"a": good, "b": ABSENT}]
    assert summarise(cases, ["a", "b"])["mean"]["dice"] == 0.5


def test_summaries_are_valid_json():
    prediction, reference = blobs(7)
    cases = [{"a": score(prediction, reference), "b": ABSENT}]
    json.dumps({"conventions": CONVENTIONS, **summarise(cases, ["a", "b"])}, allow_nan=False)


def test_shapes_that_differ_are_refused():
    with pytest.raises(DataError, match=r"\(4, 4, 4\).*\(4, 4, 5\)"):
        score(np.ones((4, 4, 4)), np.ones((4, 4, 5)))


@pytest.mark.parametrize("array", [np.full((3, 3, 3), 0.5), np.full((3, 3, 3), -1)], ids=["fractions", "negative"])
def test_maps_of_other_than_whole_numbers_from_0_are_refused(array):
    with pytest.raises(DataError, match="whole numbers from 0"):
        score_labels(array, array, (1.0, 1.0, 1.0), [1])


def test_the_background_is_not_scored():
    empty = np.zeros((3, 3, 3), dtype=np.uint8)
    with pytest.raises(DataError, match="Label 0 cannot be scored"):
        score_labels(empty, empty, (1.0, 1.0, 1.0), [0, 1])


def test_values_in_lists_labels_without_the_background():
    array = np.zeros((3, 3, 3), dtype=np.int16)
    array[0, 0, 0], array[1, 1, 1] = 104, 2
    assert values_in(array) == [2, 104]
