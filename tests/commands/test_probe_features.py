"""Probes of tables of features: what is scored beside what, and tables of labels that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from mim3d.cli import main
from mim3d.commands.probe import probe
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.warned import LeakWarning
from mim3d.probing.heads import HEADS
from mim3d.workflows.shared.feature_tables import FeatureTable, write_table

SMALL = {"num_bootstrap": 100, "num_folds": 3}


@pytest.fixture(autouse=True)
def _short_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two settings of each head in place of all of its path."""
    for name, (answers, path) in list(HEADS.items()):
        monkeypatch.setitem(HEADS, name, (answers, path[1:8:4]))


def table_of(values: np.ndarray, names: list[str] | None = None, regions: list[str] | None = None) -> FeatureTable:
    ids = names or [f"scan_{place:02d}" for place in range(len(values))]
    return FeatureTable(
        keys={
            "id": ids,
            "patient": ids,
            "region": regions or ["scan"] * len(values),
            "image": [f"/data/{name}.nii.gz" for name in ids],
            "volume_ml": [1000.0] * len(values),
        },
        columns=tuple(f"mean_{place}" for place in range(values.shape[1])),
        values=values.astype(np.float32),
    )


@pytest.fixture
def made(tmp_path: Path) -> tuple[str, str, np.ndarray]:
    """Features of 30 scans of 15 patients that tell two classes apart, and their labels."""
    rng = np.random.default_rng(0)
    classes = np.arange(30) // 2 % 2
    values = rng.normal(size=(30, 6)) + 3 * classes[:, None]
    write_table(table_of(values), str(tmp_path / "f.parquet"), "parquet")
    rows = ["case,patient,diagnosis,diameter_mm,note"]
    rows += [
        f"scan_{n:02d},p{n // 2},{('benign', 'malign')[c]},{5 + 4 * c + 0.2 * n},text" for n, c in enumerate(classes)
    ]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    return str(tmp_path / "f.parquet"), str(tmp_path / "labels.csv"), values


def test_scans_of_a_table_that_its_weights_were_learned_from_are_said_again(made, tmp_path):
    features, labels, _ = made
    leak = {"kind": "leak", "text": "2 of 30 scans are in the pre-training data of runs/pre"}
    (tmp_path / "f.parquet.json").write_text(json.dumps({"warnings": [leak, {"kind": "other", "text": "no"}]}))
    with pytest.warns(LeakWarning, match="f.parquet: 2 of 30 scans are in the pre-training data"):
        content = probe(features=features, labels=labels, out=str(tmp_path / "probe.json"), **SMALL)
    assert [row["kind"] for row in content["warnings"]].count("leak") == 1
    assert not any(row["text"] == "no" for row in content["warnings"])


def test_classes_are_scored_beside_chance_majority_and_other_columns(made, tmp_path, capsys):
    features, labels, _ = made
    content = probe(features=features, labels=labels, out=str(tmp_path / "probe.json"), **SMALL)
    assert json.loads((tmp_path / "probe.json").read_text()) == content
    rows = {row["name"]: row for row in content["features"]}
    assert list(rows) == ["f.parquet", "diameter_mm alone", "majority"]
    assert content["classes"] == {"benign": 16, "malign": 14} and content["chance"]["balanced_accuracy"] == 0.5
    assert rows["f.parquet"]["linear"]["auc"] > 0.95
    assert rows["majority"]["linear"]["auc"] == 0.5 == rows["majority"]["linear"]["balanced_accuracy"]
    low, high = rows["f.parquet"]["linear"]["ci95"]["auc"]
    assert low <= rows["f.parquet"]["linear"]["auc"] <= high
    less = rows["f.parquet"]["linear"]["less"]["diameter_mm alone"]["auc"]["difference"]
    assert less == pytest.approx(rows["f.parquet"]["linear"]["auc"] - rows["diameter_mm alone"]["linear"]["auc"])
    assert content["num_patients_held_out"] == 15 and len(rows["f.parquet"]["linear"]["chosen"]) == 3
    assert "diameter_mm alone" in capsys.readouterr().out


