"""``mim3d evaluate``: matching, naming, refusing, and what it writes."""

import csv
import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from mim3d.commands.evaluate import evaluate
from mim3d.core.errors import ConfigError, DataError

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def write(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), affine), path)


def cube(value=1, start=3, stop=8, shape=(12, 12, 12)):
    array = np.zeros(shape)
    array[start:stop, start:stop, start:stop] = value
    return array


@pytest.fixture
def folders(tmp_path):
    """Two cases: the first perfect, the second with the spleen missed."""
    both = cube(1, 2, 6) + cube(2, 7, 10)
    for name, predicted in (("a", both), ("b", np.where(both == 1, 1, 0))):
        write(tmp_path / "pred" / f"{name}.nii.gz", predicted)
        write(tmp_path / "ref" / f"{name}.nii.gz", both)
    return tmp_path


def run(folder, **settings):
    settings = {"predictions": folder / "pred", "references": folder / "ref", "out": folder / "s.json", **settings}
    texts = {key: str(value) if hasattr(value, "parts") else value for key, value in settings.items()}
    with open(evaluate(**texts), encoding="utf-8") as file:
        return json.load(file)


def test_scores_are_written_per_case_label_and_mean(folders, capsys):
    found = run(folders)
    assert found["labels"] == {"1": "label_1", "2": "label_2"}
    assert found["per_label"]["label_1"]["dice"] == 1.0
    assert found["per_label"]["label_2"]["dice"] == 0.5
    assert found["per_label"]["label_2"]["num_missed"] == 1
    assert found["mean"]["dice"] == 0.75
    assert [case["id"] for case in found["cases"]] == ["a", "b"]
    assert found["cases"][1]["labels"]["label_2"]["status"] == "missed"
    assert found["settings"]["nsd_tolerance_mm"] == 1.0
    assert {"hd95_mm", "nsd", "missed", "absent", "means"} <= found["conventions"].keys()
    assert capsys.readouterr().out.rstrip().endswith(str(folders / "s.json"))


def test_the_printed_table_cuts_no_number_short_on_80_columns(folders, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for file in folders.glob("*/*.nii.gz"):
        write(file, nib.load(file).get_fdata(), np.diag([212.3, 212.3, 424.6, 1.0]))
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "left upper lobe of the lung": 1, "spleen": 2}}')
    found = run(folders, lesions=True, compare=str(folders / "ref"))
    shown = capsys.readouterr().out
    # A path in a title stays in one piece.
    assert f"Difference to {folders / 'ref'}, 2 cases\n" in shown
    lines = [line for line in shown.splitlines()[:-2] if not line.startswith("Difference to ")]
    assert "\u2026" not in shown and max(map(len, lines)) <= 80
    for row in found["per_label"].values():
        assert f"{row['volume_error_ml']:.2f}" in shown and f"{row['lesions']['sensitivity']:.4f}" in shown
    for low, high in (found["mean_ci95"]["volume_error_ml"], found["mean_ci95"]["dice"]):
        assert any(f"{low:.{digits}f}" in shown and f"{high:.{digits}f}" in shown for digits in (2, 4))


def test_the_number_of_cases_is_said_in_good_english(folders, capsys):
    run(folders)
    assert "Scores of 2 cases: " in capsys.readouterr().out
    for file in folders.glob("*/b.nii.gz"):
        file.unlink()
    run(folders)
    assert "Scores of 1 case: " in capsys.readouterr().out


def test_the_csv_beside_holds_the_same_numbers(folders):
    found = run(folders)
    with open(folders / "s.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"]) for row in rows] == [
        (name, label) for name in "ab" for label in ("label_1", "label_2")
    ]
    assert float(rows[3]["hd95_mm"]) == found["cases"][1]["labels"]["label_2"]["hd95_mm"]


