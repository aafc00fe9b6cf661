"""Steps that go wrong: skipped or taken twice within a budget, and beyond it nothing good is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mim3d.training.loop as loop_module
from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.core.run_folder import read_run
from mim3d.objective import Batch, StepOutput
from mim3d.training.checkpoint import read_checkpoint
from mim3d.training.meter import NonFiniteError
from tests.distributed.test_processes import start
from tests.training import toy_training
from tests.training.test_loop import assert_same_bits
from tests.training.toy_training import ToyObjective, ToySource, comparable, toy_run

FORWARD = ToyObjective.forward


def spoil(monkeypatch: pytest.MonkeyPatch, *samples: float, part: str = "penalty") -> None:
    """Make a part of the loss infinite at some samples."""

    def forward(self: ToyObjective, batch: Batch, progress: float) -> StepOutput:
        output = FORWARD(self, batch, progress)
        if not self.training or not bool(torch.isin(batch["number"], torch.tensor(samples)).any()):
            return output
        if part == "log":
            return StepOutput(output.loss, {**output.logs, "loss/penalty": torch.tensor(torch.nan)})
        # An infinite number that no gradient goes through.
        logs = {**output.logs, "loss/penalty": torch.tensor(torch.inf)}
        return StepOutput(output.loss + torch.inf, logs)

    monkeypatch.setattr(ToyObjective, "forward", forward)


def snapshots(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Weights, moments and step counts after each step of the runs to come."""
    take, after = loop_module._take_step, {}

    def watched(session: Any, model: Any, feed: Any, step: int) -> Batch:
        batch = take(session, model, feed, step)
        weights = {name: value.clone() for name, value in session.objective.named_parameters()}
        moments = enumerate(session.optimizer.optimizer.state.values())
        after[step] = weights | {f"{i}/{n}": v.clone() for i, state in moments for n, v in state.items()}
        return batch

    monkeypatch.setattr(loop_module, "_take_step", watched)
    return after


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_step_that_is_not_finite_leaves_weights_moments_and_counts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    spoil(monkeypatch, 17.0, 30.0)
    after = snapshots(monkeypatch)
    result, _, run = toy_run(tmp_path / "run", precision=precision, log_every=4, validating=False)
    assert result.finished
    for bad in (5, 8):
        assert_same_bits(after[bad], after[bad - 1])
    assert [name for name, value in after[12].items() if not value.isfinite().all()] == []
    still = {step for step in range(2, 13) if torch.equal(after[step]["head.weight"], after[step - 1]["head.weight"])}
    # Half precision begins with a scale at which the first steps overflow.
    assert still == {5, 8} or (precision == "16-mixed" and still >= {5, 8})
    if precision != "16-mixed":
        assert {float(value) for name, value in after[12].items() if name.endswith("/step")} == {10.0}
    lines = read_run(run.path).metrics
    assert [line.get("skipped_steps") for line in lines] == [None, 2, 2]
    assert all(isinstance(line["loss"], float) and isinstance(line["loss/penalty"], float) for line in lines)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert said == [
        f"warning: at step {step}, loss/penalty became infinite or not a number; the step was skipped "
        f"({number} of at most 3 bad steps)"
        for number, step in ((1, 5), (2, 8))
    ]


def test_means_leave_out_what_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fine = read_run(toy_run(tmp_path / "fine", log_every=1, max_steps=3, validating=False)[2].path).metrics
    spoil(monkeypatch, 11.0)
    lines = read_run(toy_run(tmp_path / "run", log_every=3, max_steps=3, validating=False)[2].path).metrics
    assert lines[0]["loss"] == pytest.approx((fine[0]["loss"] + fine[1]["loss"]) / 2)
    alone = read_run(toy_run(tmp_path / "alone", log_every=1, max_steps=3, validating=False)[2].path).metrics
    assert [line["loss"] is None for line in alone] == [False, False, True]


