"""Splits are by patient, seeded, and complete."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import split_cases


def make(num_cases, num_patients, classes=1, split=None):
    """Cases dealt out to patients in turn."""
    return [
        Case(
            id=f"c{index}",
            images=(f"/c{index}.nii",),
            patient=f"p{index % num_patients}",
            class_name=f"k{index % num_patients % classes}",
            split=split,
        )
        for index in range(num_cases)
    ]


@given(
    num_cases=st.integers(5, 40), num_patients=st.integers(5, 20), num_folds=st.integers(2, 5), seed=st.integers(0, 99)
)
def test_every_case_validates_in_exactly_one_fold_and_no_patient_is_divided(num_cases, num_patients, num_folds, seed):
    cases = make(num_cases, min(num_patients, num_cases))
    seen = []
    for fold in range(num_folds):
        split = split_cases(cases, fold=fold, num_folds=num_folds, seed=seed)
        assert not {case.patient for case in split.train} & {case.patient for case in split.val}
        assert {*split.train, *split.val} == set(cases)
        seen += split.val
    assert sorted(case.id for case in seen) == sorted(case.id for case in cases)


def test_the_split_does_not_depend_on_the_order_of_cases_but_on_the_seed():
    cases = make(50, 50)
    shuffled = random.Random(1).sample(cases, len(cases))
    first = {case.id for case in split_cases(cases, seed=3).val}
    assert first == {case.id for case in split_cases(shuffled, seed=3).val}
    assert first != {case.id for case in split_cases(cases, seed=4).val}


def test_each_fold_gets_its_share_of_each_class():
    cases = make(40, 40, classes=2)
    for fold in range(5):
        assert sum(case.class_name == "k0" for case in split_cases(cases, fold=fold).val) == 4


def test_a_declared_split_wins_and_test_cases_stay_out():
    cases = [*make(4, 4, split="train"), Case(id="v", images=("v",), patient="v", split="val")]
    cases += [Case(id="t", images=("t",), patient="t", split="test"), Case(id="n", images=("n",), patient="n")]
    split = split_cases(cases, fold=3)
    assert [case.id for case in split.train] == ["c0", "c1", "c2", "c3", "n"]
    assert [case.id for case in split.val] == ["v"]


def test_folds_are_drawn_where_only_test_cases_are_declared():
    cases = [*make(10, 10), Case(id="t", images=("t",), patient="t", split="test")]
    split = split_cases(cases)
    assert len(split.val) == 2
    assert "t" not in {case.id for case in (*split.train, *split.val)}


def test_a_declared_split_that_divides_a_patient_is_told():
    cases = [Case(id=part, images=(part,), patient="same", split=part) for part in ("train", "val")]
    with pytest.warns(UserWarning, match="both train and val"):
        split_cases(cases)


def test_what_cannot_be_split_is_refused():
    with pytest.raises(DataError, match="3 patients cannot be split into 5 folds; use --num_folds 3"):
        split_cases(make(9, 3))
    with pytest.raises(DataError, match=r"One patient .* cannot be split .* by --patient_pattern or a column patient"):
        split_cases(make(9, 1))
    with pytest.raises(ConfigError, match="fold 5 of 5"):
        split_cases(make(9, 9), fold=5)