def test_a_label_absent_everywhere_is_null_and_blank(folders):
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "1": "liver", "2": "spleen", "3": "aorta"}}')
    found = run(folders)
    assert found["per_label"]["aorta"]["dice"] is None
    assert found["per_label"]["aorta"]["num_absent"] == 2
    assert found["mean"]["dice"] == 0.75
    assert "a,aorta,absent,,,,,,," in (folders / "s.csv").read_text()


def test_predictions_json_is_followed_for_ids_names_and_images(folders):
    (folders / "pred" / "a.nii.gz").rename(folders / "pred" / "strange.nii.gz")
    cases = [{"id": "a", "images": ["/scans/a.nii.gz"], "prediction": "strange.nii.gz"}]
    failed = [{"id": "b", "reason": "b.nii.gz: too dark."}]
    content = {"labels": {"0": "background", "1": "liver", "2": "spleen"}, "cases": cases, "failed": failed}
    (folders / "pred" / "predictions.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning) as caught:
        found = run(folders)
    assert found["labels"] == {"1": "liver", "2": "spleen"}
    assert [(case["id"], case["images"]) for case in found["cases"]] == [("a", ["/scans/a.nii.gz"])]
    assert found["not_scored"] == {
        "failed": ["b"],
        "without_reference": [],
        "without_prediction": ["b"],
        "unusable": [{"id": "b", "reason": "b: its prediction failed: b.nii.gz: too dark."}],
    }
    assert [str(warning.message) for warning in caught] == [
        "Not scored, failed to be predicted: b.",
        "Not scored, with a reference but no prediction: b.",
    ]


def test_names_come_from_a_dataset_json_beside_the_references(folders):
    (folders / "dataset.json").write_text('{"labels": {"background": 0, "liver": 1, "spleen": 2}}')
    assert run(folders)["labels"] == {"1": "liver", "2": "spleen"}


def test_references_may_be_files_a_csv_list_or_a_whole_data_set(folders):
    write(folders / "images" / "a.nii.gz", cube())
    write(folders / "labels" / "a.nii.gz", cube(1, 2, 6) + cube(2, 7, 10))
    (folders / "list.csv").write_text("image,label\nimages/a.nii.gz,labels/a.nii.gz\n")
    (folders / "pred" / "b.nii.gz").unlink()
    for references in ([str(folders / "ref" / "a.nii.gz")], str(folders / "list.csv"), str(folders)):
        (folders / "s.json").unlink(missing_ok=True)
        target = {"out": str(folders / "out" / "s.json"), "references": references}
        assert run(folders, **target)["mean"]["dice"] == 1.0


def test_chosen_labels_are_scored_by_name_or_value(folders):
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "1": "liver", "2": "spleen"}}')
    assert run(folders, labels=["spleen"])["labels"] == {"2": "spleen"}
    assert run(folders, labels=["1"])["mean"]["dice"] == 1.0


def test_an_unknown_label_offers_the_nearest(folders):
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "1": "liver", "2": "spleen"}}')
    with pytest.raises(ConfigError, match=r"'splen'.*spleen"):
        run(folders, labels=["splen"])


def test_a_stray_value_of_a_prediction_is_named_and_no_class_unless_asked_for(folders):
    mean = run(folders)["mean"]["dice"]
    path = folders / "pred" / "b.nii.gz"
    image = nib.load(path)
    voxels = np.array(image.dataobj)
    voxels[0, 0, 0] = 7
    nib.save(nib.Nifti1Image(voxels, image.affine, image.header), path)
    with pytest.warns(
        UserWarning, match=r"no reference holds and nothing declares: 7 \(first in b\).*use --labels 1 2 7"
    ):
        content = run(folders)
    assert content["mean"]["dice"] == pytest.approx(mean, abs=0.05) and "label_7" not in content["per_label"]
    assert any("7 (first in b)" in row["text"] for row in content["warnings"])
    asked = run(folders, labels=["1", "2", "7"])
    assert asked["per_label"]["label_7"]["num_invented"] == 1


