"""CSV and JSON lists."""

import json

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
    [([1], "entry 1: must be an object"), ([{"img": "x"}], "entry 1: unknown column 'img'"), ("x", "must be a list")],
)
def test_a_json_list_with_a_fault_is_refused_in_one_sentence(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, json.dumps(content), "list.json")


def test_a_binary_file_named_csv_is_refused(tmp_path):
    path = tmp_path / "list.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_cases(path)
