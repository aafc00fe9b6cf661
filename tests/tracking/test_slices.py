"""Slices as a radiologist expects them, and the images of volumes that trackers show."""

import numpy as np
import pytest

from mim3d.tracking.slices import PLANES, grey_range, middle_slices

AXIAL, CORONAL, SAGITTAL = PLANES
SHAPE = (4, 5, 6)


def marked(index):
    array = np.zeros(SHAPE)
    array[index] = 1
    return array


@pytest.mark.parametrize(
    ("plane", "where", "row", "column"),
    [
        (AXIAL, (3, 4, 2), 0, 0),  # right anterior: upper left
        (AXIAL, (0, 0, 2), 4, 3),  # left posterior: lower right
        (CORONAL, (3, 2, 5), 0, 0),  # right superior: upper left
        (CORONAL, (0, 2, 0), 5, 3),
        (SAGITTAL, (2, 4, 5), 0, 0),  # anterior superior: upper left
        (SAGITTAL, (2, 0, 0), 5, 4),
    ],
)
def test_planes_follow_the_radiological_convention(plane, where, row, column):
    slice_ = plane.cut(marked(where), where[plane.axis])
    assert np.argwhere(slice_).tolist() == [[row, column]]


def test_slices_are_shown_in_millimetres():
    assert AXIAL.extent_mm(SHAPE, (2.0, 1.0, 3.0)) == (0.0, 8.0, 0.0, 5.0)
    assert SAGITTAL.extent_mm(SHAPE, (2.0, 1.0, 3.0)) == (0.0, 5.0, 0.0, 18.0)


def test_the_grey_range_survives_constant_and_empty_images():
    assert grey_range(np.full((3, 3), 7.0)) == (7.0, 8.0)
    assert grey_range(np.full((3, 3), np.nan)) == (0.0, 1.0)


def test_middle_slices_of_a_group_share_black_and_white() -> None:
    low, high = np.zeros((4, 6, 8)), np.full((4, 6, 8), 1.0)
    ramp = np.broadcast_to(np.linspace(0, 1, 4)[:, None, None], (4, 6, 8))
    image = middle_slices({"a/ramp": ramp, "a/low": low, "a/high": high})["a"]
    heights = 8 + 2 + 8 + 2 + 8
    assert image.shape == (heights, 4 + 2 + 4 + 2 + 6)
    assert image.dtype == np.uint8
    # The patient's right, where the ramp is low, is on the left of the page: the last voxel of X comes first.
    assert (image[0, :4] == [255, 170, 85, 0]).all()
    assert (image[10:16, :4] == 0).all()
    assert (image[20:26, :4] == 255).all()


def test_label_maps_scans_of_constants_and_holes_are_shown_too() -> None:
    labels = np.zeros((4, 4, 4), dtype=np.int64)
    labels[2], labels[3] = 1, 5
    images = middle_slices(
        {
            "seg/image": np.full((4, 4, 4), np.nan),
            "seg/reference": labels,
            "lone": np.ones((4, 4, 4)),
            "line": np.ones(3),
        }
    )
    assert set(images) == {"seg", "lone"}
    assert (images["seg"][6, :4] == [255, 51, 0, 0]).all()
    assert not images["seg"][:4].any()
