"""``mim3d evaluate`` on tables of classes."""

import csv
import json

import numpy as np
import pytest

from mim3d.cli import main
from mim3d.commands.evaluate import evaluate
from mim3d.commands.report import report
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import Run

DIAMETERS = [3.0, 4.0, 9.0, 5.0, 12.0, 15.0, 8.0, 6.0]
TRUTH = ["Benign"] * 4 + ["Malign"] * 4
PROBABILITIES = [0.1, 0.2, 0.4, 0.6, 0.9, 0.8, 0.7, 0.3]


def write_table(path, heads, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return path


def write_predictions(path, probabilities, classes=("Benign", "Malign")):
    rows = [[f"n{n}", f"p{n // 2}", classes[int(p >= 0.5)], *(round(1 - p, 6), p)] for n, p in enumerate(probabilities)]
    return write_table(path, ["id", "patient", "predicted", *(f"probability_{name}" for name in classes)], rows)


@pytest.fixture
def tables(tmp_path):
    """Eight nodules of four patients, with their diameter."""
    write_predictions(tmp_path / "pred" / "predictions.csv", PROBABILITIES)
    rows = [[f"n{n}", name, f"p{n // 2}", size] for n, (name, size) in enumerate(zip(TRUTH, DIAMETERS, strict=True))]
    write_table(tmp_path / "labels.csv", ["case", "diagnosis", "patient", "diameter_mm"], rows)
    return tmp_path


def run(folder, **settings):
    settings = {
        "predictions": str(folder / "pred"),
        "references": str(folder / "labels.csv"),
        "out": str(folder / "s.json"),
        "class_column": "diagnosis",
        "num_bootstrap": 200,
        **settings,
    }
    with open(evaluate(**settings), encoding="utf-8") as file:
        return json.load(file)


def test_scores_tables_and_reliability_are_written(tables, capsys):
    found = run(tables)
    assert (found["kind"], found["positive"], found["num_cases"], found["num_patients"]) == (
        "classification",
        "Malign",
        8,
        4,
    )
    assert found["mean"]["auc"] == 14 / 16
    assert found["confusion"] == [[3, 1], [1, 3]]
    assert {"auc", "brier", "ece", "ci95"} <= found["conventions"].keys()
    assert found["cases"][0]["true_class"] == "Benign"
    bins = list(csv.DictReader((tables / "s.reliability.csv").read_text(encoding="utf-8").splitlines()))
    assert len(bins) == 10 and sum(int(row["num_cases"]) for row in bins) == 8
    assert "AUC | 0.875" in (tables / "s.md").read_text(encoding="utf-8")
    assert r"\toprule" in (tables / "s.tex").read_text(encoding="utf-8")
    assert capsys.readouterr().out.rstrip().endswith(str(tables / "s.json"))


def test_the_table_itself_may_be_named_in_place_of_its_folder(tables):
    assert run(tables, predictions=str(tables / "pred" / "predictions.csv"))["mean"] == run(tables)["mean"]


def test_a_column_of_the_references_is_held_against_the_classifier(tables):
    found = run(tables, baseline_column="diameter_mm")["baseline"]
    pairs = [(a > b) + (a == b) / 2 for a in DIAMETERS[4:] for b in DIAMETERS[:4]]
    assert found["baseline"]["auc"] == pytest.approx(np.mean(pairs))
    assert found["predictions"]["auc"] == 14 / 16
    assert found["difference"]["auc"] == pytest.approx(14 / 16 - np.mean(pairs))
    assert "diameter\\_mm" in (tables / "s.md").read_text(encoding="utf-8")


def test_the_positive_class_can_be_chosen(tables):
    found = run(tables, positive="Benign")
    assert (found["positive"], found["mean"]["auc"]) == ("Benign", 14 / 16)
    with pytest.raises(ConfigError, match=r"'Benin'.*Did you mean 'Benign'"):
        run(tables, positive="Benin")


def test_patients_may_be_scored_in_place_of_scans(tables):
    found = run(tables, by_patient=True, baseline_column="diameter_mm")
    assert (found["num_cases"], found["mean"]["accuracy"]) == (4, 0.75)
    assert found["baseline"]["predictions"]["auc"] == 3.5 / 4


def test_two_classifiers_are_compared_whatever_the_order_of_their_columns(tables):
    write_predictions(tables / "same" / "predictions.csv", [1 - p for p in PROBABILITIES], ("Malign", "Benign"))
    same = run(tables, compare=str(tables / "same"))["comparison"]["paired"]["auc"]
    assert (same["difference"], same["ci95"]) == (0.0, [0.0, 0.0])
    write_predictions(tables / "worse" / "predictions.csv", [0.5] * 8)
    worse = run(tables, compare=str(tables / "worse"))["comparison"]
    assert worse["num_cases"] == 8
    assert (worse["paired"]["auc"]["compared"], worse["paired"]["auc"]["difference"]) == (0.5, 0.375)


def test_references_may_name_images(tables):
    rows = [[f"scans/n{n}.nii.gz", name] for n, name in enumerate(TRUTH)]
    write_table(tables / "list.csv", ["image", "class"], rows)
    assert run(tables, references=str(tables / "list.csv"), class_column="class")["mean"]["auc"] == 14 / 16


def test_images_of_one_name_are_told_apart_by_their_folders(tables):
    rows = [[f"p{n // 2}/ct.nii.gz", name] for n, name in enumerate(TRUTH)][::2]
    write_table(tables / "list.csv", ["image", "class"], rows)
    table = (tables / "pred" / "predictions.csv").read_text(encoding="utf-8")
    lines = [
        table.splitlines()[0],
        *[f"p{n // 2}_ct,{line.partition(',')[2]}" for n, line in enumerate(table.splitlines()[1:])][::2],
    ]
    (tables / "pred" / "predictions.csv").write_text("\n".join(lines), encoding="utf-8")
    assert run(tables, references=str(tables / "list.csv"), class_column="class")["num_cases"] == 4
    write_table(tables / "list.csv", ["image", "class"], [*rows, rows[0]])
    with pytest.raises(DataError, match=r"list\.csv, line 6: .*p0/ct\.nii\.gz.* is there twice"):
        run(tables, references=str(tables / "list.csv"), class_column="class")


def test_cases_of_one_table_alone_are_a_warning(tables):
    write_predictions(tables / "pred" / "predictions.csv", [*PROBABILITIES, 0.5])
    with pytest.warns(UserWarning, match="predicted without a reference: n8"):
        found = run(tables)
    assert found["not_scored"]["without_reference"] == ["n8"]


def test_a_report_shows_scores_of_classes(tables):
    Run.create(tables / "run", command="finetune", settings={"task": "classification", "seed": 0}, inputs={})
    run(tables, out=str(tables / "run" / "scores.json"), baseline_column="diameter_mm")
    report([str(tables / "run")], str(tables / "r.html"))
    page = (tables / "r.html").read_text(encoding="utf-8")
    assert "Balanced accuracy" in page and "0.875" in page
    assert "the AUC of diameter_mm alone is" in page
    assert "<h2>Segmentations</h2>" not in page


def broken(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("labels.csv", "Malign", "Cystic", r"labels\.csv: case n4 is of the class 'Cystic'.*Benign, Malign"),
        ("labels.csv", "12.0", "large", "case n4 has 'large' where a number"),
        ("labels.csv", "n1,", "n0,", "'n0' is there twice"),
        ("labels.csv", "case,", "name,", "has no column id, case or image"),
        ("labels.csv", "diagnosis", "class", "has no column 'diagnosis'"),
        ("labels.csv", "\nn", "\nm", "no prediction is named like a reference"),
        ("pred/predictions.csv", "0.9", "1.9", "sum to 1"),
        ("pred/predictions.csv", "probability_Malign", "p_Malign", "probability_CLASS for each of two or more"),
        ("pred/predictions.csv", "p0,Benign", "p0,Other", "predicted 'Other'"),
        ("pred/predictions.csv", "n3,", "n3,,", r"predictions\.csv, line 5: 6 cells but 5 columns"),
    ],
)
def test_tables_that_cannot_be_used_say_what_is_wrong(tables, file, old, new, message):
    broken(tables / file, old, new)
    with pytest.raises(DataError, match=message):
        run(tables, baseline_column="diameter_mm")
    assert not (tables / "s.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lesions": True}, "lesions is True, which is a setting for label maps"),
        ({"missing": "worst"}, "missing is 'worst'"),
        ({"preset": "CC-CCII"}, "preset is 'CC-CCII', which is a setting for label maps"),
        ({"references": "labels"}, "name a .csv with a class column"),
        ({"num_bins": 0}, "num_bins is 0"),
        ({"compare": "folder"}, "compare is folder"),
    ],
)
def test_settings_that_cannot_work_are_refused(tables, settings, message):
    with pytest.raises(ConfigError, match=message):
        run(tables, **settings)


