"""Ids: readable, unique, fit for file names, the same on every mount; predictions pair with references by them."""

import json
import shutil
import unicodedata
import warnings
from pathlib import Path

import pytest

from mim3d.caching.case import source_files
from mim3d.core.errors import DataError
from mim3d.core.files import write_csv
from mim3d.core.names import is_file_name, same_name
from mim3d.datasets.cases import read_cases
from mim3d.datasets.ids import distinct_names
from mim3d.datasets.references import find_pairs, read_class_tables
from mim3d.scans.volumes import read_grid
from tests.labelled import ball_scan, write_scan


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x", encoding="utf-8")


def ids(data: Path) -> list[str]:
    return [case.id for case in read_cases(data).cases]


def test_names_that_differ_by_case_or_by_signs_alone_get_ids_of_their_own(tmp_path):
    touch(
        tmp_path, "CT.nii", "ct.nii.gz", "a b.nii.gz", "a_b.nii.gz", "p/x.nii.gz", "con.nii.gz", "y" * 240 + ".nii.gz"
    )
    found = ids(tmp_path)
    assert len(set(map(same_name, found))) == len(found) == 7
    assert all(map(is_file_name, found))
    assert {"x", "con_"} < set(found) and sum(name.startswith("a_b-") for name in found) == 2


def test_the_same_set_has_the_same_ids_on_another_mount_and_in_another_order(tmp_path):
    lists = []
    for mount in ("here", "far/away/mnt"):
        root = tmp_path / mount
        touch(root, "p1/s/ct.nii.gz", "p2/s/ct.nii.gz", "p2/s/CT.nii", "mr.nii.gz")
        paths = [str(root / name) for name in ("p1/s/ct.nii.gz", "p2/s/ct.nii.gz", "p2/s/CT.nii", "mr.nii.gz")]
        write_csv(tmp_path / "lists" / "all.csv", ["image"], [[path] for path in paths])
        lists.append(ids(tmp_path / "lists" / "all.csv"))
        write_csv(tmp_path / "lists" / "all.csv", ["image"], [[path] for path in reversed(paths)])
        lists.append(ids(tmp_path / "lists" / "all.csv")[::-1])
    assert all(each == lists[0] for each in lists)
    assert lists[0][0] == "p1_s_ct" and lists[0][3] == "mr"


def test_a_semicolon_in_a_path_is_no_separator_where_such_a_file_exists(tmp_path):
    touch(tmp_path, "a;b.nii.gz", "c,d.nii.gz", "e f/t1.nii.gz", "e f/t2;.nii.gz")
    rows = [["a;b.nii.gz"], ["c,d.nii.gz"], ["e f/t1.nii.gz;e f/t2;.nii.gz"], ["gone1.nii.gz; gone2.nii.gz"]]
    write_csv(tmp_path / "list.csv", ["image"], rows)
    images = [[Path(path).name for path in case.images] for case in read_cases(tmp_path / "list.csv").cases]
    assert images == [["a;b.nii.gz"], ["c,d.nii.gz"], ["t1.nii.gz", "t2;.nii.gz"], ["gone1.nii.gz", "gone2.nii.gz"]]


def test_a_list_written_by_mim3d_finds_files_with_any_name_again(tmp_path):
    names = ["=1+1.nii.gz", "@sum.nii.gz", "esc\x1b[31m.nii.gz", "line\nend.nii.gz", "rtl\u202e.nii.gz", "'=x.nii.gz"]
    touch(tmp_path, *names)
    write_csv(tmp_path / "list.csv", ["image", "patient"], [[name, name] for name in names])
    found = read_cases(tmp_path / "list.csv").cases
    assert [Path(case.images[0]).name for case in found] == names
    assert all(is_file_name(case.id) and case.patient.isprintable() for case in found)


