"""Marks recognise a scan that was saved again, and neither show it nor take another for it."""

import numpy as np
import pytest

from mim3d.caching.marks import Marks, marks_of, salted_digest
from mim3d.core.errors import DataError

SALT = "00112233445566778899aabbccddeeff"
SPACING = (1.0, 1.0, 1.5)
AFFINE = np.diag([1.0, 1.0, 1.5, 1.0])


def a_scan(seed: int) -> np.ndarray:
    """A bright body with noise, HU in whole numbers."""
    rng = np.random.default_rng(seed)
    places = np.indices((40, 36, 30))
    body = ((places - np.array([20, 18, 15])[:, None, None, None]) ** 2).sum(0) < 200
    return np.rint(rng.normal(size=body.shape) * 40 + np.where(body, 60, -900)).astype(np.int16)


def moved(shift: tuple[int, int, int]) -> np.ndarray:
    """The affine of a scan that was cut."""
    affine = AFFINE.copy()
    affine[:3, 3] = np.array(shift) * SPACING
    return affine


@pytest.mark.parametrize(
    ("image", "affine"),
    [
        (a_scan(0).astype(np.float64) * 1e-3 + 5, AFFINE),
        (a_scan(0).astype(np.int32) + 2000, AFFINE),
        (np.rint((np.clip(a_scan(0), -175, 250) + 175) * 0.6).astype(np.uint8), AFFINE),
        (a_scan(0)[4:, :-3, 3:], moved((4, 0, 3))),
    ],
    ids=["scaled", "shifted", "windowed to 8 bits", "cut"],
)
def test_a_copy_is_recognised_with_and_without_salt(image, affine):
    own, copy = marks_of(a_scan(0), SPACING, AFFINE), marks_of(image, SPACING, affine)
    assert own.likeness(copy) >= 1
    assert own.salted(SALT).likeness(copy.salted(SALT)) == own.likeness(copy)


def test_other_scans_and_other_salts_share_nothing():
    marks = [marks_of(a_scan(seed), SPACING, AFFINE) for seed in range(6)]
    assert max(one.likeness(two) for one in marks for two in marks if one is not two) < 0.5
    assert marks[0].salted(SALT).likeness(marks[0].salted(SALT[::-1])) == marks[0].salted(SALT).likeness(marks[0]) == 0
    assert salted_digest("ab", SALT) != salted_digest("ab", SALT[::-1])


@pytest.mark.parametrize("image", [np.zeros((20, 20, 20), np.int16), a_scan(0)[:3], a_scan(0)[:, :, :2], a_scan(0)[:1]])
def test_what_shows_nothing_has_no_marks(image):
    assert marks_of(image, SPACING, AFFINE).likeness(marks_of(image, SPACING, AFFINE)) == 0


def test_marks_are_read_back_and_what_is_none_is_refused():
    marks = marks_of(a_scan(0), SPACING, AFFINE)
    again = Marks.from_text(marks.to_text())
    assert np.array_equal(again.voxels, marks.voxels) and np.array_equal(again.places, marks.places)
    assert len(marks.to_text()) < 2200 and len(marks.voxels) == 128
    for text in ("", "x", "AAAA", marks.to_text()[:-8], None, "/" + "A" * 4095):
        with pytest.raises(DataError, match="no marks of a scan"):
            Marks.from_text(text)