def test_what_is_only_logged_is_told_and_counted_but_its_step_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, plain, _ = toy_run(tmp_path / "plain", validating=False)
    spoil(monkeypatch, 17.0, part="log")
    _, objective, _ = toy_run(tmp_path / "run", validating=False)
    assert_same_bits(dict(objective.state_dict()), dict(plain.state_dict()))
    assert "the step does not depend on it and was taken (1 of at most 3" in capsys.readouterr().err


def test_one_bad_step_too_many_stops_with_the_last_good_state_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_bad_steps": 1, "log_every": 5, "checkpoint_every": 3, "validating": False}
    spoil(monkeypatch, 17.0, 25.0, 30.0)
    after = snapshots(monkeypatch)
    with pytest.raises(NonFiniteError) as error:
        toy_run(tmp_path / "run", **settings)
    message = str(error.value)
    assert "At step 7, loss/penalty became infinite" in message
    assert "Training stopped; the checkpoint of step 9 is kept" in message
    assert "Go on with a larger --max_bad_steps (mim3d pretrain --out" in message
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000009.pt")
    weights = {name: value for name, value in content["objective"].items() if name in after[9]}
    assert_same_bits(weights, {name: after[9][name] for name in weights})
    _, parts, run = toy_run(tmp_path / "run", **{**settings, "max_bad_steps": 3})
    _, whole, reference = toy_run(tmp_path / "whole", **{**settings, "max_bad_steps": 3})
    assert_same_bits(dict(parts.state_dict()), dict(whole.state_dict()))
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)


@pytest.mark.parametrize("bad", [(17.0, 25.0), (17.0, 47.0)])
def test_what_was_due_at_the_step_that_spent_the_budget_is_not_missing_from_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[float, ...]
) -> None:
    # At step 8, or at the last one, the meter is read, the score is the best one so far, and pictures are due.
    settings: dict[str, Any] = {"log_every": 4, "validate_every": 4, "pictures_every": 4, "checkpoint_every": 100}
    spoil(monkeypatch, *bad)
    whole, objective, reference = toy_run(tmp_path / "whole", **settings)
    with pytest.raises(NonFiniteError, match="Go on with a larger --max_bad_steps"):
        toy_run(tmp_path / "run", **settings, max_bad_steps=1)
    result, resumed, run = toy_run(tmp_path / "run", **settings)
    assert (result.step, result.best, result.finished) == (12, whole.best, True)
    assert_same_bits(dict(resumed.state_dict()), dict(objective.state_dict()))
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)
    assert read_run(run.path).pictures.keys() == read_run(reference.path).pictures.keys()


def test_a_run_that_spent_its_budget_is_not_resumed_with_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, 17.0, 25.0)
    settings: dict[str, Any] = {"max_bad_steps": 1, "log_every": 4, "validating": False}
    with pytest.raises(NonFiniteError):
        toy_run(tmp_path / "run", **settings)
    with pytest.raises(ConfigError, match=r"max_bad_steps is 1, but 2 steps .+ go on with --max_bad_steps 2 or more"):
        toy_run(tmp_path / "run", **settings)


def test_steps_skipped_since_the_last_line_are_not_forgotten_when_a_later_one_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"log_every": 10, "checkpoint_every": 100, "validating": False}
    spoil(monkeypatch, 17.0)
    _, _, reference = toy_run(tmp_path / "whole", **settings)
    monkeypatch.setattr(toy_training, "ToySource", UnforeseenSource)
    with pytest.raises(KeyError):
        toy_run(tmp_path / "run", **settings)
    monkeypatch.setattr(toy_training, "ToySource", ToySource)
    _, objective, run = toy_run(tmp_path / "run", **settings)
    assert objective.seen[0] == 6 * 4
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)


def test_the_budget_is_that_of_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, 1.0, 17.0)
    settings: dict[str, Any] = {"max_bad_steps": 1, "log_every": 1, "checkpoint_every": 1, "validating": False}
    result, _, _ = toy_run(tmp_path / "run", **settings, max_time_s=1e-6)
    assert result.step == 1
    with pytest.raises(NonFiniteError, match="At step 5"):
        toy_run(tmp_path / "run", **settings)


