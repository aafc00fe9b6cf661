"""The table of a comparison from results written by hand: every number against a computation of its own."""

import csv
import json
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from scipy.stats import wilcoxon

from mim3d.commands.compare import compare
from mim3d.commands.report import report
from mim3d.core.errors import ConfigError
from mim3d.metrics.paired import holm

ARMS, AMOUNTS, SEEDS, FOLDS = ["scratch", "MiM"], ["10%", "100%"], [0, 1], [0, 1]
CURVES = {"scratch": [0.3, 0.5, 0.6], "MiM": [0.5, 0.6, 0.7]}


def dice(arm: str, labels: str, fold: int, seed: int, patient: int, label: str) -> float:
    rng = np.random.default_rng([ARMS.index(arm), AMOUNTS.index(labels), fold, seed, patient, len(label)])
    gain = 0.05 if arm == "MiM" and labels == "10%" else 0.0
    return 0.7 + gain + 0.02 * patient + float(rng.uniform(-0.05, 0.05))


def patient_name(fold: int, patient: int) -> str:
    return f"p{fold}{patient}"


def cell_row(arm: str, labels: str, fold: int, seed: int) -> dict[str, Any]:
    return {
        "kind": "finetune",
        "arm": arm,
        "fold": fold,
        "labels": labels,
        "num_patients": 2 if labels == "10%" else 20,
        "seed": seed,
        "settings": {"data": "data", "out": "out"},
        "needs": None,
        "test": "",
        "id": f"finetune_{arm}_{fold}_{labels.rstrip('%')}_{seed}",
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of two arms, two amounts, two seeds and two folds of four patients; MiM lacks one run at 100 %."""
    out = tmp_path / "compared"
    (out / "cells").mkdir(parents=True)
    cells = [cell_row(*key) for key in [(a, n, f, s) for a in ARMS for n in AMOUNTS for f in FOLDS for s in SEEDS]]
    for row in cells:
        key = row["arm"], row["labels"], row["fold"], row["seed"]
        content: dict[str, Any] = {"cell": row["id"], "status": "done", "task": "segmentation", "train_s": 60.0}
        content |= {"steps": 30, "step_s": 2.0, "memory_bytes": 2**30, "warnings": []}
        content["validation"] = [[10 * (n + 1), value] for n, value in enumerate(CURVES[row["arm"]])]
        content["cases"] = [
            {
                "id": f"c{row['fold']}{patient}",
                "labels": {name: {"dice": dice(*key, patient, name), "nsd": 0.5} for name in ("a", "bb")},
            }
            for patient in range(4)
        ]
        if key == ("MiM", "100%", 1, 1):
            content = {"cell": row["id"], "status": "failed", "reason": "the disk was full."}
        (out / "cells" / f"{row['id']}.json").write_text(json.dumps(content))
    plan = {
        "format": 1,
        "data": "data",
        "arms": [
            {"name": name, "kind": "from scratch", "method": None, "weights": None, "backbone": "hybrid_nano"}
            for name in ARMS
        ],
        "labels": AMOUNTS,
        "folds": FOLDS,
        "num_tested": 8,
        "patients": {f"c{fold}{patient}": patient_name(fold, patient) for fold in FOLDS for patient in range(4)},
        "notes": [],
        "cells": cells,
    }
    (out / "plan.json").write_text(json.dumps(plan))
    return out


def patients(arm: str, labels: str) -> np.ndarray:
    """Dice (P, S) by plain loops."""
    rows = [
        [mean(dice(arm, labels, fold, seed, patient, name) for name in ("a", "bb")) for seed in SEEDS]
        for fold in FOLDS
        for patient in range(4)
    ]
    found = np.array(rows)
    if (arm, labels) == ("MiM", "100%"):
        found[4:, 1] = np.nan
    return found


def test_every_number_of_the_table_is_that_of_a_plain_computation(folder: Path):
    compare(str(folder), table_only=True, num_bootstrap=2000)
    content = json.loads((folder / "comparison.json").read_text())
    rows = {(row["arm"], row["labels"]): row for row in content["rows"]}
    tests = []
    for labels in AMOUNTS:
        ours, theirs = patients("MiM", labels), patients("scratch", labels)
        row = rows["MiM", labels]
        assert row["mean"] == pytest.approx(np.nanmean(ours))
        assert row["difference"] == pytest.approx(np.nanmean(ours - theirs))
        assert rows["scratch", labels]["mean"] == pytest.approx(theirs.mean())
        tests.append(float(wilcoxon(np.nanmean(ours - theirs, axis=1)).pvalue))
        assert row["p"] == pytest.approx(tests[-1])
        rng, drawn = np.random.default_rng(1), []
        for _ in range(2000):
            known = (ours - theirs)[np.ix_(rng.integers(8, size=8), rng.integers(2, size=2))]
            drawn.append(np.nanmean(known) if not np.isnan(known).all() else np.nan)
        assert row["difference_ci95"] == pytest.approx(np.nanpercentile(drawn, [2.5, 97.5]), abs=0.006)
    assert [rows["MiM", labels]["p_holm"] for labels in AMOUNTS] == pytest.approx(holm(tests))
    assert rows["scratch", "10%"].get("p") is None


def test_steps_costs_and_misses_stand_in_the_table(folder: Path, tmp_path: Path):
    compare(str(folder), table_only=True, num_bootstrap=0)
    content = json.loads((folder / "comparison.json").read_text())
    assert [(row["arm"], row["steps_to_target"], row["target"]) for row in content["rows"][:2]] == [
        ("scratch", 30, pytest.approx(0.6)),
        ("MiM", 20, pytest.approx(0.6)),
    ]
    assert [(miss["arm"], miss["reason"]) for miss in content["misses"]] == [("MiM", "the disk was full.")]
    assert content["arms"][0]["finetune_train_s"] == 60 and content["arms"][0]["finetune_memory_bytes"] == 2**30
    with open(folder / "comparison.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["num_done"] for row in table] == ["4", "4", "4", "3"]
    page = Path(report([str(folder)], str(tmp_path / "page.html"))).read_text()
    assert "the disk was full." in page and "3 of 4" in page
    assert "1 comparison, " in page
    assert "the disk was full." in (folder / "comparison.tex").read_text()


def test_a_target_and_a_reference_are_taken_afterwards(folder: Path):
    compare(str(folder), table_only=True, num_bootstrap=0, target_dice=0.65, reference="MiM")
    content = json.loads((folder / "comparison.json").read_text())
    assert [row["steps_to_target"] for row in content["rows"][:2]] == [None, 30]
    assert content["reference"] == "MiM" and content["rows"][0]["difference"] < 0
    with pytest.raises(ConfigError, match="no arm 'MAE'"):
        compare(str(folder), table_only=True, reference="MAE")


@pytest.mark.parametrize("name", ["plan.json", "comparison.json"])
@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 1, "cells": [{"kind": "finetune", "id": ".."}]}']
)
def test_files_of_somebody_else_are_refused_in_one_sentence(folder: Path, tmp_path: Path, name: str, text: str):
    (folder / name).write_text(text)
    with pytest.raises(ConfigError, match=r"plan|comparison|cell"):
        if name == "plan.json":
            compare(str(folder), table_only=True)
        else:
            report([str(folder)], str(tmp_path / "page.html"))