def test_what_is_scored_has_no_say_in_what_is_learned(made, tmp_path):
    features, labels, values = made
    noise = np.random.default_rng(1).normal(size=values.shape)
    write_table(table_of(noise), str(tmp_path / "noise.npz"), "npz")
    content = probe(features=[features, str(tmp_path / "noise.npz")], labels=labels, **SMALL)
    first, second = content["features"][:2]
    assert second["linear"]["auc"] < 0.8 < first["linear"]["auc"]
    assert second["linear"]["less"]["f.parquet"]["auc"]["difference"] < 0


def test_numbers_are_fitted_and_held_against_their_mean(made, tmp_path):
    features, labels, _ = made
    content = probe(features=features, labels=labels, label_column="diameter_mm", **SMALL)
    assert content["target"] == "numbers"
    rows = {row["name"]: row for row in content["features"]}
    assert rows["f.parquet"]["linear"]["r2"] > 0 > rows["mean"]["linear"]["r2"] - 1e-6
    assert rows["mean"]["linear"]["pearson"] is None


def test_a_declared_test_part_is_scored_by_all_others(made, tmp_path):
    features, labels, _ = made
    lines = Path(labels).read_text().splitlines()
    parts = ["split", *(("train", "val", "test")[n // 2 % 3] for n in range(30))]
    (tmp_path / "parts.csv").write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)))
    content = probe(features=features, labels=str(tmp_path / "parts.csv"), **SMALL)
    assert content["num_folds"] == 1 and content["num_rows"] == {"all": 30, "held_out": 10}


def test_rows_without_labels_and_labels_without_rows_are_told(made, tmp_path):
    features, labels, _ = made
    lines = Path(labels).read_text().splitlines()
    lines[3] = "scan_02,p1,,6,text"
    (tmp_path / "part.csv").write_text("\n".join([*lines[:27], "other,p99,benign,3,text"]))
    with pytest.warns(UserWarning) as said:
        content = probe(features=features, labels=str(tmp_path / "part.csv"), **SMALL)
    text = " ".join(str(each.message) for each in said)
    assert f"4 rows of {features} are left out for want of a label in" in text and "scan_26" in text
    assert f"1 row of {features} is left out for want of a value in the column diagnosis of" in text
    assert "1 of 27 rows of" in text and "has no features in" in text
    assert content["num_rows"]["all"] == 25


