"""Cases that cannot be used are found by their headers before any work, all of them at once, and the others go on."""

import numpy as np
import pytest

from mim3d.core.errors import DataError
from mim3d.core.left_out import Failure
from mim3d.datasets.cases import read_cases
from mim3d.datasets.splits import Split, split_cases
from mim3d.datasets.usable import usable_cases
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.workflows.shared.held_out import choose_split
from tests.nifti import affine_of, noise, write_nifti

LACKS = Segmentation().lacks


@pytest.fixture
def folder(tmp_path):
    """Ten labelled cases, five of which cannot be used."""
    for number in range(10):
        write_nifti(tmp_path / "images" / f"c{number}.nii.gz", noise(seed=number))
        spacing_mm = (1, 1, 2) if number == 1 else (1, 1, 1)
        write_nifti(tmp_path / "labels" / f"c{number}.nii.gz", np.ones((6, 7, 8), np.uint8), affine_of(spacing_mm))
    (tmp_path / "images" / "c0.nii.gz").write_bytes(b"nonsense")
    (tmp_path / "labels" / "c2.nii.gz").unlink()
    (tmp_path / "images" / "c3.nii.gz").write_bytes(b"")
    (tmp_path / "labels" / "c4.nii.gz").unlink()
    (tmp_path / "labels" / "c4.nii.gz").symlink_to("nowhere.nii.gz")
    return tmp_path


def test_every_bad_case_is_named_and_the_others_are_kept(folder):
    with pytest.warns(UserWarning, match=r"5 of 10 cases cannot be used and are left out: .*And 2 more\."):
        cases = usable_cases(read_cases(folder), lacks=LACKS)
    assert [case.id for case in cases.cases] == ["c5", "c6", "c7", "c8", "c9"]
    reasons = {each.case.id: each.reason for each in cases.left_out}
    assert sorted(reasons) == ["c0", "c1", "c2", "c3", "c4"]
    for name, reason in reasons.items():
        assert f"{name}.nii.gz" in reason
    assert "does not lie on the grid of" in reasons["c1"]
    assert "no label for c2" in reasons["c2"]
    assert "the file is empty" in reasons["c3"]
    assert [case.id for case in cases.unreadable if case.id != "c4"] == ["c0", "c1", "c3"]


def test_strict_refuses_with_the_number_and_the_first_reasons(folder):
    with pytest.raises(DataError, match=r"5 of 10 cases cannot be used \(strict: nothing is left out\): .*c0\.nii\.gz"):
        usable_cases(read_cases(folder), lacks=LACKS, strict=True)


def test_a_set_of_which_nothing_is_left_is_refused(folder):
    bad = read_cases(folder)
    with pytest.raises(DataError, match=r"none of 10 cases can be used: .*no label for c0.*And 7 more\."):
        usable_cases(bad, lacks=lambda case: f"no label for {case.id}")


def test_an_error_that_nobody_foresaw_leaves_out_its_case_alone(folder, monkeypatch):
    from mim3d.datasets import usable

    read_grid = usable.read_grid

    def odd(path):
        if "c7" in path:
            raise ValueError("broken\nheader")
        return read_grid(path)

    monkeypatch.setattr(usable, "read_grid", odd)
    with pytest.warns(UserWarning, match="left out"):
        cases = usable_cases(read_cases(folder), lacks=LACKS)
    (reason,) = (each.reason for each in cases.left_out if each.case.id == "c7")
    assert reason.endswith("c7.nii.gz: unexpected ValueError: broken header; please report it.")


def test_folds_stay_the_same_when_a_file_breaks(folder):
    every = read_cases(folder).cases
    whole = split_cases(every, fold=0, num_folds=5)
    bad = whole.train[0]
    split = choose_split([case for case in every if case != bad], fold=0, num_folds=5, unreadable=[bad])
    assert split.val == whole.val
    assert set(split.train) == set(whole.train) - {bad}
    with pytest.raises(DataError, match=r"None of the 2 cases to validate on can be used"):
        Split(train=whole.train, val=whole.val).without(whole.val)


def test_a_failure_says_what_happened_in_one_line():
    assert Failure.of(MemoryError(), "a.nii").reason == "a.nii: larger than the memory left for it."
    assert Failure.of(OSError(5, "Input/output error"), "a.nii").reason == "a.nii: cannot be read (Input/output error)."
    failure = Failure.of(KeyError(), "a.nii")
    assert failure.reason == "a.nii: unexpected KeyError: no message; please report it."
    assert failure.traceback is not None
