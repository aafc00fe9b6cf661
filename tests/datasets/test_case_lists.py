"""CSV and JSON lists."""

import json
import os
import warnings

import pytest

from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_cases


def read(tmp_path, text, name="list.csv"):
    """Cases of a list with this text."""
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    return read_cases(path)


def test_a_csv_list_is_relative_to_its_folder_and_knows_channels(tmp_path):
    found = read(
        tmp_path,
        "image,label,class,patient,split\n"
        "a_t1.nii.gz; sub/a_t2.nii.gz,a_seg.nii.gz,benign,P1,train\n"
        "\n"
        "b.nii.gz,,,,test\n",
    )
    first, second = found.cases
    assert found.form == "csv"
    assert first.images == (str(tmp_path / "a_t1.nii.gz"), str(tmp_path / "sub/a_t2.nii.gz"))
    assert first.label == str(tmp_path / "a_seg.nii.gz")
    assert (first.class_name, first.patient, first.split) == ("benign", "P1", "train")
    assert (second.label, second.class_name, second.patient, second.split) == (None, None, "b", "test")


def test_only_the_image_column_is_needed(tmp_path):
    assert [case.id for case in read(tmp_path, "image\nx.nii.gz\n").cases] == ["x"]


def test_a_json_list_takes_the_same_keys_and_may_declare_labels(tmp_path):
    rows = [{"image": ["a.nii.gz", "b.nii.gz"], "class": 3}, {"image": "c.nii.gz;d.nii.gz", "label": "e.nii.gz"}]
    plain = read(tmp_path, json.dumps(rows), "list.json")
    assert [len(case.images) for case in plain.cases] == [2, 2]
    assert plain.cases[0].class_name == "3"
    declared = read(tmp_path, json.dumps({"labels": {"1": "liver"}, "cases": rows}), "list.json")
    assert declared.labels == {0: "background", 1: "liver"}
    assert declared.cases == plain.cases


def test_a_list_may_name_its_cases(tmp_path):
    found = read(tmp_path, "id,image\nfirst,a/ct.nii.gz\n,b/ct.nii.gz\n")
    assert [case.id for case in found.cases] == ["first", "ct"]
    assert [case.patient for case in found.cases] == ["first", "ct"]


def test_images_only_drops_labels_of_a_list(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("image,label\nx.nii.gz,y.nii.gz\n")
    assert read_cases(path, recursive_images_only=True).cases[0].label is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,lable\nx.nii,y.nii\n", "unknown column 'lable'.*label"),
        ("label\ny.nii\n", "no column 'image'"),
        ("image,image\nx.nii,y.nii\n", "appears twice"),
        ("", "no column 'image'"),
        ("image\n", "lists no cases"),
        ("image,label\n,y.nii\n", "line 2: no image"),
        ("image\na.nii;;b.nii\n", "line 2: no image"),
        ("image\na,b.nii\n", "line 2: 2 cells but 1 columns"),
        ("id,image\na,x.nii\nA,y.nii\n", "line 3: the id 'A' is that of an earlier row"),
        ("id,image\n../a,x.nii\n", r"line 2: the id '\.\./a' cannot be the name of a file"),
        ("image,split\nx.nii,trian\n", "unknown split 'trian'.*train"),
        ("image\nx.nii\ny.nii\nx.nii\n", "entries 1 and 3 are the same image"),
    ],
)
def test_a_list_with_a_fault_is_refused_in_one_sentence(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1], "entry 1: must be an object"), ([{"imge": "x"}], "entry 1: unknown column 'imge'"), ("x", "must be a list")],
)
def test_a_json_list_with_a_fault_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, json.dumps(content), "list.json")


def test_a_binary_file_named_csv_is_refused(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_cases(path)


def said_of(tmp_path, text, name="list.csv"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read(tmp_path, text, name)
    return found, [str(each.message) for each in caught]


@pytest.mark.parametrize(("mark", "name"), [(";", "l.csv"), ("\t", "l.csv"), ("\t", "l.tsv"), (",", "l.CSV")])
def test_columns_may_be_separated_as_spreadsheets_do(tmp_path, mark, name):
    found, said = said_of(tmp_path, f"Image{mark}LABEL{mark}Fold\nx.nii{mark}y.nii{mark}1\n", name)
    (case,) = found.cases
    assert ([os.path.basename(path) for path in (*case.images, case.label)], case.fold) == (["x.nii", "y.nii"], 1)
    assert not said


def test_columns_of_other_names_are_read_and_that_is_said(tmp_path):
    found, said = said_of(tmp_path, "img,mask,Patient_ID,notes\nx.nii,y.nii,p7,n\n")
    (case,) = found.cases
    assert (os.path.basename(case.label), case.patient) == ("y.nii", "p7")
    assert "img as image, mask as label, Patient_ID as patient;" in said[0]
    assert "the column notes is not used" in said[1]


def test_a_column_goes_before_another_name_of_it(tmp_path):
    found, said = said_of(tmp_path, "image,label,mask,Label\nx.nii,y.nii,z.nii,w.nii\n")
    assert os.path.basename(found.cases[0].label) == "y.nii"
    assert "the columns mask, Label are not used" in said[0]


def test_a_text_file_lists_an_image_in_each_line(tmp_path):
    found, said = said_of(tmp_path, "a/x.nii.gz\n\nb,c.nii\n", "list.txt")
    assert [os.path.relpath(case.images[0], tmp_path) for case in found.cases] == ["a/x.nii.gz", "b,c.nii"]
    assert not said


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([0, 1, 1], {}, ["0", "1", "1"]),
        ([0, 1, 1], {"0": "benign", "1": "malign"}, ["benign", "malign", "malign"]),
    ],
)
def test_labels_that_are_numbers_are_classes(tmp_path, labels, names, classes):
    entries = [{"image": f"{row}.nii", "label": label} for row, label in enumerate(labels)]
    found, said = said_of(tmp_path, json.dumps({"labels": names, "training": entries}), "dataset.json")
    assert [case.class_name for case in found.cases] == classes
    assert (found.labels, len(said)) == ({}, 1)
    assert "are taken for classes of the scans" in said[0]


def test_labels_that_are_few_words_are_classes_but_missing_files_are_not(tmp_path):
    found, _ = said_of(tmp_path, "image,label\na.nii,ill\nb.nii,well\nc.nii,ill\n")
    assert [case.class_name for case in found.cases] == ["ill", "well", "ill"]
    found, said = said_of(tmp_path, "image,label\na.nii,x.nii\nb.nii,y.nii\n")
    assert [os.path.basename(case.label) for case in found.cases] == ["x.nii", "y.nii"]
    assert not said


def test_a_label_in_a_list_of_its_own_is_that_label(tmp_path):
    found = read(tmp_path, json.dumps([{"image": "x.nii", "label": ["y.nii"]}, "z.nii"]), "list.json")
    assert [case.label and os.path.basename(case.label) for case in found.cases] == ["y.nii", None]


def test_parts_have_the_names_that_people_give_them(tmp_path):
    found = read(tmp_path, "image,split\na.nii,Training\nb.nii,validation\nc.nii,TEST\n")
    assert [case.split for case in found.cases] == ["train", "val", "test"]


def test_folders_may_be_written_as_windows_does(tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "x.nii").touch()
    assert read(tmp_path, "image\nscans\\x.nii\n").cases[0].images == (str(tmp_path / "scans" / "x.nii"),)
