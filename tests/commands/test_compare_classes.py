"""Comparisons of classifiers: scored by AUC, tested by DeLong's paired test, and whole where a run is missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim3d.commands.compare import compare
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.warned import LeakWarning
from mim3d.datasets.cases import Case
from mim3d.tasks import create_task
from mim3d.workflows.compare.plan import read_plan
from mim3d.workflows.compare.subsets import Amount, FoldPart, require_distinct
from tests.commands.conftest import BACKBONE
from tests.commands.test_classify import TASK, write_set

SETTINGS: dict[str, Any] = {
    "arms": ("scratch", {"name": "wider", "backbone": {**BACKBONE, "widths": [8, 24]}}),
    "seeds": (0, 1),
    "backbone": BACKBONE,
    "finetune": {
        "task": TASK,
        "precision": "32-true",
        "intensity": {"kind": "zscore"},
        "optim": {"learning_rate": 1e-2},
        "batch_size": 2,
        "num_workers": 0,
        "validate_every": 1,
    },
    "finetune_steps": 2,
    "folds": (0,),
    "num_folds": 2,
}


def content(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "comparison.json").read_text())
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of eight patients with two scans each."""
    folder = tmp_path_factory.mktemp("classes")
    data = write_set(folder / "data", num_cases=16, noise=150.0)
    compare(str(folder / "out"), data=str(data), num_bootstrap=200, **SETTINGS)
    return folder / "out"


def auc(cases: list[dict[str, Any]]) -> float:
    sides = [[case["probabilities"][1] for case in cases if case["true_class"] == name] for name in ("bright", "dark")]
    return float(np.mean([(high > low) + (high == low) / 2 for high in sides[1] for low in sides[0]]))


def test_classes_are_scored_by_auc_with_intervals_differences_and_p(compared: Path):
    found = content(compared)
    assert found["score"] == "auc" and [row["num_done"] for row in found["rows"]] == [2, 2]
    results = [json.loads(path.read_text()) for path in sorted((compared / "cells").glob("finetune*.json"))]
    means = {
        arm: np.mean([auc(result["cases"]) for result in results if result["arm"] == arm])
        for arm in ("scratch", "wider")
    }
    first, second = found["rows"]
    assert (first["mean"], second["mean"]) == pytest.approx((means["scratch"], means["wider"]))
    assert second["difference"] == pytest.approx(means["wider"] - means["scratch"])
    assert 0 < second["p"] == second["p_holm"] <= 1
    assert second["ci95"] and second["difference_ci95"]
    table = (compared / "comparison.md").read_text()
    assert "AUC of 4 tested patients" in table and "DeLong's paired test" in table and "Wilcoxon" not in table


def test_a_missing_run_of_a_classifier_leaves_the_table_whole(compared: Path):
    missing = next((compared / "cells").glob("finetune_wider*seed1*.json"))
    kept = missing.read_text()
    missing.unlink()
    compare(str(compared), table_only=True, num_bootstrap=0)
    first, second = content(compared)["rows"]
    missing.write_text(kept)
    assert (first["num_done"], second["num_done"]) == (2, 1) and second["ci95"] is None
    paths = [next((compared / "cells").glob(f"finetune_{arm}*seed0*.json")) for arm in ("wider", "scratch")]
    wider, scratch = (auc(json.loads(path.read_text())["cases"]) for path in paths)
    assert second["difference"] == pytest.approx(wider - scratch)


def test_labels_that_lack_a_class_are_refused():
    def part(*names: str) -> tuple[Case, ...]:
        ids = [f"{name}_{place}_{names}" for place, name in enumerate(names)]
        rows = zip(ids, names, strict=True)
        return tuple(Case(id=i, images=(i,), label=i, patient=i, class_name=name) for i, name in rows)

    fold = FoldPart(number=1, learning=part("dark", "bright"), choosing=part("dark"), test=part("grey", "dark"))
    amounts, task = [Amount.of("100%")], create_task(TASK)
    with pytest.raises(DataError, match="labels 100%, fold 1, seed 0: class grey is not among the cases to learn from"):
        require_distinct([fold], amounts, [0], task)
    require_distinct([replace(fold, test=part("dark", "bright")), replace(fold, test=part("dark"))], amounts, [0], task)
    with pytest.raises(DataError, match="tested cases of each fold are of one class, and AUC ranks cases of two"):
        require_distinct([replace(fold, test=part(name)) for name in ("dark", "bright")], amounts, [0], task)


def test_a_table_without_results_has_the_score_of_its_task(compared: Path, tmp_path: Path):
    copy = shutil.copytree(compared, tmp_path / "copy", ignore=shutil.ignore_patterns("cells", "runs"))
    compare(str(copy), table_only=True)
    assert content(copy)["score"] == "auc" and content(copy)["misses"]


