"""All folds by one command: complete runs, kept when it is run again, and a summary that adds up."""

import json
import shutil
from pathlib import Path
from statistics import fmean, stdev

import pytest

from mim3d.cli import main
from mim3d.commands.finetune import finetune
from mim3d.commands.folds import tune_folds
from mim3d.commands.tuning import Tuned
from mim3d.errors import ConfigError, DataError
from mim3d.weights import read_card
from tests.commands.conftest import BACKBONE, TASK

SETTINGS = {
    "task": TASK,
    "backbone": BACKBONE,
    "fold": "all",
    "num_folds": 3,
    "max_steps": 2,
    "batch_size": 2,
    "num_workers": 0,
    "intensity": None,
}


@pytest.fixture(scope="module")
def folds(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folds") / "all"
    return Path(finetune(str(ball_set), str(out), **SETTINGS))


def test_every_fold_is_a_complete_run_and_every_case_validates_once(folds: Path) -> None:
    held_out = []
    for fold in range(3):
        run = folds / f"fold_{fold}"
        assert read_card(run, ("segmenter",))["scores"]["dice"] >= 0
        held_out += [case["id"] for case in json.loads((run / "split.json").read_text())["val"]]
        assert not (run / "cache").exists()
    assert sorted(held_out) == [f"ball_{index}" for index in range(6)]
    assert (folds / "cache").is_dir()


def test_the_summary_holds_mean_and_deviation_over_the_folds(folds: Path) -> None:
    summary = json.loads((folds / "summary.json").read_text())
    scores = [read_card(folds / f"fold_{fold}", ("segmenter",))["scores"]["dice"] for fold in range(3)]
    assert [fold["scores"]["dice"] for fold in summary["folds"]] == scores
    assert summary["mean"]["dice"] == pytest.approx(fmean(scores))
    assert summary["standard_deviation"]["dice"] == pytest.approx(stdev(scores))


def test_all_folds_have_the_plan_of_the_first(folds: Path) -> None:
    configs = [json.loads((folds / f"fold_{fold}" / "manifest.json").read_text())["settings"] for fold in range(3)]
    assert all(config["intensity"] == configs[0]["intensity"] for config in configs)
    assert configs[0]["intensity"] is not None


def test_run_again_it_keeps_what_is_finished_and_makes_what_is_missing(folds: Path, capsys) -> None:
    lines = {fold: (folds / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in (0, 1)}
    shutil.rmtree(folds / "fold_2")
    assert main(["finetune", "--config", str(folds / "config.yaml"), "--out", str(folds), "--resume", "true"]) == 0
    told = capsys.readouterr().out
    assert "fold 2 of 3" in told and f"mim3d predict --weights {folds}/fold_*" in told
    assert "mean +- standard deviation" in told
    assert (folds / "fold_2" / "segmenter" / "model.safetensors").is_file()
    assert lines == {fold: (folds / f"fold_{fold}" / "metrics.jsonl").read_text() for fold in (0, 1)}


def test_existing_folds_are_refused_without_resume(ball_set: Path, folds: Path) -> None:
    with pytest.raises(ConfigError, match=r"fold_0 holds a run already; go on by --resume true"):
        finetune(str(ball_set), str(folds), **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_folds": 7}, DataError, "6 patients cannot be dealt out to 7 folds"),
        ({"num_folds": 1}, ConfigError, "num_folds >= 2"),
        ({"devices": 2}, ConfigError, "one device"),
        ({"train_cases": 5}, DataError, "there are 4 patients"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_fold(ball_set, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        finetune(str(ball_set), str(tmp_path / "out"), **{**SETTINGS, **changes})
    assert not (tmp_path / "out").exists()


def test_a_declared_split_is_no_set_of_folds(ball_set: Path, tmp_path: Path) -> None:
    rows = ["image,label,split"]
    for index in range(6):
        part = "val" if index == 0 else "train"
        rows.append(f"{ball_set}/imagesTr/ball_{index}.nii.gz,{ball_set}/labelsTr/ball_{index}.nii.gz,{part}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="all folds would be the same"):
        finetune(str(tmp_path / "list.csv"), str(tmp_path / "out"), **SETTINGS)


def arguments(data: Path, out: Path, **changes: object) -> dict[str, object]:
    fixed = {"data": str(data), "out": str(out), "num_folds": 3, "devices": 1, "num_nodes": 1, "resume": False}
    open_ = dict.fromkeys(("cache", "plan", "preset", "max_time"))
    return {**fixed, **open_, "task": "segmentation", "split_seed": 0, **changes}


def test_a_fold_that_stops_ends_the_session_and_later_folds_wait(ball_set: Path, tmp_path: Path, capsys) -> None:
    seen = []

    def stopped(given) -> Tuned:
        seen.append(given["fold"])
        return Tuned(Path(given["out"]), finished=given["fold"] == 0, step=1, scores={"dice": 0.5})

    tune_folds(arguments(ball_set, tmp_path / "out"), stopped)
    assert seen == [0, 1]
    assert "1 of 3 folds are finished; go on with: mim3d finetune --config" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["standard_deviation"] == {"dice": None}


def test_the_longest_time_is_that_of_all_folds_together(ball_set: Path, tmp_path: Path, monkeypatch) -> None:
    from mim3d.commands import folds as module

    now = iter([0.0, 0.0, 40.0, 61.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    seen = []

    def quick(given) -> Tuned:
        seen.append(given["max_time"])
        return Tuned(Path(given["out"]), finished=True, step=1, scores={})

    tune_folds(arguments(ball_set, tmp_path / "out", max_time="00:01:00"), quick)
    assert seen == ["00:01:00", "00:00:20"]
