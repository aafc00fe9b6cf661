"""``mim3d evaluate`` beyond single labels: regions, lesions, missing predictions, comparisons, tables, processes."""

import csv
import json
import os
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from mim3d.commands.evaluate import evaluate
from mim3d.commands.report import report
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import Run
from mim3d.datasets.references import find_pairs
from mim3d.metrics import CONVENTIONS
from mim3d.tasks.segmentation.scoring import CaseScoring, processes_for, score_cases

LABELS = '{"labels": {"0": "background", "1": "oedema", "2": "necrosis", "3": "enhancing"}}'
REGIONS = {"whole tumour": [1, 2, 3], "tumour core": ["necrosis", 3]}


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.astype(np.uint8), np.diag([1.0, 1.0, 2.0, 1.0])), path)


def tumour(shift=0):
    array = np.zeros((16, 14, 12))
    array[2:12, 3:11, 2:10] = 1
    array[4:10, 4:9, 3:9] = 2
    array[5:8, 5:8, 4:8] = 3
    return np.roll(array, shift, axis=0)


@pytest.fixture
def folders(tmp_path):
    """Five cases of a tumour in three parts, predicted ever further off, with a second method beside it."""
    for position, name in enumerate("abcde"):
        write(tmp_path / "ref" / f"{name}.nii.gz", tumour())
        write(tmp_path / "pred" / f"{name}.nii.gz", tumour(position % 2))
        write(tmp_path / "other" / f"{name}.nii.gz", tumour(1 + position % 2))
    (tmp_path / "dataset.json").write_text(LABELS)
    return tmp_path


@pytest.fixture
def quick(folders):
    """Nothing predicted of tumours of different sizes: no surfaces to measure, so that workers start fast."""
    for position, name in enumerate("abcde"):
        write(folders / "ref" / f"{name}.nii.gz", tumour()[..., : 6 + position])
        write(folders / "pred" / f"{name}.nii.gz", np.zeros((16, 14, 6 + position)))
    return folders


def run(folder, **settings):
    settings = {"predictions": folder / "pred", "references": folder / "ref", "out": folder / "s.json", **settings}
    settings = {"num_bootstrap": 100, **settings}
    texts = {key: str(value) if hasattr(value, "parts") else value for key, value in settings.items()}
    with open(evaluate(**texts), encoding="utf-8") as file:
        return json.load(file)


def test_labels_that_a_reference_was_not_annotated_for_are_left_out(folders):
    # Of b, the list knows oedema alone: what is predicted of the other labels is neither right nor wrong.
    write(folders / "ref" / "b.nii.gz", tumour() == 1)
    rows = [f"{name},ref/{name}.nii.gz,ref/{name}.nii.gz,{'oedema' if name == 'b' else ''}" for name in "abcde"]
    (folders / "references.csv").write_text("\n".join(["id,image,label,labels", *rows]))
    found = run(folders, references=folders / "references.csv")
    by_id = {case["id"]: case["labels"] for case in found["cases"]}
    assert {name: row["status"] for name, row in by_id["b"].items()} == {
        "oedema": "scored",
        "necrosis": "absent",
        "enhancing": "absent",
    }
    others = [by_id[name]["necrosis"]["dice"] for name in "acde"]
    assert found["per_label"]["necrosis"]["dice"] == pytest.approx(np.mean(others))
    rows[1] = "b,ref/b.nii.gz,ref/b.nii.gz,edema"
    (folders / "references.csv").write_text("\n".join(["id,image,label,labels", *rows]))
    with pytest.warns(UserWarning, match="said to have annotations of 'edema'"):
        run(folders, references=folders / "references.csv", overwrite=True)