def test_composed_and_decomposed_letters_are_the_same_name(tmp_path):
    name = "M\u00fcller"
    touch(tmp_path / "images", unicodedata.normalize("NFD", name) + ".nii.gz")
    touch(tmp_path / "labels", name + ".nii.gz")
    (case,) = read_cases(tmp_path).cases
    assert case.id == name and case.label is not None
    write_csv(tmp_path / "list.csv", ["image", "id"], [[f"images/{name}.nii.gz", unicodedata.normalize("NFD", name)]])
    (listed,) = read_cases(tmp_path / "list.csv").cases
    assert listed.id == name and Path(listed.images[0]).exists()


def test_dots_in_names_are_part_of_them_in_every_description(tmp_path):
    for case in "01":
        touch(tmp_path, f"imagesTr/case.{case}_0000.nii.gz", f"labelsTr/case.{case}.nii.gz")
    training = [{"image": f"./imagesTr/case.{case}.nii.gz", "label": f"./labelsTr/case.{case}.nii.gz"} for case in "01"]
    descriptions = [
        {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "liver"}, "training": training},
        {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"},
    ]
    for description in descriptions:
        (tmp_path / "dataset.json").write_text(json.dumps(description))
        cases = read_cases(tmp_path).cases
        assert [case.id for case in cases] == ["case.0", "case.1"]
        assert all(Path(path).exists() for case in cases for path in (*case.images, case.label))


@pytest.mark.parametrize("name", ["../../etc/x", "a\x1b[31m", "a\nb", "rtl\u202e", "y" * 300, "con"])
def test_a_declared_id_that_is_no_file_name_leaves_no_folder(tmp_path, name):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text(
        json.dumps(
            {"channel_names": {"0": "CT"}, "labels": {}, "dataset": {name: {"images": ["imagesTr/a_0000.nii.gz"]}}}
        )
    )
    assert all(map(is_file_name, ids(tmp_path)))
    (tmp_path / "list.json").write_text(json.dumps([{"image": "imagesTr/a_0000.nii.gz", "id": name}]))
    with pytest.raises(DataError, match="cannot be the name of a file"):
        read_cases(tmp_path / "list.json")


def test_label_names_are_harmless_text(tmp_path):
    touch(tmp_path, "imagesTr/a_0000.nii.gz")
    labels = {"background": 0, "liver\x1b[2J\u202e": 1}
    (tmp_path / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}))
    assert read_cases(tmp_path).labels == {0: "background", 1: "liver\\x1b[2J\\u202e"}


def test_colons_in_names_of_files_are_no_addresses(tmp_path):
    for name in ("a::b", "a::channel=1", "c::1a2b3c4d"):
        write_scan(tmp_path / f"{name}.nii.gz", ball_scan(0)[0])
    cases = read_cases(tmp_path).cases
    assert [case.id for case in cases] == ["a_b", "a_channel_1", "c_1a2b3c4d"]
    assert all(read_grid(case.images[0]).shape == (22, 20, 18) for case in cases)
    assert all(source_files(case.images[0]) == list(case.images) for case in cases)


def test_images_and_labels_pair_by_their_places_where_several_have_one_name(tmp_path):
    places = ["a b", "a;b", "+1", "-1", "p1/ct", "p2/ct", "p3/t1"]
    touch(
        tmp_path, *(f"{side}/{place}.nii.gz" for side in ("images", "labels") for place in places if place != "p3/t1")
    )
    touch(tmp_path, "images/p3/t1.nii.gz", "labels/t1.nii.gz")
    cases = read_cases(tmp_path).cases
    assert len({same_name(case.id) for case in cases}) == len(places)
    for case in cases:
        image, label = (Path(path).relative_to(tmp_path).parts[1:] for path in (case.images[0], case.label))
        assert image == label or (image, label) == (("p3", "t1.nii.gz"), ("t1.nii.gz",))


def test_two_label_maps_of_one_name_are_refused_with_both(tmp_path):
    touch(tmp_path, "images/a.nii.gz", "labels/a.nii.gz", "labels/a.nrrd")
    with pytest.raises(DataError, match=r"a\.nii\.gz and .*a\.nrrd have the same name"):
        read_cases(tmp_path)


