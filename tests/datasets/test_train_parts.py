"""Parts of the training cases hold whole patients, and smaller parts lie in larger ones."""

from pathlib import Path

import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import TrainPart, split_by_list
from mim3d.workflows.shared.held_out import choose_split


def cases(number: int, classes: int = 1, first: int = 0) -> list[Case]:
    """Two scans of each patient; classes in turn."""
    return [
        Case(
            id=f"p{patient}_{scan}",
            images=(f"p{patient}_{scan}.nii",),
            patient=f"p{patient}",
            class_name=f"k{patient % classes}" if classes > 1 else None,
        )
        for patient in range(first, first + number)
        for scan in range(2)
    ]


def patients(part: TrainPart, number: int = 20, classes: int = 1) -> set[str]:
    kept = part.take(cases(number, classes))
    assert len(kept) == 2 * len({case.patient for case in kept})
    return {case.patient for case in kept}


def test_a_number_of_patients_is_kept_exactly_and_nested():
    parts = [patients(TrainPart(train_cases=number)) for number in (1, 3, 10, 20)]
    assert [len(part) for part in parts] == [1, 3, 10, 20]
    assert parts[0] < parts[1] < parts[2] < parts[3]


def test_shares_and_numbers_take_the_same_patients():
    assert patients(TrainPart(train_fraction=0.25)) == patients(TrainPart(train_cases=5))
    assert len(patients(TrainPart(train_fraction=0.001))) == 1


def test_another_seed_draws_other_patients():
    drawn = {frozenset(patients(TrainPart(train_cases=3, train_seed=seed))) for seed in range(5)}
    assert len(drawn) > 3


def test_every_part_has_its_share_of_each_class():
    for number in (2, 4, 10):
        part = patients(TrainPart(train_cases=number, train_seed=number), classes=2)
        assert sum(int(name[1:]) % 2 for name in part) == number // 2


def test_a_list_names_cases_or_patients_and_shares_are_taken_of_it(tmp_path: Path):
    path = tmp_path / "few.txt"
    path.write_text("p1\n\np3_0\np25_1\n")
    kept = TrainPart(train_list=str(path)).take(cases(20), cases(10, first=20))
    assert [case.id for case in kept] == ["p1_0", "p1_1", "p3_0"]
    assert (
        len(
            {
                case.patient
                for case in TrainPart(train_list=str(path), train_cases=1).take(cases(20), cases(9, first=20))
            }
        )
        == 1
    )


def test_a_list_that_does_not_fit_the_data_is_refused_by_name(tmp_path: Path):
    path = tmp_path / "few.txt"
    for text, message in (
        ("p01\n", "names 'p01'.*Did you mean 'p"),
        ("\n", "names nothing"),
        ("p25\n", "only held-out"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            TrainPart(train_list=str(path)).take(cases(20), cases(10, first=20))
    with pytest.raises(DataError, match=r"nowhere.txt: cannot be read"):
        TrainPart(train_list=str(tmp_path / "nowhere.txt")).take(cases(20))


def test_a_list_holds_out_whole_patients_in_place_of_a_fold(tmp_path: Path):
    path = tmp_path / "held_out.txt"
    path.write_text("p1_0\np3\n")
    split = choose_split(cases(6), fold=0, num_folds=5, held_out_list=str(path), part=TrainPart(train_cases=2))
    assert [case.id for case in split.val] == ["p1_0", "p1_1", "p3_0", "p3_1"]
    assert len({case.patient for case in split.train}) == 2
    assert not {case.patient for case in split.train} & {"p1", "p3"}


def test_a_list_that_holds_out_everything_is_refused(tmp_path: Path):
    path = tmp_path / "held_out.txt"
    path.write_text("p0\np1\n")
    with pytest.raises(DataError, match="holds out every case"):
        split_by_list(cases(2), str(path))


def test_more_patients_than_there_are_is_refused():
    with pytest.raises(DataError, match="train_cases is 21, but there is no more than 20 patients"):
        TrainPart(train_cases=21).take(cases(20))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_fraction": 0.0}, "train_fraction is 0"),
        ({"train_fraction": 1.5}, "train_fraction is 1.5"),
        ({"train_cases": 0}, "train_cases is 0"),
        ({"train_cases": 3, "train_fraction": 0.5}, "both set"),
        ({"train_seed": -1}, "train_seed"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainPart(**settings)
