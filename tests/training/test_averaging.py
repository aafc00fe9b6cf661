"""The average of the weights: what it is, where it stands in for the weights, and that nothing else changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mim3d.training.loop as loop_module
from mim3d.core.errors import CheckpointError
from mim3d.core.run_folder import read_run
from mim3d.objective import Objective
from mim3d.training.checkpoint import load_best, read_checkpoint
from mim3d.training.memory import StepMemory
from mim3d.training.optim import WeightAverage
from mim3d.training.schedule import average_decay, make_schedule
from mim3d.training.settings import LoopSettings
from tests.training import toy_training
from tests.training.test_memory import CHAIN_SAMPLE, Chain
from tests.training.test_parts import CountReads
from tests.training.toy_training import OPTIM, ToyObjective, comparable, toy_run

AVERAGED = replace(OPTIM, ema_decay=0.9)


def test_its_decay_warms_up_and_ends_at_what_was_asked_for() -> None:
    assert [average_decay(0.9, step) for step in (1, 10, 80, 81, 500)] == [2 / 11, 11 / 20, 0.9, 0.9, 0.9]
    line = make_schedule(AVERAGED, effective_batch=4, max_steps=9).derivations[-1]
    assert line.startswith("weights averaged over about 10 steps (decay 0.9, reached after 80)")


def test_it_is_the_running_mean_of_all_weights_that_training_went_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went_through: list[torch.Tensor] = []

    def note(self: ToyObjective, progress: float) -> None:
        went_through.append(self.head.weight.detach().clone())

    monkeypatch.setattr(ToyObjective, "after_step", note)
    _, plain, _ = toy_run(tmp_path / "plain")
    weights, went_through[:] = list(went_through), []
    _, averaged, run = toy_run(tmp_path / "averaged", optim=AVERAGED)
    assert all(torch.equal(one, other) for one, other in zip(weights, went_through, strict=True))
    saved = read_checkpoint(run.checkpoints_dir / "step_00000012.pt")
    assert torch.equal(saved["objective"]["head.weight"], plain.head.weight)
    expected = initial_head(tmp_path)
    for step, weight in enumerate(weights, start=1):
        expected = torch.lerp(expected, weight, 1 - min(0.9, (1 + step) / (10 + step)))
    torch.testing.assert_close(saved["average"]["head.weight"], expected)
    assert torch.equal(averaged.head.weight, saved["average"]["head.weight"])


def initial_head(tmp_path: Path) -> torch.Tensor:
    """The weights of the head before the first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda self: None)
        return toy_run(tmp_path / "still", max_steps=1)[1].head.weight.detach().clone()


@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back_bit_for_bit_also_after_an_error(fails: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    average = WeightAverage(module, 0.9)
    for parameter in module.parameters():
        parameter.data.normal_()
    average.update(1)
    before = {name: value.clone() for name, value in module.state_dict().items()}

    def look() -> None:
        with average.in_place():
            assert torch.equal(module[0].weight, average.state_dict()["0.weight"])
            assert not torch.equal(module[0].weight, before["0.weight"])
            assert torch.equal(module[1].running_var, before["1.running_var"])
            if fails:
                raise RuntimeError("on the way")

    if fails:
        with pytest.raises(RuntimeError, match="on the way"):
            look()
    else:
        look()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_it_is_kept_in_float32_whatever_the_weights_are() -> None:
    layer = nn.Linear(3, 3).bfloat16()
    average = WeightAverage(layer, 0.999)
    before = layer.weight.detach().clone()
    layer.weight.data.add_(1e-2)
    average.update(1000)
    kept = average.state_dict()["weight"]
    assert kept.dtype == torch.float32 and not torch.equal(kept, before.float())
    with average.in_place():
        assert layer.weight.dtype == torch.bfloat16


def test_validation_pictures_and_export_see_the_average_and_training_does_not(tmp_path: Path) -> None:
    seen: dict[str, list[torch.Tensor]] = {"score": [], "export": []}

    def score(objective: Objective) -> dict[str, float]:
        seen["score"].append(objective.head.weight.detach().clone())
        return {"dice": float(len(seen["score"]))}

    def export(objective: Objective, step: int) -> None:
        seen["export"].append(objective.head.weight.detach().clone())

    _, plain, _ = toy_run(tmp_path / "plain", validating=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_training, "toy_score", score)
        _, trained, run = toy_run(tmp_path / "run", optim=AVERAGED, pictures_every=4, on_checkpoint=export)
    saved = read_checkpoint(run.checkpoints_dir / "step_00000012.pt")
    assert torch.equal(saved["objective"]["head.weight"], plain.head.weight)
    for kind in ("score", "export"):
        assert torch.equal(seen[kind][-1], saved["average"]["head.weight"])
    assert torch.equal(trained.head.weight, saved["average"]["head.weight"])
    best = ToyObjective()
    assert (load_best(run.checkpoints_dir, best) or {})["step"] == 12
    assert torch.equal(best.head.weight, saved["average"]["head.weight"])


SETTINGS: dict[str, Any] = {
    "max_steps": 24,
    "log_every": 5,
    "checkpoint_every": 4,
    "validate_every": 6,
    "optim": AVERAGED,
}


def test_a_run_resumes_with_its_average_to_the_same_bits(tmp_path: Path) -> None:
    _, whole, reference = toy_run(tmp_path / "whole", **SETTINGS)
    toy_run(tmp_path / "parts", **SETTINGS)
    checkpoints = tmp_path / "parts" / "checkpoints"
    (checkpoints / "step_00000024.pt").unlink()
    _, parts, run = toy_run(tmp_path / "parts", **SETTINGS)
    assert parts.seen == [float(sample) for sample in range(80, 96)]
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)
    _, again, _ = toy_run(tmp_path / "parts", **SETTINGS)
    assert again.seen == []
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())


def test_a_checkpoint_without_the_average_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    toy_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match="resume with the ema_decay the run was started with"):
        toy_run(tmp_path / "run", optim=AVERAGED)


def test_a_step_that_averages_never_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step, reads = loop_module._take_step, CountReads()

    def counted(*args: Any) -> Any:
        with reads:
            return take_step(*args)

    monkeypatch.setattr(loop_module, "_take_step", counted)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    toy_run(tmp_path / "run", optim=AVERAGED)
    assert reads.count == 0


def test_its_memory_is_foreseen() -> None:
    loop = LoopSettings(max_steps=10, accelerator="cpu")
    needs = [StepMemory(Chain, CHAIN_SAMPLE, loop, optim).need(2, 1) for optim in (OPTIM, AVERAGED)]
    trained = sum(parameter.numel() for parameter in Chain().parameters())
    assert needs[1].optimiser - needs[0].optimiser == 4 * trained
    assert needs[1].activations == needs[0].activations