def test_an_undeclared_value_names_the_file_and_the_way_out(folders):
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "1": "liver"}}')
    with pytest.raises(DataError, match=r"a\.nii\.gz: holds label values that are not declared \(2;.*--labels"):
        run(folders)
    assert run(folders, labels=["liver"])["mean"]["dice"] == 1.0


def test_a_map_on_another_grid_is_left_out_or_refused_before_any_score(folders):
    write(folders / "pred" / "b.nii.gz", cube(), np.diag([1.0, 1.0, 3.0, 1.0]))
    with pytest.raises(DataError, match=r"b\.nii\.gz.*1 x 1 x 3 mm.*b\.nii\.gz.*1 x 1 x 2 mm"):
        run(folders, strict=True)
    assert not (folders / "s.json").exists()
    with pytest.warns(UserWarning, match="1 of 2 cases cannot be used and is left out"):
        assert run(folders)["num_cases"] == 1


def test_another_stored_orientation_of_the_same_grid_scores_the_same(folders):
    before = run(folders)
    for name in "ab":
        image = nib.load(folders / "pred" / f"{name}.nii.gz")
        turned = image.as_reoriented(nib.orientations.axcodes2ornt("PIR"))
        nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), folders / "pred" / f"{name}.nii.gz")
    after = run(folders)
    assert (after["mean"], after["per_label"]) == (before["mean"], before["per_label"])


def test_extra_predictions_and_references_are_one_warning_each(folders):
    write(folders / "pred" / "c.nii.gz", cube())
    write(folders / "ref" / "d.nii.gz", cube())
    with pytest.warns(UserWarning) as caught:
        found = run(folders)
    assert [str(warning.message) for warning in caught] == [
        "Not scored, predicted without a reference: c.",
        "Not scored, with a reference but no prediction: d.",
    ]
    assert len(found["cases"]) == 2


def test_references_that_a_run_did_not_hold_out_are_no_news(folders, recwarn, capsys):
    for name in "cde":
        write(folders / "ref" / f"{name}.nii.gz", cube())
    content = {"only_held_out": True, "failed": [], "begun": []}
    content["cases"] = [{"id": name, "prediction": f"{name}.nii.gz"} for name in "ab"]
    listing = folders / "pred" / "predictions.json"
    listing.write_text(json.dumps(content))
    assert run(folders, missing="worst")["num_cases"] == 2
    assert "3 references are of cases that the run did not hold out, and not scored." in capsys.readouterr().out
    assert not recwarn.list
    listing.write_text(json.dumps({**content, "failed": [{"id": "c", "reason": "c is dark."}]}))
    assert run(folders)["not_scored"]["failed"] == ["c"]
    warned = " ".join(str(each.message) for each in recwarn.list)
    assert "failed to be predicted: c." in warned and "no prediction: c." in warned
    # A call that was interrupted: one of these may be missing.
    listing.write_text(json.dumps({**content, "begun": [{"id": "c", "images": ["c.nii.gz"]}]}))
    with pytest.warns(UserWarning, match="no prediction: c, d, e"):
        run(folders)


def test_labels_named_differently_are_a_warning(folders):
    (folders / "dataset.json").write_text('{"labels": {"0": "bg", "1": "liver", "2": "spleen"}}')
    content = {"labels": {"0": "bg", "1": "spleen", "2": "liver"}, "cases": []}
    content["cases"] = [{"id": name, "prediction": f"{name}.nii.gz"} for name in "ab"]
    (folders / "pred" / "predictions.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 is 'spleen' and 'liver'"):
        run(folders)


def test_nothing_in_common_names_both_sides(folders):
    for name in "ab":
        (folders / "ref" / f"{name}.nii.gz").rename(folders / "ref" / f"x{name}.nii.gz")
    with pytest.raises(DataError, match="the predictions are a, b, the references xa, xb"):
        run(folders)