def test_regions_are_matched_by_a_column_or_chosen_by_name(tmp_path):
    rng = np.random.default_rng(2)
    names = [f"s{place}" for place in range(12) for _ in range(2)]
    regions = ["liver", "spleen"] * 12
    truth = np.arange(24) % 4 // 2
    write_table(table_of(rng.normal(size=(24, 3)) + 4 * truth[:, None], names, regions), str(tmp_path / "f.csv"), "csv")
    rows = [f"{n},{r},{('a', 'b')[t]}" for n, r, t in zip(names, regions, truth, strict=True)]
    (tmp_path / "l.csv").write_text("\n".join(["id,region,class", *rows]))
    both = probe(features=str(tmp_path / "f.csv"), labels=str(tmp_path / "l.csv"), **SMALL)
    assert both["num_rows"]["all"] == 24 and both["num_patients_held_out"] == 12
    (tmp_path / "one.csv").write_text("\n".join(["id,class", *(f"s{n},{'ab'[n % 2]}" for n in range(12))]))
    with pytest.raises(DataError, match="s0 has several rows; say which by --region, one of liver, spleen"):
        probe(features=str(tmp_path / "f.csv"), labels=str(tmp_path / "one.csv"), **SMALL)
    with pytest.warns(UserWarning, match="rows of the region liver alone are used, not spleen"):
        one = probe(features=str(tmp_path / "f.csv"), labels=str(tmp_path / "one.csv"), region="liver", **SMALL)
    assert one["num_rows"]["all"] == 12 and one["features"][0]["linear"]["auc"] > 0.9


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ("name,class\na,b\n", "has no column id, case or image"),
        ("id,class\n", "holds no rows"),
        ("id,class\nx,a\ny,b\n", "no (prediction|row|features|label)"),
        ("id,age,sex\nscan_00,3,f\n", "which column holds the label"),
        ("id,class\nscan_00,a\nscan_01,a\n", "nothing to tell apart"),
        ("id,class\nscan_00,a\nscan_00,b\n", "scan_00 is there twice"),
        ("id,class\nscan_00,a\nscan_01,b\nscan_02,b\n", "the class 'a' has one patient"),
        ("id,class\nscan_00,a,7\n", "another number of cells than columns"),
    ],
)
def test_tables_of_labels_that_do_not_fit_are_refused(made, tmp_path, labels, sentence):
    (tmp_path / "bad.csv").write_text(labels)
    with pytest.raises(DataError, match=sentence):
        probe(features=made[0], labels=str(tmp_path / "bad.csv"), **SMALL)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "needs --weights and --data, or --features and --labels"),
        ({"weights": "W"}, "needs --data, or"),
        ({"features": "f.parquet"}, "needs both --features and --labels"),
        ({"features": "f.parquet", "labels": "l.csv", "data": "D"}, "data is a setting for encoders"),
        ({"features": "f.xls", "labels": "l.csv"}, r"f\.xls ends in none of \.parquet"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        probe(**settings)


def test_tables_of_features_that_cannot_be_read_are_refused(made, tmp_path, capsys):
    whole = Path(made[0]).read_bytes()
    (tmp_path / "half.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "other.csv").write_text("id,age\na,3\n")
    for name, sentence in (("half.parquet", "cannot be read as features"), ("other.csv", "no column 'patient'")):
        assert main(["probe", "--features", str(tmp_path / name), "--labels", made[1]]) == 2
        assert sentence in capsys.readouterr().err


def labels_of(path: Path, cells: list[str], column: str = "age", **more: list[str]) -> str:
    head = ",".join(["id", column, *more])
    rows = [",".join([f"scan_{n:02d}", cell, *(each[n] for each in more.values())]) for n, cell in enumerate(cells)]
    path.write_text("\n".join([head, *rows]))
    return str(path)


@pytest.mark.parametrize("missing", ["nan", "NaN", "NA", "n/a", "null", "<NA>"])
def test_cells_that_say_that_a_value_is_missing_are_no_class_and_no_number(made, tmp_path, missing):
    features, _, values = made
    for cells in ([f"{50 + 3 * row[0]:.3f}" for row in values], ["AB"[n % 2] for n in range(30)]):
        labels = labels_of(tmp_path / "l.csv", [missing, *cells[1:]])
        with pytest.warns(UserWarning, match="1 row of .* is left out for want of a value in the column age"):
            content = probe(features=features, labels=labels, out=str(tmp_path / "p.json"), overwrite=True, **SMALL)
        assert content["num_rows"]["all"] == 29
        assert content["target"] == ("numbers" if "." in cells[1] else "classes")


@pytest.mark.parametrize("odd", ["old", "inf", "1,5"])
def test_a_column_of_numbers_with_something_else_is_not_taken_for_classes(made, tmp_path, odd):
    features, _, values = made
    cells = [f'"{odd}"', *(f"{50 + 3 * row[0]:.3f}" for row in values[1:])]
    labels = labels_of(tmp_path / "l.csv", cells)
    with pytest.raises(
        DataError, match=rf"column age holds numbers, but '{odd}' in 1 of 30 rows; .*--label_kind classes"
    ):
        probe(features=features, labels=labels, **SMALL)


@pytest.mark.parametrize(("column", "bad", "said"), [("split", "tset", "train, val or test"), ("fold", "a", "a whole")])
def test_a_part_that_is_none_is_not_passed_over(made, tmp_path, column, bad, said):
    features, _, _ = made
    parts = {column: [bad, *(["train"] * 29 if column == "split" else ["0"] * 29)]}
    labels = labels_of(tmp_path / "l.csv", ["AB"[n // 2 % 2] for n in range(30)], "grade", **parts)
    with pytest.raises(DataError, match=f"column {column} says '{bad}' of scan_00; it must be {said}"):
        probe(features=features, labels=labels, label_column="grade", **SMALL)


def test_features_of_a_scan_that_are_there_twice_are_refused(made, tmp_path):
    names = [f"scan_{n:02d}" for n in (*range(29), 0)]
    write_table(table_of(made[2], names), str(tmp_path / "twice.csv"), "csv")
    with pytest.raises(DataError, match=r"twice\.csv: scan_00 has several rows of the region scan"):
        probe(features=str(tmp_path / "twice.csv"), labels=made[1], **SMALL)
