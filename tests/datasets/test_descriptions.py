"""What a data set says of itself is honoured: labels, regions, folds, parts and channels; what is not used is named."""

import json
import warnings
from pathlib import Path

import pytest

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case, CaseSet, read_cases
from mim3d.datasets.splits import split_cases


def touch(folder: Path, *names: str) -> None:
    """Make empty files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def read(folder: Path, **content) -> tuple[CaseSet, list[str]]:
    """A folder with this dataset.json, and what is said of it."""
    (folder / "dataset.json").write_text(json.dumps(content))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_cases(folder)
    said = [str(each.message) for each in caught]
    assert said == list(found.notes)
    return found, said


def nnunet(folder: Path, labels: object, ids: str = "abc", **content) -> tuple[CaseSet, list[str]]:
    """An nnU-Net folder of one channel."""
    touch(folder, *(f"imagesTr/{name}_0000.nii.gz" for name in ids), *(f"labelsTr/{name}.nii.gz" for name in ids))
    return read(folder, **{"channel_names": {"0": "CT"}, "labels": labels, "file_ending": ".nii.gz", **content})


ENTRIES = [{"image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz"} for name in "abcd"]


@pytest.mark.parametrize("labels", [{"background": 0, "liver": 1, "ignore": 3}, {"1": "liver", "3": "Ignore"}])
def test_the_ignored_value_is_no_label(tmp_path, labels):
    found, said = nnunet(tmp_path, labels)
    assert (found.labels, found.ignore_label, said) == ({0: "background", 1: "liver"}, 3, [])
    assert found.label_values == {0: "background", 1: "liver", 3: "ignore"}


@pytest.mark.parametrize("ignored", [[3, 4], 0, 1])
def test_an_ignored_value_that_is_also_something_else_is_refused(tmp_path, ignored):
    with pytest.raises(DataError, match='"ignore" must be one label value'):
        nnunet(tmp_path, {"background": 0, "liver": 1, "ignore": ignored})


def test_regions_keep_their_names_values_and_order(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 4], "core": [1, 4], "enhancing": 4, "ignore": 5}
    found, said = nnunet(tmp_path, labels, regions_class_order=[2, 1, 4])
    assert found.regions == {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}
    assert list(found.regions) == ["whole", "core", "enhancing"]
    assert (found.region_values, found.ignore_label, said) == ((2, 1, 4), 5, [])
    assert found.labels == {0: "background", 1: "label_1", 2: "label_2", 4: "enhancing"}


@pytest.mark.parametrize("order", [[1], [1, 0], "12", [1, "2"]])
def test_an_order_that_does_not_fit_the_regions_is_refused(tmp_path, order):
    with pytest.raises(
        DataError, match=r'"regions_class_order" is .*needs a label value above 0 for each of whole, core'
    ):
        nnunet(tmp_path, {"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=order)


@pytest.mark.parametrize(
    "labels",
    [
        {"liver": 1, "tumour": 4},
        {"0": "background", "1": "liver", "4": "tumour"},
        {"background": "0", "liver": "1", "tumour": "4"},
        {"background": 0, "liver": [1], "tumour": 4.0},
    ],
)
def test_labels_are_read_in_every_form_people_write(tmp_path, labels):
    found, said = nnunet(tmp_path, labels)
    assert (found.labels, found.regions, said) == ({0: "background", 1: "liver", 4: "tumour"}, {}, [])


def test_a_list_of_label_names_counts_from_the_background(tmp_path):
    assert nnunet(tmp_path, ["background", "liver"])[0].labels == {0: "background", 1: "liver"}
    with pytest.raises(DataError, match="must map values to names"):
        nnunet(tmp_path, ["liver", "tumour"])


@pytest.mark.parametrize("value", [1.5, True, None, float("nan"), float("inf"), {"a": 1}, -1])
def test_a_label_value_that_is_no_whole_number_is_refused(tmp_path, value):
    with pytest.raises(DataError, match="is not a whole number from 0 to 65535"):
        nnunet(tmp_path, {"background": 0, "liver": value})


def test_a_structure_on_value_0_is_said_to_count_as_background(tmp_path):
    _, said = nnunet(tmp_path, {"liver": 0, "tumour": 1})
    assert len(said) == 1
    assert "value 0 is called 'liver', but voxels of 0 count as background" in said[0]


def test_what_nothing_uses_is_named_in_one_sentence_and_what_is_irrelevant_passed_over(tmp_path):
    irrelevant = {"name": "x", "licence": "y", "reference": "z", "release": 1, "tensorImageSize": "3D", "numTest": 7}
    _, said = nnunet(
        tmp_path,
        {"liver": 1},
        overwrite_image_reader_writer="NibabelIO",
        numTraining=3,
        clip=[0, 1],
        spacing=2,
        regions_class_order=[1],
        **irrelevant,
    )
    assert len(said) == 1
    assert "clip, spacing, regions_class_order are not used by mim3d" in said[0]


def test_a_number_of_cases_that_contradicts_the_files_is_said(tmp_path):
    _, said = nnunet(tmp_path, {"liver": 1}, numTraining=5)
    assert len(said) == 1
    assert "numTraining is 5, but it lists 3 cases" in said[0]


def test_files_that_the_description_passes_over_are_named(tmp_path):
    touch(tmp_path, "imagesTr/a_0001.nii.gz", "imagesTr/d_0000.nrrd", "labelsTr/lonely.nii.gz", "imagesTr/notes.txt")
    _, said = nnunet(tmp_path, {"liver": 1})
    assert len(said) == 2
    assert "a_0001.nii.gz, d_0000.nrrd not read" in said[0]
    assert "lonely.nii.gz not read" in said[1]


def test_the_mapping_of_nnunet_names_its_own_files(tmp_path):
    cases = {
        "one.x": {"images": ["p/ct.nrrd", "p/pet.nrrd"], "label": "p/seg.nrrd", "site": 3},
        "two": {"images": ["a", "b"]},
    }
    found, said = read(tmp_path, channel_names={"0": "CT", "1": "PET"}, labels={"x": 1}, dataset=cases)
    assert [case.id for case in found.cases] == ["one.x", "two"]
    assert found.cases[0].images == (str(tmp_path / "p/ct.nrrd"), str(tmp_path / "p/pet.nrrd"))
    assert (found.cases[0].label, found.cases[1].label) == (str(tmp_path / "p/seg.nrrd"), None)
    assert len(said) == 1
    assert "site is not used" in said[0]
    with pytest.raises(DataError, match='case \'one\' of "dataset" has 1 image, but "channel_names" 2'):
        read(tmp_path, channel_names={"0": "CT", "1": "PET"}, labels={}, dataset={"one": {"images": ["a"]}})


@pytest.mark.parametrize(
    ("declared", "channels"),
    [
        ({"0": "CT"}, ("CT",)),
        ({"1": "PET", "0": "CT"}, ("CT", "PET")),
        (["T1"], ("T1",)),
        ("MRI", ("MRI",)),
        (None, ()),
    ],
)
def test_channels_are_kept_in_their_order(tmp_path, declared, channels):
    assert read(tmp_path, modality=declared, training=ENTRIES)[0].channels == channels


def test_a_mapping_of_intensities_that_is_not_there_is_named(tmp_path):
    (note,) = read(tmp_path, modality={"0": "noNorm"}, training=ENTRIES)[0].notes
    assert "noNorm as the name of a channel asks for a mapping of intensities that mim3d does not have" in note
    assert read(tmp_path, modality={"0": "zscore"}, training=ENTRIES)[0].notes == ()


def test_channels_that_do_not_count_from_0_are_refused(tmp_path):
    with pytest.raises(DataError, match='"modality" must number its channels from 0, not 0, 2'):
        read(tmp_path, modality={"0": "CT", "2": "PET"}, training=ENTRIES)


def test_the_fold_of_an_entry_holds_it_out(tmp_path):
    found, said = read(tmp_path, training=[{**entry, "fold": k % 2} for k, entry in enumerate(ENTRIES)])
    assert ([case.fold for case in found.cases], said) == ([0, 1, 0, 1], [])
    for fold, ids in enumerate((["a", "c"], ["b", "d"])):
        split = split_cases(found.cases, fold=fold)
        assert [case.id for case in split.val] == ids
        assert len(split.train) == 2


def test_folds_that_are_not_declared_and_more_than_asked_for_are_refused():
    cases = [Case(id=name, images=(name,), patient=name, fold=fold) for fold, name in enumerate("abc", start=1)]
    with pytest.raises(ConfigError, match=r"declares the folds 1, 2, 3, so fold cannot be 0"):
        split_cases(cases, fold=0)
    with pytest.raises(ConfigError, match=r"declares 3 folds \(1, 2, 3\), but num_folds is 2; use --num_folds 3"):
        split_cases(cases, fold=1, num_folds=2)
    assert [case.id for case in split_cases(cases, fold=3).val] == ["c"]


def test_a_case_of_no_fold_always_trains_and_a_divided_patient_is_told():
    cases = [
        Case(id=name, images=(name,), patient=name[0], fold=fold) for name, fold in (("a1", 0), ("a2", 1), ("b", None))
    ]
    with pytest.warns(UserWarning, match="1 patient into both"):
        split = split_cases(cases, fold=0)
    assert [case.id for case in split.train] == ["a2", "b"]


@pytest.mark.parametrize("key", ["validation", "val", "valid"])
def test_lists_of_a_description_are_its_parts(tmp_path, key):
    found, said = read(tmp_path, training=ENTRIES[:2], **{key: ENTRIES[2:3]}, test=ENTRIES[3:])
    assert ([case.split for case in found.cases], said) == ([None, None, "val", "test"], [])
    assert [case.id for case in split_cases(found.cases).val] == ["c"]


def test_scans_of_a_challenge_that_are_mere_names_stay_out(tmp_path):
    assert len(read(tmp_path, training=ENTRIES, test=["./imagesTs/t.nii.gz"])[0].cases) == 4


def test_entries_of_a_description_hold_what_lists_hold(tmp_path):
    found, said = read(
        tmp_path, training=[{"image": "a.nii", "class": 1, "patient": "P", "modality": "MR", "spacing": [1]}]
    )
    case = found.cases[0]
    assert (case.class_name, case.patient, case.modality) == ("1", "P", "MR")
    assert "spacing is not used" in said[0]
    with pytest.raises(DataError, match='the label 1 is no file; if it is the class of the scan, call it "class"'):
        read(tmp_path, training=[{"image": "a.nii", "label": 1}, {"image": "b.nii", "label": "b_seg.nii"}])


def test_names_with_dots_find_their_channels(tmp_path):
    touch(tmp_path, "imagesTr/case.0_0000.nii.gz", "imagesTr/case.0_0001.nii.gz")
    found, _ = read(tmp_path, modality=["T1", "T2"], training=[{"image": "./imagesTr/case.0.nii.gz"}])
    assert found.cases[0].id == "case.0"
    assert [Path(image).name for image in found.cases[0].images] == ["case.0_0000.nii.gz", "case.0_0001.nii.gz"]


def test_the_first_of_several_channel_files_stands_for_all(tmp_path):
    touch(tmp_path, "imagesTr/c_0000.nii.gz", "imagesTr/c_0001.nii.gz")
    found, _ = read(tmp_path, modality=["T1", "T2"], training=[{"image": "imagesTr/c_0000.nii.gz"}])
    assert (found.cases[0].id, len(found.cases[0].images)) == ("c", 2)


def splits(folder: Path, *parts: tuple[str, str]) -> None:
    (folder / "splits_final.json").write_text(json.dumps([{"train": [*t], "val": [*v]} for t, v in parts]))


def test_the_folds_of_nnunet_are_those_of_its_own_file(tmp_path):
    splits(tmp_path, ("bc", "a"), ("a", "bc"))
    found, said = nnunet(tmp_path, {"liver": 1})
    assert ([case.fold for case in found.cases], said) == ([0, 1, 1], [])


def test_cases_that_its_file_leaves_out_are_left_out_and_named(tmp_path):
    splits(tmp_path, ("bx", "a"), ("ax", "b"))
    found, said = nnunet(tmp_path, {"liver": 1})
    assert [(case.fold, case.split) for case in found.cases] == [(0, None), (1, None), (None, "test")]
    assert "names x, which are no cases here" in said[0]
    assert "does not name c" in said[1]


@pytest.mark.parametrize(
    ("parts", "why"), [([("c", "ab"), ("a", "bc")], "holds b out twice"), ([("b", "a"), ("a", "c")], "out of fold 0")]
)
def test_folds_that_overlap_are_not_used_and_that_is_said(tmp_path, parts, why):
    splits(tmp_path, *parts)
    found, said = nnunet(tmp_path, {"liver": 1})
    assert {case.fold for case in found.cases} == {None}
    assert len(said) == 1
    assert why in said[0]


def test_a_file_of_folds_of_another_form_is_refused(tmp_path):
    (tmp_path / "splits_final.json").write_text('[{"training": []}]')
    with pytest.raises(DataError, match=r"splits_final\.json: must be a list of folds"):
        nnunet(tmp_path, {"liver": 1})


def test_a_comma_too_many_is_one_sentence_with_its_line(tmp_path):
    (tmp_path / "dataset.json").write_text('{"labels": {"liver": 1},\n}')
    with pytest.raises(DataError, match=r"dataset\.json: not valid JSON \(line 2: .*; correct it there"):
        read_cases(tmp_path)


def test_columns_that_nothing_uses_are_named_in_one_warning(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(",image,age,site,fold,modality\n0,a.nii.gz,61,B,0,CT\n1,b.nii.gz;c.nii.gz,44,A,1,CT;PET\n")
    with pytest.warns(UserWarning, match="the columns age, site are not used") as caught:
        found = read_cases(path)
    assert len(caught) == 1
    assert [(case.fold, case.modality) for case in found.cases] == [(0, "CT"), (1, "CT;PET")]


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        ("image,lable", "label"),
        ("imge,label", "image"),
        ("image,spilt", "split"),
        ("image_id", "image"),
    ],
)
def test_a_misspelt_column_is_refused_with_the_one_that_is_meant(tmp_path, header, meant):
    path = tmp_path / "list.csv"
    path.write_text(f"{header}\na.nii.gz,x\n")
    with pytest.raises(DataError, match=f"unknown column '.*'. Did you mean '{meant}'"):
        read_cases(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("image,fold\na.nii,one\n", "the fold 'one' is no whole number"),
        ("a.nii.gz,b.nii.gz\n", "no column 'image'; there are a.nii.gz, b.nii.gz;"),
        ("image;label\na;b;c\n", "line 2: 3 cells but 2 columns; quote cells that hold a separator"),
    ],
)
def test_a_list_of_another_form_is_refused_in_one_sentence(tmp_path, text, why):
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        read_cases(path)


def test_folds_may_name_files(tmp_path):
    one, other = ["a.nii.gz", "b.nii.gz"], ["c.nii.gz"]
    parts = [{"train": one, "val": other}, {"train": other, "val": one}]
    (tmp_path / "splits_final.json").write_text(json.dumps(parts))
    found, said = nnunet(tmp_path, {"liver": 1})
    assert ([case.fold for case in found.cases], said) == ([1, 1, 0], [])


@pytest.mark.parametrize("parts", [[], [{"train": ["x"], "val": ["y"]}]])
def test_folds_of_other_cases_are_not_used_and_that_is_said(tmp_path, parts):
    (tmp_path / "splits_final.json").write_text(json.dumps(parts))
    found, said = nnunet(tmp_path, {"liver": 1})
    assert [(case.fold, case.split) for case in found.cases] == [(None, None)] * 3
    assert len(said) == 1 and "splits_final.json: not used, since it names" in said[0]


def test_no_labels_are_as_none_declared(tmp_path):
    assert nnunet(tmp_path, {})[0].labels == {}
