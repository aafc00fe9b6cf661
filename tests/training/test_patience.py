"""Training that ends when validation stops getting better."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run, read_run
from mim3d.objective import Objective
from mim3d.training.checkpoint import read_checkpoint
from mim3d.training.settings import TrainResult
from tests.training import toy_training
from tests.training.toy_training import ToyObjective, comparable, toy_run

#: Scores of the validations at steps 2, 4, 6, ...: the best one is the second, and one is not a number.
SCORES = [0.1, 0.5, 0.5, float("nan"), 0.3, 0.6, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The steps of validations, which give the next of SCORES each; the number of them may be changed."""
    done: list[int] = []

    def score(objective: Objective) -> dict[str, float]:
        done.append(len(done))
        return {"dice": SCORES[done[-1]]}

    monkeypatch.setattr(toy_training, "toy_score", score)
    yield done


def run_toy(out: Path, patience: int | None, **settings: Any) -> tuple[TrainResult, ToyObjective, Run]:
    return toy_run(
        out, **{"max_steps": 24, "validate_every": 2, "checkpoint_every": 100, "patience": patience, **settings}
    )


def test_it_ends_after_that_many_validations_without_a_better_one(
    tmp_path: Path, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    result, _, run = run_toy(tmp_path / "run", 3)
    assert (result.step, result.finished) == (10, True)
    assert result.reason == "no better dice in 3 validations, after step 10"
    assert result.best == {"step": 4, "dice": 0.5}
    assert [path.name for path in sorted(run.checkpoints_dir.iterdir())] == ["best_00000004.pt", "step_00000010.pt"]
    told = capsys.readouterr().err
    assert "no better dice in 3 validations" in told and "To go on" not in told


def test_a_better_score_starts_the_count_anew(tmp_path: Path, scored: list[int]) -> None:
    result, _, _ = run_toy(tmp_path / "run", 4)
    assert result.best == {"step": 12, "dice": 0.6}
    assert result.step == 20


def test_without_patience_all_steps_are_done(tmp_path: Path, scored: list[int]) -> None:
    result, _, _ = run_toy(tmp_path / "run", None)
    assert (result.step, result.finished, len(scored)) == (24, True, 12)
    assert result.reason == "all 24 steps are done"


def test_a_run_that_ended_so_resumes_to_nothing(tmp_path: Path, scored: list[int]) -> None:
    _, first, _ = run_toy(tmp_path / "run", 3)
    result, again, _ = run_toy(tmp_path / "run", 3)
    assert (result.step, result.finished, again.seen) == (10, True, [])
    assert result.reason == "no better dice in 3 validations, after step 10"
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in again.state_dict().items())
    assert len(scored) == 5


def test_the_count_goes_on_in_a_run_that_was_stopped(tmp_path: Path, scored: list[int]) -> None:
    whole, _, reference = run_toy(tmp_path / "whole", 3)
    scored.clear()
    sessions = 0
    while True:
        result, _, run = run_toy(tmp_path / "parts", 3, max_time_s=0.01, wait_s=0.006)
        sessions += 1
        if result.finished:
            break
    assert sessions > 2
    assert (result.step, result.reason, result.best) == (whole.step, whole.reason, whole.best)
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)


def test_more_patience_goes_on_as_if_it_had_been_there_from_the_beginning(tmp_path: Path, scored: list[int]) -> None:
    _, whole, _ = run_toy(tmp_path / "whole", 4)
    scored.clear()
    run_toy(tmp_path / "run", 3)
    result, trained, run = run_toy(tmp_path / "run", 4)
    assert result.step == 20
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in trained.state_dict().items())
    assert read_checkpoint(run.checkpoints_dir / "step_00000020.pt")["stale"] == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"patience": -1}, "patience is -1; it must be at least 1"), ({"validating": False}, "no score is validated by")],
)
def test_patience_that_cannot_work_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        toy_run(tmp_path / "run", **{"patience": 2, **settings})


def test_zero_switches_off_what_is_done_every_so_many_steps(tmp_path: Path) -> None:
    off = dict.fromkeys(("log_every", "checkpoint_every", "validate_every", "patience", "pictures_every"), 0)
    _, trained, run = toy_run(tmp_path / "off", max_steps=6, **off)
    _, usual, every = toy_run(tmp_path / "usual", max_steps=6, log_every=2, checkpoint_every=2, validate_every=2)
    assert all(torch.equal(value, usual.state_dict()[name]) for name, value in trained.state_dict().items())
    assert [line["step"] for line in read_run(run.path).metrics if "loss" in line] == [6]
    assert [line["step"] for line in read_run(run.path).metrics if "val/dice" in line] == [6]
    assert [path.name for path in run.checkpoints_dir.glob("step_*")] == ["step_00000006.pt"]
    assert not run.pictures_dir.exists()
    assert len([line for line in read_run(every.path).metrics if "loss" in line]) == 3


def test_scores_that_are_not_defined_choose_no_weights_and_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy_training, "toy_score", lambda objective: {"dice": math.nan})
    result, _, run = run_toy(tmp_path / "run", 3)
    assert (result.step, result.best) == (24, None)
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step_00000024.pt"]