@pytest.mark.parametrize("twin_labels", [False, True])
@pytest.mark.parametrize("channel", ["", "_0000"])
def test_copies_of_a_scan_unpacked_beside_it_have_its_label_map_and_are_one_patients(tmp_path, twin_labels, channel):
    touch(tmp_path, *(f"imagesTr/{name}{channel}.nii.gz" for name in "abc"), *(f"labelsTr/{n}.nii.gz" for n in "abc"))
    touch(tmp_path, f"imagesTr/a{channel}.nii", *(["labelsTr/a.nii"] if twin_labels else []))
    with pytest.warns(UserWarning, match="2 scans share the name of another but for its ending"):
        cases = read_cases(tmp_path).cases
    assert len(cases) == 4 and len({case.id for case in cases}) == 4 and len({case.patient for case in cases}) == 3
    own = {Path(case.images[0]).name: Path(case.label).name for case in cases}
    assert own[f"a{channel}.nii"] == ("a.nii" if twin_labels else "a.nii.gz")
    assert own[f"a{channel}.nii.gz"] == "a.nii.gz" and own[f"b{channel}.nii.gz"] == "b.nii.gz"


def test_one_channel_of_a_scan_in_two_forms_is_refused(tmp_path):
    touch(tmp_path, *(f"imagesTr/{n}_000{c}.nii.gz" for n in "ab" for c in (0, 1)), "imagesTr/a_0000.nii")
    touch(tmp_path, "labelsTr/a.nii.gz", "labelsTr/b.nii.gz")
    with pytest.raises(DataError, match=r"a_0000\.nii\.gz have the same name but for the ending"):
        read_cases(tmp_path)


def pairs(tmp_path: Path, predictions: list[str], references: list[str]) -> list[tuple[str, str, str]]:
    for side, names in (("pred", predictions), ("ref", references)):
        shutil.rmtree(tmp_path / side, ignore_errors=True)
        touch(tmp_path / side, *(f"{name}.nii.gz" for name in names))
    found = find_pairs(str(tmp_path / "pred"), str(tmp_path / "ref")).pairs
    return [(each.id, Path(each.prediction).name, Path(each.reference).name) for each in found]


def test_predictions_pair_with_references_that_are_spelt_otherwise_and_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"Paired although their names differ: .*case\.0_0000 with case\.0"):
        found = pairs(tmp_path, ["case.0_0000", "Case2", "x"], ["case.0", "case2", "x"])
    assert [(name, prediction) for name, prediction, _ in found] == [
        ("case.0", "case.0_0000.nii.gz"),
        ("case2", "Case2.nii.gz"),
        ("x", "x.nii.gz"),
    ]