def test_what_is_said_while_scoring_stays_in_the_file_of_scores(folders):
    assert "warnings" not in run(folders)
    for path in folders.glob("*/b.nii.gz"):
        untold = nib.load(path)
        untold = nib.Nifti1Image(np.asarray(untold.dataobj), None, untold.header)
        untold.set_sform(None, code=0)
        untold.set_qform(None, code=0)
        nib.save(untold, path)
    (folders / "ref" / "a.nii.gz").rename(folders / "ref" / "a_seg.nii.gz")
    for _ in range(2):
        with pytest.warns(UserWarning, match="a with a_seg"):
            remarks = [row["text"] for row in run(folders)["warnings"]]
        assert sum("left and right may be the wrong way round" in each for each in remarks) == 2
        assert any("a with a_seg" in each for each in remarks)


def test_two_references_of_one_name_in_one_folder_are_refused(folders):
    write(folders / "ref" / "more" / "a.nii", cube())
    write(folders / "ref" / "more" / "a.nii.gz", cube())
    with pytest.raises(DataError, match="are label maps of the same case"):
        run(folders)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": "scores.txt"}, r"use scores\.txt\.json"),
        ({"nsd_tolerance_mm": -1.0}, "nsd_tolerance_mm is -1.0"),
        ({"nsd_tolerance_mm": float("nan")}, "nsd_tolerance_mm is nan"),
        ({"labels": []}, "labels is empty"),
        ({"labels": ["liver"]}, "'liver'.*None is: give values"),
    ],
)
def test_settings_that_cannot_work_are_refused(folders, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(folders, **settings)


@pytest.mark.parametrize("side", ["predictions", "references"])
def test_a_missing_folder_is_named(folders, side):
    with pytest.raises(DataError, match="nowhere: no such"):
        run(folders, **{side: folders / "nowhere"})


def test_empty_maps_have_nothing_to_score(tmp_path):
    for side in ("pred", "ref"):
        write(tmp_path / side / "a.nii.gz", np.zeros((4, 4, 4)))
    with pytest.raises(DataError, match="neither the predictions nor the references"):
        run(tmp_path)


def test_a_fault_leaves_earlier_scores_alone(folders):
    run(folders)
    before = (folders / "s.json").read_bytes()
    write(folders / "pred" / "b.nii.gz", cube(shape=(5, 12, 12)))
    with pytest.raises(DataError):
        run(folders, strict=True)
    assert (folders / "s.json").read_bytes() == before


def test_hippocampus_labels_score_perfectly_against_themselves(shared_data, tmp_path):
    labels = sorted((shared_data / "hippocampus" / "labelsTr").glob("*.nii.gz"))[:3]
    (tmp_path / "pred").mkdir()
    for path in labels:
        (tmp_path / "pred" / path.name).write_bytes(path.read_bytes())
    found = run(tmp_path, references=[str(path) for path in labels])
    assert found["mean"]["dice"] == 1.0
    assert found["mean"]["hd95_mm"] == 0.0
    assert found["mean"]["nsd"] == 1.0


def test_scores_of_other_predictions_are_kept_unless_they_are_to_be_replaced(folders):
    run(folders)
    before = (folders / "s.json").read_bytes()
    run(folders)
    shutil.copytree(folders / "ref", folders / "perfect")
    with pytest.raises(ConfigError, match=r"s\.json holds the scores of .*pred; .*--overwrite true"):
        run(folders, predictions=folders / "perfect")
    assert (folders / "s.json").read_bytes() == before
    assert run(folders, predictions=folders / "perfect", overwrite=True)["mean"]["dice"] == 1.0


@pytest.mark.parametrize("name", ["pred/predictions.json", "dataset.json", "table.json", "list.json"])
def test_what_is_no_file_of_scores_is_never_replaced(folders, name):
    rows = [{"id": case, "images": [], "prediction": f"{case}.nii.gz"} for case in "ab"]
    (folders / "pred/predictions.json").write_text(json.dumps({"cases": rows}))
    (folders / "dataset.json").write_text('{"labels": {}}')
    (folders / "table.csv").write_text("mine")
    (folders / "list.json").write_text("[]")
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"would be replaced|is no file of scores"):
        run(folders, out=folders / name)
    assert {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()} == before
