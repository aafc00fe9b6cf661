"""What is drawn of a case: where slices lie, and which are chosen."""

import numpy as np
import pytest

from mim3d.core.errors import ConfigError
from mim3d.reporting.overlays import LabelledRegion, overlay_image, slices_through
from mim3d.reporting.rendering import label_colours
from mim3d.reporting.segmentations import segmentations, spread_out
from mim3d.tracking.slices import PLANES


def region(spacing_mm=(1.0, 1.0, 3.0), affine=None):
    labels = np.zeros((20, 18, 12), dtype=np.uint8)
    labels[5:10, 5:12, 2:10] = 1
    return LabelledRegion(labels.astype(np.float32), labels, (labels,), spacing_mm, (3, 4, 5), (40, 40, 30), affine)


def test_a_slice_is_named_by_its_number_in_the_whole_scan_and_its_place_in_millimetres():
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    affine[:3, 3] = -20, 0, -100
    shown = region(affine=affine)
    assert shown.title(PLANES[0], 2) == "axial 8/30, z \N{MINUS SIGN}79 mm"
    assert shown.title(PLANES[0], 2, short=True) == "8, z \N{MINUS SIGN}79 mm"
    assert region().title(PLANES[2], 0) == "sagittal 4/40"


def test_the_row_of_slices_goes_through_all_labels_in_the_plane_of_the_thickest_slices():
    plane, indices = slices_through(region().reference, (1.0, 1.0, 3.0))
    assert plane.name == "axial"
    assert indices == sorted(set(indices)) and len(indices) == 6 and indices[0] >= 2 and indices[-1] < 10
    assert slices_through(region().reference, (1.0, 3.0, 1.0))[0].name == "coronal"
    # Equal but for rounding: axial.
    assert slices_through(region().reference, (1.0, 1.0001, 1.0))[0].name == "axial"
    thin = np.zeros((4, 4, 5))
    thin[1, 1, 3] = 1
    assert slices_through(thin, (1.0, 1.0, 1.0))[1] == [3]
    assert len(slices_through(np.zeros((4, 4, 3)), (1.0, 1.0, 1.0))[1]) == 3


@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 3.0), (0.01, 0.01, 0.01), (30.0, 30.0, 300.0)])
def test_regions_of_any_size_are_drawn(spacing_mm):
    shown = region(spacing_mm, np.eye(4))
    assert 'class="film"' in overlay_image(shown, shown.predictions[0], {1: label_colours(0)})


def test_of_many_cases_some_from_the_worst_to_the_best_are_shown():
    ids = [f"c{number:03d}" for number in range(200)]
    shown = spread_out(ids)
    assert len(shown) == 7
    assert shown[0][1] == "Worst case: c000" and shown[-1][1] == "Best case: c199"
    assert "Median case: c099" in [title for _, title in shown]
    assert [title for _, title in spread_out(["a", "b"])] == ["Case 1 of 2: a", "Case 2 of 2: b"]
    assert spread_out([]) == []


def test_there_is_no_section_without_cases():
    assert segmentations([]) == {}
    with pytest.raises(ConfigError, match="there are none of label maps"):
        segmentations([], ["a"])