def test_names_of_four_digits_are_no_channels_of_one_another(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pairs(tmp_path, ["case_0000", "case_0001"], ["case_0000", "case_0001"])
    assert [name for name, _, _ in found] == ["case_0000", "case_0001"]
    with pytest.raises(DataError, match="no prediction is named like a reference"):
        pairs(tmp_path, ["case_0001"], ["case"])


def test_the_same_name_comes_before_a_similar_one(tmp_path):
    with pytest.warns(UserWarning, match="without a reference: case_0000"):
        assert pairs(tmp_path, ["case", "case_0000"], ["case"]) == [("case", "case.nii.gz", "case.nii.gz")]


@pytest.mark.filterwarnings("ignore:Paired although:UserWarning", "ignore:Not scored:UserWarning")
def test_words_for_what_a_file_is_do_not_part_a_prediction_from_its_reference(tmp_path):
    for ours, theirs in [("{}", "{}_seg"), ("{}_ct", "{}-label"), ("{}_pred", "{}"), ("img00{}", "label00{}")]:
        found = pairs(tmp_path, [ours.format(k) for k in "12"], [theirs.format(k) for k in "213"])
        assert [name for name, _, _ in found] == [theirs.format(k) for k in "12"]
    # One patient's CT and another's MRI may share a number; and of two candidates none is taken.
    assert [name for name, _, _ in pairs(tmp_path, ["x", "ct_1"], ["x", "mr_1"])] == ["x"]
    assert [name for name, _, _ in pairs(tmp_path, ["x", "p1_ct", "p1_pet"], ["x", "p1_seg"])] == ["x"]
    assert [name for name, _, _ in pairs(tmp_path, ["x", "p1"], ["x", "p1_seg", "p1_gt"])] == ["x"]


def test_references_in_folders_of_their_own_are_named_after_these(tmp_path):
    found = pairs(tmp_path, ["p1", "p2"], ["p1/seg", "p2/seg"])
    assert [(name, prediction) for name, prediction, _ in found] == [("p1_seg", "p1.nii.gz"), ("p2_seg", "p2.nii.gz")]
    assert len(pairs(tmp_path, ["a b", "a;b", "+1", "-1"], ["-1", "+1", "a b", "a;b"])) == 4
    touch(tmp_path, "set/imagesTs/c_0000.nii.gz", "set/labelsTs/c.nii.gz", "p/c_0000.nii.gz")
    (pair,) = find_pairs(str(tmp_path / "p"), str(tmp_path / "set")).pairs
    assert Path(pair.reference).parent.name == "labelsTs"


def test_a_prediction_is_known_by_what_its_scan_is_called_among_the_others(tmp_path):
    cases = [
        {"id": "ct", "images": [str(tmp_path / "a/ct.nii.gz")], "prediction": "ct.nii.gz"},
        {"id": "b_ct", "images": [str(tmp_path / "b/ct.nii.gz")], "prediction": "b_ct.nii.gz"},
    ]
    touch(tmp_path, "p/ct.nii.gz", "p/b_ct.nii.gz", "ref/a/seg.nii.gz", "ref/b/seg.nii.gz")
    (tmp_path / "p/predictions.json").write_text(json.dumps({"cases": cases}))
    found = find_pairs(str(tmp_path / "p"), str(tmp_path / "ref")).pairs
    assert [(each.id, Path(each.prediction).name) for each in found] == [
        ("a_seg", "ct.nii.gz"),
        ("b_seg", "b_ct.nii.gz"),
    ]


def test_two_candidates_are_refused_with_their_names(tmp_path):
    with pytest.raises(DataError, match=r"CASE, case_0000 and the references case: which"):
        pairs(tmp_path, ["CASE", "case_0000"], ["case"])


def test_a_scan_that_both_sides_name_decides_and_not_its_name(tmp_path):
    touch(tmp_path, "a/ct.nii.gz", "b/ct.nii.gz", "a/label.nii.gz", "b/label.nii.gz", "p/ct.nii.gz", "p/b_ct.nii.gz")
    rows = [[f"{name}/ct.nii.gz", f"{name}/label.nii.gz"] for name in "ba"]
    write_csv(tmp_path / "list.csv", ["image", "label"], rows)
    cases = [
        {"id": "ct", "images": [str(tmp_path / "a/ct.nii.gz")], "prediction": "ct.nii.gz"},
        {"id": "b_ct", "images": [str(tmp_path / "b/../b/ct.nii.gz")], "prediction": "b_ct.nii.gz"},
    ]
    (tmp_path / "p/predictions.json").write_text(json.dumps({"cases": cases, "labels": {}}))
    found = {each.id: each for each in find_pairs(str(tmp_path / "p"), str(tmp_path / "list.csv")).pairs}
    assert {name: Path(each.prediction).name for name, each in found.items()} == {
        "a_ct": "ct.nii.gz",
        "b_ct": "b_ct.nii.gz",
    }
    assert Path(found["a_ct"].reference).parent.name == "a"


def test_a_list_with_two_predictions_of_one_case_is_refused(tmp_path):
    touch(tmp_path, "p/x.nii.gz", "ref/x.nii.gz")
    rows = [{"id": "x", "prediction": "x.nii.gz"}] * 2
    (tmp_path / "p/predictions.json").write_text(json.dumps({"cases": rows}))
    with pytest.raises(DataError, match="names 2 predictions of the case 'x'"):
        find_pairs(str(tmp_path / "p"), str(tmp_path / "ref"))


def test_class_tables_pair_by_the_same_rules(tmp_path):
    head = ["id", "predicted", "probability_=a", "probability_b"]
    write_csv(tmp_path / "p.csv", head, [["s_0000", "=a", "0.9", "0.1"], ["=t", "b", "0.2", "0.8"]])
    write_csv(tmp_path / "r.csv", ["id", "class"], [["s", "=a"], ["=t", "b"]])
    with pytest.warns(UserWarning, match="s_0000 with s"):
        table = read_class_tables(str(tmp_path / "p.csv"), str(tmp_path / "r.csv"))
    assert [(row.id, row.true_class) for row in table.rows] == [("=t", "b"), ("s", "=a")]
    assert table.class_names == ("=a", "b")


def test_class_tables_pair_by_the_scans_that_the_list_beside_them_names(tmp_path):
    for folder in "ab":
        touch(tmp_path, f"{folder}/ct.nii.gz")
    (tmp_path / "b/ct.nii.gz").write_text("another")
    head, probabilities = ["id", "predicted", "probability_x", "probability_y"], ["x", "0.9", "0.1"]
    write_csv(tmp_path / "p/predictions.csv", head, [["ct", *probabilities], ["b_ct", *probabilities]])
    cases = [
        {"id": name, "images": [str(tmp_path / folder / "ct.nii.gz")]} for name, folder in (("ct", "a"), ("b_ct", "b"))
    ]
    (tmp_path / "p/classification.json").write_text(json.dumps({"cases": cases}))
    for folder, class_name in (("a", "x"), ("b", "y")):
        write_csv(tmp_path / folder / "list.csv", ["image", "class"], [["ct.nii.gz", class_name]])
    with pytest.warns(UserWarning, match="predicted without a reference: ct"):
        table = read_class_tables(str(tmp_path / "p"), str(tmp_path / "b/list.csv"))
    assert [(row.id, row.true_class) for row in table.rows] == [("ct", "y")]
    # Where the scan itself was not predicted, one of its name is, and that is said.
    write_csv(tmp_path / "p/predictions.csv", head, [["ct", *probabilities]])
    with pytest.warns(UserWarning, match="a/ct.nii.gz and .*b/ct.nii.gz; check that these are the same patients"):
        read_class_tables(str(tmp_path / "p"), str(tmp_path / "b/list.csv"))


def test_names_for_a_scan_whose_own_name_is_taken_begin_with_what_tells_it_apart(tmp_path):
    first = next(distinct_names(str(tmp_path / "p2/CT/scan.nii.gz"), "scan", str(tmp_path / "p1/CT/scan.nii.gz")))
    assert first == "p2_CT_scan"
    same_folder = next(distinct_names(str(tmp_path / "p/scan.nrrd"), "scan", str(tmp_path / "p/scan.nii.gz")))
    assert same_folder == "scan_nrrd"


def test_a_list_of_predictions_names_files_of_its_folder_alone(tmp_path):
    touch(tmp_path, "p/x.nii.gz", "ref/x.nii.gz", "elsewhere.nii.gz")
    for name in ("../elsewhere.nii.gz", str(tmp_path / "elsewhere.nii.gz")):
        (tmp_path / "p/predictions.json").write_text(json.dumps({"cases": [{"id": "x", "prediction": name}]}))
        with pytest.raises(DataError, match="lies outside its folder"):
            find_pairs(str(tmp_path / "p"), str(tmp_path / "ref"))