def test_regions_are_scored_as_unions_in_place_of_labels(folders):
    found = run(folders, regions=REGIONS)
    assert list(found["per_label"]) == ["whole tumour", "tumour core"]
    assert found["regions"] == {"whole tumour": [1, 2, 3], "tumour core": [2, 3]}
    assert found["labels"] == {"1": "oedema", "2": "necrosis", "3": "enhancing"}
    reference, prediction = tumour() > 1, tumour(1) > 1
    dice = 2 * (reference & prediction).sum() / (reference.sum() + prediction.sum())
    assert found["cases"][1]["labels"]["tumour core"]["dice"] == pytest.approx(dice)


def test_labels_may_be_scored_beside_regions(folders):
    found = run(folders, regions={"core": [2, 3]}, labels=["enhancing"])
    assert list(found["per_label"]) == ["core", "enhancing"]


def test_regions_come_from_the_list_of_predictions(folders):
    cases = [{"id": name, "prediction": f"{name}.nii.gz"} for name in "abcde"]
    content = {"cases": cases, "labels": json.loads(LABELS)["labels"], "regions": {"core": [2, 3]}}
    (folders / "pred" / "predictions.json").write_text(json.dumps(content))
    assert list(run(folders)["per_label"]) == ["core"]
    content["regions"] = {"core": 2}
    (folders / "pred" / "predictions.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"predictions\.json.*regions"):
        run(folders)


def test_a_preset_gives_tolerance_names_and_regions(folders):
    (folders / "dataset.json").unlink()
    found = run(folders, preset="brats")
    regions = {"whole tumour": [1, 2, 3], "tumour core": [2, 3], "enhancing tumour": [3]}
    assert found["regions"] == regions and list(found["per_label"]) == list(regions)
    assert found["labels"] == {"1": "oedema", "2": "non-enhancing tumour", "3": "enhancing tumour"}
    assert (found["settings"]["preset"], found["settings"]["nsd_tolerance_mm"]) == ("BraTS", 1.0)


@pytest.mark.filterwarnings("ignore:The preset")
def test_flags_win_over_the_preset_one_by_one(folders):
    assert run(folders, preset="BraTS", nsd_tolerance_mm=3.0)["settings"]["nsd_tolerance_mm"] == 3.0
    found = run(folders, preset="BraTS", regions={"core": ["non-enhancing tumour", 3]}, labels=["oedema"])
    assert list(found["per_label"]) == ["core", "oedema"]


def test_the_tolerance_of_a_preset_reaches_the_scores(folders):
    for side in ("pred", "ref"):
        for path in (folders / side).iterdir():
            write(path, np.asarray(nib.load(path).dataobj) == 3)
        for name in "abcde":
            write(folders / "pred" / f"{name}.nii.gz", np.roll(tumour() == 3, 2, axis=0))
    (folders / "dataset.json").unlink()
    found = run(folders, preset="COVID-19-20")
    assert list(found["per_label"]) == ["lesion"]
    assert (found["settings"]["nsd_tolerance_mm"], found["mean"]["nsd"]) == (2.0, 1.0)
    assert run(folders, preset="COVID-19-20", nsd_tolerance_mm=1.0)["mean"]["nsd"] < 1.0


def test_a_preset_with_other_names_than_the_predictions_is_a_warning(folders):
    with pytest.warns(UserWarning, match="The preset BraTS and .*2 is 'non-enhancing tumour' and 'necrosis'"):
        found = run(folders, preset="BraTS")
    assert found["labels"]["2"] == "non-enhancing tumour"


def test_values_that_the_preset_does_not_know_are_refused(folders):
    (folders / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"not declared \(2, 3; declared are 1\)"):
        run(folders, preset="MSD Spleen")


def write_seg(path):
    """The header of a DICOM Segmentation in place of a label map."""
    pydicom = pytest.importorskip("pydicom")
    header = pydicom.Dataset()
    header.SOPClassUID, header.SOPInstanceUID = pydicom.uid.SegmentationStorage, pydicom.uid.generate_uid()
    header.SeriesInstanceUID, header.Modality = pydicom.uid.generate_uid(), "SEG"
    header.file_meta = pydicom.dataset.FileMetaDataset()
    header.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    path.unlink()
    header.save_as(path.with_name(path.name.replace(".nii.gz", ".dcm")), enforce_file_format=True)


@pytest.mark.filterwarnings("ignore:.*left out, no scan")
@pytest.mark.parametrize("side", ["pred", "other"])
def test_dicom_seg_is_refused_with_the_way_out_before_any_score(folders, side):
    cases = [{"id": name, "prediction": f"{name}.dcm"} for name in "abcde"]
    content = {"cases": cases, "labels": json.loads(LABELS)["labels"]}
    (folders / side / "predictions.json").write_text(json.dumps(content))
    for name in "abcde":
        write_seg(folders / side / f"{name}.nii.gz")
    with pytest.raises(DataError, match=rf"{side}.a\.dcm: is a DICOM-SEG.*mim3d predict.*--format nii\.gz"):
        run(folders, compare=folders / "other")
    (folders / side / "predictions.json").unlink()
    with pytest.raises(DataError, match=rf"{side}.a\.dcm: is a DICOM-SEG.*--format nii\.gz"):
        run(folders, compare=folders / "other")
    assert not (folders / "s.json").exists()


def test_references_in_dicom_seg_are_refused_too(folders):
    write_seg(folders / "ref" / "a.nii.gz")
    with pytest.raises(DataError, match=r"a\.dcm: is a DICOM-SEG.*convert it to NIfTI"):
        run(folders, references=[str(folders / "ref" / "a.dcm")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "COVID-19-2O"}, "no preset 'COVID-19-2O'.*COVID-19-20"),
        ({"preset": "CC-CCII"}, "CC-CCII is for classification"),
        ({"regions": {"core": []}}, r"regions\.core is empty"),
        ({"regions": {"core": [7]}}, r"regions\.core holds '7', which is not declared"),
        ({"regions": {"core": ["necrose"]}}, "Did you mean 'necrosis'"),
        ({"regions": {"oedema": [1, 2]}, "labels": ["oedema"]}, "both hold 'oedema'"),
        ({"lesions": ["tumour"]}, "lesions holds 'tumour', which is not scored"),
        ({"lesions": True, "lesion_overlap": 2.0}, "lesion_overlap is 2.0"),
        ({"num_bootstrap": 5}, "num_bootstrap is 5"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"baseline_column": "diameter_mm"}, "baseline_column is 'diameter_mm', which is a setting for tables"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_score(folders, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(folders, **settings)
    assert not (folders / "s.json").exists()


def test_lesions_are_counted_per_case_and_label_and_in_the_csv(folders):
    stray = tumour()
    stray[13:15, 0:2, 0:2] = 3
    write(folders / "pred" / "a.nii.gz", stray)
    found = run(folders, lesions=["enhancing"])
    lesions = found["per_label"]["enhancing"]["lesions"]
    assert (lesions["num_reference"], lesions["num_predicted"], lesions["false_positives"]) == (5, 6, 1)
    assert (lesions["sensitivity"], lesions["false_positives_per_scan"]) == (1.0, 0.2)
    assert len(lesions["ci95"]["precision"]) == 2
    assert "lesions" not in found["per_label"]["oedema"]
    assert found["cases"][0]["labels"]["enhancing"]["lesions"]["false_positives"] == 1
    with open(folders / "s.csv", encoding="utf-8", newline="") as file:
        rows = {(row["id"], row["label"]): row for row in csv.DictReader(file)}
    assert rows["a", "enhancing"]["lesion_false_positives"] == "1"
    assert rows["a", "oedema"]["lesion_false_positives"] == ""


def test_a_scan_without_the_label_counts_as_a_scan_without_false_lesions(folders):
    for side in ("ref", "pred"):
        write(folders / side / "a.nii.gz", np.zeros((16, 14, 12)))
    stray = tumour()
    stray[13:15, 0:2, 0:2] = 1
    write(folders / "pred" / "b.nii.gz", stray)
    found = run(folders, lesions=True)["per_label"]["oedema"]
    assert (found["num_absent"], found["lesions"]["false_positives_per_scan"]) == (1, 0.2)


def test_missing_predictions_are_left_out_or_scored_as_empty(folders):
    (folders / "pred" / "e.nii.gz").unlink()
    with pytest.warns(UserWarning, match="Not scored, with a reference but no prediction: e"):
        left_out = run(folders)
    with pytest.warns(UserWarning, match="Without a prediction, scored as empty ones: e"):
        worst = run(folders, missing="worst")
    assert (left_out["num_cases"], worst["num_cases"]) == (4, 5)
    assert left_out["not_scored"]["without_prediction"] == ["e"]
    assert (worst["scored_as_empty"], worst["not_scored"]["without_prediction"]) == (["e"], [])
    assert worst["cases"][4]["labels"]["oedema"]["status"] == "missed"
    assert worst["mean"]["dice"] == pytest.approx(0.8 * left_out["mean"]["dice"])


def test_a_report_shows_scores_with_intervals_and_cases_without_a_prediction(folders):
    (folders / "pred" / "e.nii.gz").unlink()
    Run.create(folders / "run", command="finetune", settings={"task": "segmentation", "seed": 0}, inputs={})
    with pytest.warns(UserWarning, match="scored as empty"):
        found = run(folders, missing="worst", out=folders / "run" / "scores.json")
    report([str(folders / "run")], str(folders / "r.html"))
    page = (folders / "r.html").read_text(encoding="utf-8")
    low, high = found["mean_ci95"]["dice"]
    assert f"{low:.3f} to {high:.3f}" in page
    assert "Not predicted; it is scored as an empty prediction." in page


def test_two_methods_are_compared_on_the_cases_of_both(folders):
    (folders / "other" / "e.nii.gz").unlink()
    with pytest.warns(UserWarning, match="no prediction: e"):
        found = run(folders, compare=folders / "other", lesions=True)
    comparison = found["comparison"]
    assert (found["num_cases"], comparison["num_cases"], comparison["only_in_predictions"]) == (5, 4, ["e"])
    row = comparison["paired"]["per_label"]["necrosis"]["dice"]
    difference = comparison["this"]["per_label"]["necrosis"]["dice"]
    difference -= comparison["compared"]["per_label"]["necrosis"]["dice"]
    assert row["difference"] == pytest.approx(difference) and difference > 0
    assert row["ci95"][0] <= row["difference"] <= row["ci95"][1]
    assert row["p"] == 0.125 and row["p_holm"] == pytest.approx(0.375)
    assert "lesion_f1" in comparison["paired"]["mean"]
    assert {"difference", "p", "p_holm"} <= found["conventions"].keys()
    assert (folders / "s.compared.csv").is_file()
    assert "0.375" in (folders / "s.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Predictions and references name")
def test_a_method_that_names_its_labels_differently_is_a_warning(folders):
    labels = {"0": "background", "1": "enhancing", "2": "necrosis", "3": "oedema"}
    content = {"labels": labels, "cases": [{"id": name, "prediction": f"{name}.nii.gz"} for name in "abcde"]}
    (folders / "other" / "predictions.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="other name their labels differently: 1 is 'oedema' and 'enhancing'"):
        run(folders, compare=folders / "other")


def test_patients_come_from_a_list_of_references(folders):
    rows = [f"ref/{name}.nii.gz,ref/{name}.nii.gz,{patient}" for name, patient in zip("abcde", "xxyyz", strict=True)]
    (folders / "list.csv").write_text("\n".join(["image,label,patient", *rows]))
    found = run(folders, references=folders / "list.csv")
    assert (found["num_cases"], found["num_patients"]) == (5, 3)
    assert [case["patient"] for case in found["cases"]] == list("xxyyz")


def test_tables_are_written_beside_or_left_out(folders):
    run(folders, tables=False)
    assert not (folders / "s.md").exists() and not (folders / "s.tex").exists()
    found = run(folders)
    row = found["per_label"]["oedema"]
    low, high = row["ci95"]["dice"]
    expected = f"{row['dice']:.3f} ± {row['std']['dice']:.3f} [{low:.3f}, {high:.3f}]"
    assert expected in (folders / "s.md").read_text(encoding="utf-8")
    assert expected.replace("±", r"$\pm$") in (folders / "s.tex").read_text(encoding="utf-8")


def test_processes_give_the_same_scores_in_the_same_order(folders):
    assert run(folders, num_workers=2, lesions=True)["cases"] == run(folders, num_workers=1, lesions=True)["cases"]


@pytest.mark.parametrize("num_workers", [0, 4])
def test_bad_maps_are_left_out_with_their_reason_whoever_scores(quick, num_workers):
    write(quick / "pred" / "b.nii.gz", np.full((16, 14, 7), 9))
    (quick / "ref" / "c.nii.gz").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="cannot be used and (is|are) left out"):
        found = run(quick, num_workers=num_workers)
    assert [case["id"] for case in found["cases"]] == ["a", "d", "e"]
    reasons = {row["id"]: row["reason"] for row in found["not_scored"]["unusable"]}
    assert sorted(reasons) == ["b", "c"]
    assert "b.nii.gz: holds label values that are not declared (9;" in reasons["b"]
    with pytest.raises(DataError, match=r"1 of 5 cases cannot be used \(strict: .*c\.nii\.gz"):
        run(quick, num_workers=num_workers, strict=True)


def test_a_script_without_a_main_guard_scores_in_processes(quick):
    script = quick / "script.py"
    names = [str(quick / name) for name in ("pred", "ref", "s.json")]
    script.write_text(f"import mim3d\nmim3d.evaluate(*{names!r}, num_workers=2, num_bootstrap=0)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Scores of 5 cases") == 1


def test_a_process_that_ends_once_is_survived(quick, monkeypatch):
    pairs = find_pairs(str(quick / "pred"), str(quick / "ref")).pairs
    settings = {"allowed": None, "nsd_tolerance_mm": 1.0, "lesions": None, "lesions_of": None}
    expected = dict(score_cases(pairs, CaseScoring(regions={"a": (1,)}, **settings), 1))
    assert len({case["a"].reference_volume_ml for case in expected.values()}) == 5
    killing = KilledOnce(regions={"a": (1,)}, **settings)
    monkeypatch.setenv("KILLED_ONCE", str(quick / "killed"))
    assert dict(score_cases(pairs, killing, 2)) == expected


class KilledOnce(CaseScoring):
    """Ends its process at the third case, the first time."""

    def score(self, pair):
        mark = os.environ["KILLED_ONCE"]
        if pair.id == "c" and not os.path.exists(mark):
            with open(mark, "w", encoding="utf-8"):
                os._exit(9)
        return super().score(pair)


def test_small_sets_stay_in_one_process_and_large_ones_within_memory(folders, monkeypatch):
    pairs = find_pairs(str(folders / "pred"), str(folders / "ref")).pairs
    assert processes_for(pairs, None) == 1
    assert processes_for(pairs, 3) == 3 and processes_for(pairs, 30) == 5 and processes_for(pairs, 0) == 1
    monkeypatch.setattr("mim3d.tasks.segmentation.scoring.SMALL_VOXELS", 100)
    monkeypatch.setattr("mim3d.tasks.segmentation.scoring.num_cores", lambda: 4)
    assert processes_for(pairs, None) == 4
    monkeypatch.setattr("mim3d.tasks.segmentation.scoring.available_memory_bytes", lambda: 2 * 24 * 16 * 14 * 12 + 5)
    assert processes_for(pairs, None) == 2


def test_conventions_of_everything_that_is_written_are_stated(folders):
    stated = run(folders, lesions=True)["conventions"]
    assert {
        "lesions",
        "lesion_overlap",
        "lesion_matching",
        "lesion_scores",
        "ci95",
        "missing",
        "regions",
    } <= stated.keys()
    assert CONVENTIONS.items() <= stated.items()