def test_where_those_that_choose_are_of_one_class_the_last_weights_are_tested_and_a_note_says_so(tmp_path: Path):
    data = write_set(tmp_path / "data", num_cases=32, noise=150.0)
    # Of the eight patients of a fold two choose, and one of them with half the labels.
    settings = {**SETTINGS, "seeds": (0,), "folds": None, "labels": ("50%", "100%")}
    compare(str(tmp_path / "out"), data=str(data), num_bootstrap=0, **settings)
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("finetune*50pct*.json")]
    assert [(result["step"], result["validation"]) for result in results] == [(2, [])] * 4
    found = content(tmp_path / "out")
    of_half, of_all = found["rows"][:2], found["rows"][2:]
    assert [(row["target"], row["steps_to_target"]) for row in of_half] == [(None, None)] * 2
    assert of_all[0]["target"] is not None and of_all[0]["mean"] is not None
    # Both folds hold two patients of each class, so that their means are that of all their pairs.
    scratch = [auc(result["cases"]) for result in results if result["arm"] == "scratch"]
    assert of_half[0]["mean"] == pytest.approx(np.mean(scratch))
    (note,) = [note for note in found["notes"] if note.startswith("labels")]
    assert note.startswith("labels 50%: in 4 of 4 runs all cases that choose are of one class")
    assert "the best of scratch: – (50%)" in (tmp_path / "out" / "comparison.md").read_text()


def test_patients_whom_a_declared_split_tests_and_learns_from_are_noted(tmp_path: Path):
    data = write_set(tmp_path / "data", noise=150.0)
    head, *rows = data.read_text().splitlines()
    parts = ["val" if place in (0, 1, 2, 3, 4) else "train" for place in range(len(rows))]
    data.write_text("\n".join([f"{head},split", *map(",".join, zip(rows, parts, strict=True))]) + "\n")
    with pytest.warns(LeakWarning, match="1 patient into both train and val"):
        compare(str(tmp_path / "out"), data=str(data), dry_run=True, **{**SETTINGS, "folds": None})
    (note,) = read_plan(tmp_path / "out")["notes"]
    assert note.startswith("fold 0: the declared split has scans of 1 patient both tested and learned from (patient_2)")


def frozen(**finetune: Any) -> dict[str, Any]:
    task = {**TASK, "freeze_encoder": True}
    return {**SETTINGS, "seeds": (0,), "finetune": {**SETTINGS["finetune"], "task": task, **finetune}}


def test_encoders_that_never_learn_are_compared_from_scratch_too(tmp_path: Path):
    data = str(write_set(tmp_path / "data", num_cases=16, noise=150.0))
    compare(str(tmp_path / "out"), data=data, num_bootstrap=0, **frozen())
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert [(result["status"], result["schedule"]) for result in results] == [("done", "frozen")] * 2
    with pytest.raises(ConfigError, match="arm scratch: schedule is default, but freeze_encoder"):
        compare(str(tmp_path / "other"), data=data, **frozen(schedule="default"))
    assert not (tmp_path / "other" / "runs").exists()


def test_patience_does_not_keep_a_comparison_from_being_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = str(write_set(tmp_path / "data", num_cases=16, noise=150.0))
    finetune = {**SETTINGS["finetune"], "patience": 1}
    compare(str(tmp_path / "out"), data=data, dry_run=True, **{**SETTINGS, "finetune": finetune})
    assert "4 cells" in capsys.readouterr().out


def test_all_declared_folds_are_tested_whatever_their_numbers_and_one_of_one_class_is_noted(tmp_path: Path):
    data = write_set(tmp_path / "data", num_cases=20, noise=150.0)
    head, *rows = data.read_text().splitlines()
    # By patient, whose classes alternate.
    numbers = ["2233272773"[place // 2] for place in range(len(rows))]
    data.write_text("\n".join([f"{head},fold", *map(",".join, zip(rows, numbers, strict=True))]) + "\n")
    settings = {**SETTINGS, "folds": None, "num_folds": 3, "seeds": (0,)}
    compare(str(tmp_path / "out"), data=str(data), dry_run=True, **settings)
    assert read_plan(tmp_path / "out")["folds"] == [2, 3, 7]
    with pytest.raises(ConfigError, match="folds has 0, but there are the folds 2, 3, 7"):
        compare(str(tmp_path / "out"), data=str(data), dry_run=True, **{**settings, "folds": (0,)})
    alone = ["2233227273"[place // 2] for place in range(len(rows))]
    data.write_text("\n".join([f"{head},fold", *map(",".join, zip(rows, alone, strict=True))]) + "\n")
    compare(str(tmp_path / "other"), data=str(data), dry_run=True, **settings)
    (note,) = read_plan(tmp_path / "other")["notes"]
    assert note == "fold 7: all tested cases are of class dark, so that it adds nothing to the AUC."
