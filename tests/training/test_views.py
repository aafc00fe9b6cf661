"""What objectives draw and keep beside gradients: views on the device, a momentum teacher, the same again and again.

As a script, which a test starts in two processes: ``python test_views.py OUT``.
"""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mim3d.core.run_folder import Run, read_run
from mim3d.objective import Batch, Objective, StepContext, StepOutput
from mim3d.training.checkpoint import read_checkpoint
from mim3d.training.launch import seed_step
from mim3d.training.loop import train
from mim3d.training.memory import StepMemory
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.distributed.launching import ended, start
from tests.killing import killed_after
from tests.training.toy_training import FEATURES, ToyBackbone, ToyEncoder, ToySource, comparable

CPU = torch.device("cpu")
MOMENTUM = 0.75


class TwoViews(Objective):
    """A student that predicts from one noisy view what its momentum teacher sees in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ToyEncoder(ToyBackbone())
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Linear(8, 8)
        self.drop = nn.Dropout(0.2)
        self.noise: list[Tensor] = []

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        generator = self.context.generator(batch["x"].device)
        one, other = (
            batch["x"] + torch.randn(batch["x"].shape, generator=generator, device=batch["x"].device) for _ in range(2)
        )
        self.noise.append(one.detach() - batch["x"])
        predicted = self.head(self.drop(self.encoder.tokens(one)))
        loss = (predicted - self.teacher.tokens(other)).square().mean()
        return StepOutput(loss, {"loss/views": loss.detach()})

    def after_step(self, progress: float) -> None:
        for kept, new in zip(self.teacher.parameters(), self.encoder.parameters(), strict=True):
            kept.lerp_(new, 1 - MOMENTUM)


def learn(out: Path, **settings: Any) -> tuple[TwoViews, list[dict[str, Any]]]:
    run = Run.create(out, command="pretrain", settings={"seed": 0}, inputs={"data": "1234"}, resume=True)
    seed_step(0, 0)
    objective = TwoViews()
    loop = LoopSettings(
        **{"max_steps": 9, "accelerator": "cpu", "log_every": 1, "checkpoint_every": 4, "accumulation": 2, **settings}
    )
    optim = Optimisation(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0)
    train(objective, ToySource(4), run=run, loop=loop, optim=optim)
    return objective, comparable(read_run(out).metrics) if run.writes else []


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[TwoViews, list[dict[str, Any]]]:
    return learn(tmp_path_factory.mktemp("views") / "run")


def assert_same(objective: TwoViews, other: TwoViews) -> None:
    state, expected = objective.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def draw(context: StepContext) -> Tensor:
    return torch.rand(4, generator=context.generator(CPU))


def test_draws_follow_from_seed_step_process_and_micro_batch_alone() -> None:
    context = StepContext(seed=3, step=5, rank=1, micro_batch=0)
    assert torch.equal(draw(context), draw(StepContext(3, 5, 1, 0)))
    others = [StepContext(4, 5, 1, 0), StepContext(3, 6, 1, 0), StepContext(3, 5, 2, 0), StepContext(3, 5, 1, 1)]
    drawn = [draw(each) for each in (context, *others)]
    assert len({tuple(numbers.tolist()) for numbers in drawn}) == len(drawn)
    seed_step(3, 5, 1)
    assert not torch.equal(torch.rand(4), drawn[0])


def test_a_generator_leaves_the_global_one_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2, 3)
    torch.manual_seed(0)
    first = torch.rand(3)
    draw(StepContext(1, 2, 3, 4))
    assert torch.equal(torch.stack([first, torch.rand(3)]), expected)


def test_micro_batches_of_a_step_and_steps_have_views_of_their_own(
    uninterrupted: tuple[TwoViews, list[dict[str, Any]]],
) -> None:
    noise = uninterrupted[0].noise
    assert len(noise) == 9 * 2
    assert len({tuple(each.flatten().tolist()) for each in noise}) == len(noise)
    expected = StepContext(seed=0, step=2, rank=0, micro_batch=1).generator(CPU)
    torch.testing.assert_close(noise[3], torch.randn(noise[3].shape, generator=expected))


def test_a_resumed_run_draws_the_same_views_and_has_the_same_teacher(
    tmp_path: Path, uninterrupted: tuple[TwoViews, list[dict[str, Any]]]
) -> None:
    with killed_after(TwoViews, 6):
        learn(tmp_path / "run")
    objective, metrics = learn(tmp_path / "run")
    assert metrics == uninterrupted[1]
    assert_same(objective, uninterrupted[0])
    assert len(objective.noise) == 5 * 2


def test_a_step_that_is_repeated_draws_the_same_views(
    tmp_path: Path, uninterrupted: tuple[TwoViews, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = TwoViews.forward, []

    def short(self: TwoViews, batch: Batch, progress: float) -> StepOutput:
        output = forward(self, batch, progress)
        calls.append(progress)
        if len(calls) in (4, 11):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output

    monkeypatch.setattr(TwoViews, "forward", short)
    objective, metrics = learn(tmp_path / "run")
    assert metrics == uninterrupted[1]
    assert_same(objective, uninterrupted[0])


def test_the_teacher_is_in_the_checkpoint_follows_the_student_and_is_not_trained(tmp_path: Path) -> None:
    objective, _ = learn(tmp_path / "run", max_steps=4)
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000004.pt")
    teacher = {name: value for name, value in content["objective"].items() if name.startswith("teacher.")}
    assert teacher.keys() == {f"teacher.{name}" for name in objective.encoder.state_dict()}
    seed_step(0, 0)
    fresh = TwoViews()
    assert any(not torch.equal(value, fresh.state_dict()[name]) for name, value in teacher.items())
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    assert len(content["optimizer"]["state"]) <= len(trained)
    assert len(trained) == len(list(objective.encoder.parameters())) + 2
    # One update from a step's weights: the teacher moved by a quarter of the way to the student.
    one = learn(tmp_path / "one", max_steps=1)[0]
    for name, value in one.teacher.named_parameters():
        start_value = fresh.teacher.get_parameter(name)
        expected = start_value + (1 - MOMENTUM) * (one.encoder.get_parameter(name) - start_value)
        torch.testing.assert_close(value, expected)


def test_a_dry_run_for_memory_knows_generators_and_teachers() -> None:
    sample = {"x": ((FEATURES,), torch.float32), "y": ((1,), torch.float32)}
    loop = LoopSettings(max_steps=4, accelerator="cpu")
    need = StepMemory(TwoViews, sample, loop, Optimisation(learning_rate=0.01)).need(4, 2)
    assert need.parameters == sum(p.numel() * p.element_size() for p in TwoViews().parameters())


def test_two_processes_have_the_same_teacher_and_views_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    ((code, output),) = ended([start([sys.executable, __file__, str(out)])], timeout_s=120)
    assert code == 0, output
    states, noises = zip(*(torch.load(out / f"final_{rank}.pt", weights_only=True) for rank in range(2)), strict=True)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    seed_step(0, 0)
    assert not torch.equal(states[0]["teacher.proj.weight"], TwoViews().teacher.proj.weight)
    assert not torch.equal(noises[0], noises[1])


if __name__ == "__main__":
    trained, _ = learn(Path(sys.argv[1]), devices=2, accumulation=1)
    torch.save((trained.state_dict(), trained.noise[0]), Path(sys.argv[1]) / f"final_{os.environ['LOCAL_RANK']}.pt")