def test_the_diameter_of_a_nodule_alone_tells_most_of_them_apart(shared_data, tmp_path):
    labels = shared_data / "lidc_nodules" / "labels.csv"
    with open(labels, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    heads = ["id", "predicted", "probability_Benign", "probability_Malign"]
    write_table(tmp_path / "pred" / "predictions.csv", heads, [[row["case"], "Benign", 0.5, 0.5] for row in rows])
    found = run(tmp_path, references=str(labels), baseline_column="diameter_mm")
    assert found["baseline"]["baseline"]["auc"] == pytest.approx(0.92, abs=0.01)
    assert found["mean"]["auc"] == 0.5
    assert found["num_patients"] < found["num_cases"] == 700


def test_cases_without_a_class_or_probabilities_are_left_out(tables, capsys):
    text = (tables / "labels.csv").read_text()
    (tables / "labels.csv").write_text(text.replace("n1,Benign", "n1,"))
    text = (tables / "pred" / "predictions.csv").read_text()
    (tables / "pred" / "predictions.csv").write_text(text.replace("0.9,0.1", "nan,nan"))
    flags = ["--predictions", str(tables / "pred"), "--references", str(tables / "labels.csv")]
    flags += ["--out", str(tables / "s.json"), "--class_column", "diagnosis", "--num_bootstrap", "0"]
    assert main(["evaluate", *flags]) == 2
    found = json.loads((tables / "s.json").read_text())
    assert found["num_cases"] == 6
    assert [row["id"] for row in found["not_scored"]["unusable"]] == ["n0", "n1"]
    assert "Classification, 6 of 8 cases" in (tables / "s.md").read_text()
    assert "2 of 8 cases were left out, the others are done" in capsys.readouterr().out
    assert main(["evaluate", *flags, "--strict", "true"]) == 2
    assert "nothing is left out" in capsys.readouterr().err
