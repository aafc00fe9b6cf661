"""The training loop on a toy: what it logs, averages, keeps and refuses."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_run
from mim3d.objective import Objective
from mim3d.training.checkpoint import load_best
from mim3d.training.meter import NonFiniteError
from mim3d.training.schedule import Optimisation
from tests.training.toy_training import OPTIM, ToyObjective, toy_run


def weights_of(objective: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in objective.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_metrics_hold_the_loss_its_terms_the_schedule_and_the_speed(tmp_path: Path) -> None:
    result, objective, run = toy_run(tmp_path / "run", log_every=5)
    assert (result.step, result.finished, result.reason) == (12, True, "all 12 steps are done")
    lines = [line for line in read_run(run.path).metrics if "loss" in line]
    assert [line["step"] for line in lines] == [5, 10, 12]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss/error"] + line["loss/penalty"])
        assert line.keys() >= {"grad_norm", "learning_rate", "time_s", "samples_per_s", "data_wait_ratio"}
        assert 0 <= line["data_wait_ratio"] <= 1
    rates = [0.01 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 9)) for step in (5, 10, 12)]
    assert [line["learning_rate"] for line in lines] == pytest.approx(rates)
    assert objective.seen == [float(number) for number in range(48)]


def test_a_logged_loss_is_the_mean_over_all_steps_since_the_last_line(tmp_path: Path) -> None:
    fine = read_run(toy_run(tmp_path / "fine", log_every=1, validating=False)[2].path).metrics
    coarse = read_run(toy_run(tmp_path / "coarse", log_every=4, validating=False)[2].path).metrics
    for index, line in enumerate(coarse):
        mean = np.mean([each["loss"] for each in fine[4 * index : 4 * index + 4]])
        assert line["loss"] == pytest.approx(mean, rel=1e-6)


def test_accumulation_averages_so_that_four_of_one_equal_one_of_four(tmp_path: Path) -> None:
    base = Optimisation(base_learning_rate=0.02, reference_batch=8, clip_norm=0.5)
    shared: dict[str, Any] = {"dropout": 0.0, "optim": base, "validating": False}
    _, whole, run = toy_run(tmp_path / "whole", batch_size=4, accumulation=1, **shared)
    _, pieces, _ = toy_run(tmp_path / "pieces", batch_size=1, accumulation=4, **shared)
    assert whole.seen == pieces.seen
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    derived = read_run(run.path).manifest["derived"]
    assert (derived["effective_batch"], derived["learning_rate"]) == (4, 0.01)


def test_derived_numbers_are_printed_with_their_derivation_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path / "short", batch_size=2, accumulation=3)
    short = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in short[:2]] == ["training", "computing"] and "step 10/12" in short[2]
    _, _, run = toy_run(tmp_path / "run", batch_size=2, accumulation=3, verbose=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == short[:2]
    lines = lines[2:]
    assert lines[0] == "effective batch 6 = 2 samples x 3 micro-batches x 1 process"
    assert any(line.startswith("steps per epoch 3.333 = 20 samples / 6") for line in lines)
    first_step = next(index for index, line in enumerate(lines) if line.startswith("step 10/12"))
    derivations = read_run(run.path).manifest["derived"]["derivations"]
    assert lines[: len(derivations)] == derivations
    assert first_step > len(derivations) - 1


def test_validation_is_logged_and_its_best_weights_are_kept(tmp_path: Path) -> None:
    at_checkpoint: dict[int, dict[str, torch.Tensor]] = {}

    def remember(objective: Objective, step: int) -> None:
        at_checkpoint[step] = weights_of(objective)

    settings = {"validate_every": 2, "checkpoint_every": 2, "max_steps": 10}
    result, objective, run = toy_run(tmp_path / "run", on_checkpoint=remember, **settings)
    scores = {line["step"]: line["val/dice"] for line in read_run(run.path).metrics if "val/dice" in line}
    assert list(scores) == [2, 4, 6, 8, 10] == list(at_checkpoint)
    best_step = max(scores, key=lambda step: scores[step])
    assert result.best is not None
    assert (result.best["step"], result.best["dice"]) == (best_step, scores[best_step])
    fresh = ToyObjective()
    best = load_best(run.checkpoints_dir, fresh)
    assert best == {"step": best_step, "values": {"dice": scores[best_step], "other": 1.0}}
    assert_same_bits(weights_of(fresh), at_checkpoint[best_step])
    assert objective.training


def test_neither_validation_nor_pictures_nor_logging_change_what_is_learned(tmp_path: Path) -> None:
    _, plain, _ = toy_run(tmp_path / "plain", validating=False, log_every=100)
    _, busy, run = toy_run(tmp_path / "busy", validate_every=1, pictures_every=5, log_every=1, checkpoint_every=1)
    assert_same_bits(weights_of(plain), weights_of(busy))
    assert list(read_run(run.path).pictures) == [5, 10, 12]
    with np.load(read_run(run.path).pictures[5]) as pictures:
        assert pictures["toy/input"].shape == (4, 6, 1)


def test_best_by_must_be_one_of_the_scores(tmp_path: Path) -> None:
    from mim3d.core.run_folder import Run
    from mim3d.training.loop import train
    from mim3d.training.settings import LoopSettings
    from tests.training.toy_training import ToySource, toy_score

    run = Run.create(tmp_path / "run", command="finetune", settings={}, inputs={})
    loop = LoopSettings(max_steps=1, accelerator="cpu")
    with pytest.raises(ConfigError, match="best_by is 'dise', but validation gives dice, other"):
        train(ToyObjective(), ToySource(), run=run, loop=loop, optim=OPTIM, validate=toy_score, best_by="dise")
    with pytest.raises(ConfigError, match="there is no validation"):
        train(ToyObjective(), ToySource(), run=run, loop=loop, optim=OPTIM, best_by="dice")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_trains_and_keeps_targets_in_full_precision(tmp_path: Path, precision: str) -> None:
    result, _, run = toy_run(tmp_path / "run", precision=precision, log_every=4, max_steps=40)
    assert result.finished
    lines = [line for line in read_run(run.path).metrics if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("skipped_ratio" in lines[0]) == (precision == "16-mixed")
    # Numbers above 256 have no exact bfloat16: they arrive whole only if the inputs were left alone.
    _, objective, _ = toy_run(tmp_path / "long", precision=precision, batch_size=64, max_steps=10)
    assert objective.seen == [float(number) for number in range(640)]
    assert all(parameter.dtype == torch.float32 for parameter in objective.parameters())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_loss_that_is_not_finite_stops_with_step_term_rate_and_remedy(tmp_path: Path, precision: str) -> None:
    settings: dict[str, Any] = {"bad_sample": 30.0, "max_bad_steps": 0, "checkpoint_every": 3, "precision": precision}
    with pytest.raises(NonFiniteError) as error:
        toy_run(tmp_path / "run", **settings)
    message = str(error.value)
    assert "At step 8, loss/penalty became infinite or not a number" in message
    assert "the checkpoint of step 6 is kept" in message
    assert "lower learning rate (it was 0.00587" in message
    assert ("precision 32-true" in message) == (precision != "32-true")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000003.pt", "step_00000006.pt"]
    assert [line["step"] for line in read_run(tmp_path / "run").metrics] == []


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(self: ToyObjective, progress: float) -> None:
        if progress > 0.3:
            self.head.weight.fill_(torch.nan)

    monkeypatch.setattr(ToyObjective, "after_step", explode)
    with pytest.raises(NonFiniteError, match="At step 5, a weight became infinite or not a number"):
        toy_run(tmp_path / "run", checkpoint_every=1)
    for path in (tmp_path / "run" / "checkpoints").glob("step_*.pt"):
        content = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in content["objective"].values())


def test_finished_runs_leave_readable_json_everywhere(tmp_path: Path) -> None:
    _, _, run = toy_run(tmp_path / "run")
    for line in run.metrics_path.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_steps": 0}, "max_steps is 0"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"max_time_s": 0.0}, "max_time_s is 0.0"),
        ({"precision": "16"}, "precision is '16'; use one of auto, 32-true, bf16-mixed, 16-mixed"),
        ({"accelerator": "tpu"}, "accelerator is 'tpu'"),
        ({"devices": 0}, "devices is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_work(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        toy_run(tmp_path / "run", **settings)