def test_settings_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bad_steps is -1"):
        toy_run(tmp_path / "run", max_bad_steps=-1)
    with pytest.raises(ConfigError, match="rank_timeout_s is 0"):
        toy_run(tmp_path / "run", rank_timeout_s=0)


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception, *calls: int) -> None:
    """Raise at some calls of the network."""
    count = 0

    def forward(self: ToyObjective, batch: Batch, progress: float) -> StepOutput:
        nonlocal count
        count += 1
        if count in calls:
            raise error
        return FORWARD(self, batch, progress)

    monkeypatch.setattr(ToyObjective, "forward", forward)


SETTINGS: dict[str, Any] = {"accumulation": 2, "log_every": 5, "checkpoint_every": 4, "validating": False}


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_a_step_that_runs_out_of_memory_is_taken_once_more_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    settings = {**SETTINGS, "precision": precision}
    _, whole, reference = toy_run(tmp_path / "whole", **settings)
    # The second micro-batch of steps 1 and 6.
    fail(monkeypatch, torch.OutOfMemoryError("CUDA out of memory."), 2, 14)
    _, objective, run = toy_run(tmp_path / "run", **settings)
    assert_same_bits(dict(objective.state_dict()), dict(whole.state_dict()))
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)
    assert "warning: step 6 ran out of memory and is taken once more (2 of at most 3" in capsys.readouterr().err


@pytest.mark.parametrize(("calls", "budget"), [((14, 15), 3), ((12,), 0)])
def test_a_step_that_runs_out_of_memory_for_good_leaves_the_state_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: tuple[int, ...], budget: int
) -> None:
    settings = {**SETTINGS, "max_bad_steps": budget}
    _, whole, reference = toy_run(tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        fail(patch, MemoryError(), *(call - 2 * (budget > 0) for call in calls))
        with pytest.raises(Mim3dError, match="ran out of memory; the checkpoint of step 5 is kept"):
            toy_run(tmp_path / "run", **settings)
    _, objective, run = toy_run(tmp_path / "run", **settings)
    assert objective.seen[0] == 5 * 8
    assert_same_bits(dict(objective.state_dict()), dict(whole.state_dict()))
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)


def test_memory_that_runs_out_while_weights_change_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = torch.optim.AdamW.step, 0

    def failing(self: torch.optim.AdamW, closure: Any = None) -> Any:
        nonlocal count
        count += 1
        if count == 6:
            raise MemoryError
        return step(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    with pytest.raises(Mim3dError, match="ran out of memory; the checkpoint of step 4 is kept"):
        toy_run(tmp_path / "run", **SETTINGS)
    assert count == 6


class UnforeseenSource(ToySource):
    """Fails at sample 25, of step 7, with an error that nobody has thought of."""

    def sample(self, number: int) -> Batch:
        if number == 25:
            raise KeyError(number)
        return super().sample(number)


class HungSource(ToySource):
    """Its reader never comes back from sample 44."""

    def sample(self, number: int) -> Batch:
        if number == 44:
            raise Mim3dError("A reading process (id 1) has been at scan 7 for 10 min.")
        return super().sample(number)


def test_data_that_stop_coming_leave_the_state_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy_training, "ToySource", HungSource)
    with pytest.raises(Mim3dError, match="has been at scan 7"):
        toy_run(tmp_path / "run", **SETTINGS)
    assert "step 6 failed; the state before it is saved (" in capsys.readouterr().err
    monkeypatch.undo()
    _, objective, _ = toy_run(tmp_path / "run", **SETTINGS)
    assert objective.seen[0] == 5 * 8


@pytest.mark.slow
def test_several_processes_skip_the_same_step(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bad_sample": 34.0, "dropout": 0.0, "validating": False}
    _, whole, reference = toy_run(tmp_path / "one", batch_size=4, log_every=4, **settings)
    process = start(tmp_path / "two", batch_size=2, **settings)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    assert "warning: at step 9, loss/penalty became infinite or not a number; the step was skipped" in errors
    weights = torch.load(tmp_path / "two" / "final.pt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    lines = [read_run(run).metrics for run in (tmp_path / "two", reference.path)]
    assert [[line.get("skipped_steps") for line in each] for each in lines] == [[None, None, 1]] * 2
