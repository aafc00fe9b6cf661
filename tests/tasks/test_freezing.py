"""Encoders that learn later than what is built on them, layer by layer, or never."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mim3d.backbones import Hybrid
from mim3d.backbones.contract import Encoder
from mim3d.core.errors import ConfigError
from mim3d.objective import Batch, Objective, StepContext, StepOutput
from mim3d.tasks.classification.task import Classification
from mim3d.tasks.contract import Task
from mim3d.tasks.freezing import FreezingObjective
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.launch import StepModule
from mim3d.training.memory import StepMemory
from mim3d.training.optim import build_optimizer
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings

#: Layers: stem, two blocks, output.
BACKBONE = Hybrid(widths=(8, 16), depths=(1, 1), num_heads=2)
LABELS = {0: "background", 1: "ball"}
IMAGE = torch.rand(2, 1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
BATCH: Batch = {
    "image": IMAGE,
    "label": (IMAGE[:, 0] > 0.5).long(),
    "class": torch.tensor([[0], [1]]),
}
TASKS = [Segmentation(patch_size=(8, 8, 8), feature_dim=4), Classification(cube_mm=8, size=8, dropout=0.0)]


def build(task: Task, **changes: object) -> Objective:
    torch.manual_seed(0)
    return replace(task, **changes).build(BACKBONE, LABELS).train()


def optimizer_of(objective: Objective) -> torch.optim.Optimizer:
    settings = Optimisation(learning_rate=0.1, weight_decay=0.5)
    return build_optimizer(objective, make_schedule(settings, effective_batch=2, max_steps=10))


def learning(encoder: Encoder) -> set[int]:
    """The layers that have gradients."""
    return {encoder.layer_of(name) for name, parameter in encoder.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_layers_begin_to_learn_from_the_output_down_to_the_stem(task: Task) -> None:
    objective = build(task, unfreeze_ratio=0.8)
    for progress, expected in [
        *((0.0, set()), (0.19, set()), (0.2, {3}), (0.4, {2, 3}), (0.6, {1, 2, 3})),
        *((0.79, {1, 2, 3}), (0.8, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})),
    ]:
        objective.zero_grad(set_to_none=True)
        objective(BATCH, progress).loss.backward()
        assert learning(objective.encoder) == expected, progress
        assert all(p.grad is not None for name, p in objective.named_parameters() if not name.startswith("encoder."))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("changes", [{"freeze_encoder": True}, {"unfreeze_ratio": 0.5}])
def test_what_is_frozen_is_moved_neither_by_gradients_nor_by_decay(task: Task, changes: dict[str, object]) -> None:
    objective = build(task, **changes)
    optimizer = optimizer_of(objective)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    for _ in range(2):
        objective(BATCH, 0.0).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and not any(name.startswith("encoder.") for name in moved)
    objective(BATCH, 0.25).loss.backward()
    optimizer.step()
    moved = {name for name, value in objective.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("encoder.") for name in moved) == ("unfreeze_ratio" in changes)


class Normed(Encoder):
    """An encoder whose norms keep running statistics, with dropout beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = BACKBONE, (1,), (4,)
        stem, low, high = ((nn.Conv3d(dim, 4, 1), nn.BatchNorm3d(4), nn.Dropout(0.5)) for dim in (1, 4, 4))
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.ModuleList([nn.Sequential(*low), nn.Sequential(*high)])

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        features = self.stem(volume_BCXYZ)
        for block in self.blocks:
            features = block(features)
        return [features]


class OnlyEncodes(FreezingObjective):
    """An objective that nothing is built on."""

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        raise AssertionError("it has no loss")


def test_norms_and_dropout_of_frozen_layers_are_in_evaluation_mode_and_of_learning_ones_in_training_mode() -> None:
    encoder = Normed()
    objective = OnlyEncodes(encoder, unfreeze_ratio=0.4)

    def modes() -> list[bool]:
        return [part[index].training for part in (encoder.stem, *encoder.blocks) for index in (1, 2)]

    assert modes() == [True] * 6
    for progress, expected in [(0.0, [False] * 6), (0.2, [False] * 4 + [True] * 2), (0.4, [True] * 6)]:
        objective.unfreeze(progress)
        assert modes() == expected
    objective.unfreeze(0.2)
    statistics = encoder.stem[1].running_mean.clone(), encoder.blocks[1][1].running_mean.clone()
    encoder.feature_maps(torch.rand(2, 1, 4, 4, 4))
    assert torch.equal(encoder.stem[1].running_mean, statistics[0])
    assert not torch.equal(encoder.blocks[1][1].running_mean, statistics[1])


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
@pytest.mark.parametrize("changes", [{"freeze_encoder": True}, {"unfreeze_ratio": 0.5}])
def test_training_mode_after_a_validation_leaves_frozen_layers_in_evaluation_mode(
    task: Task, changes: dict[str, object]
) -> None:
    objective = build(task, **changes)
    objective(BATCH, 0.0)
    objective.eval()
    assert not any(module.training for module in objective.modules())
    objective.train()
    assert not any(module.training for module in objective.encoder.modules())
    assert objective.training
    assert all(module.training for name, module in objective.named_modules() if not name.startswith("encoder"))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_layers_that_learn_later_learn_the_same_after_a_resume(task: Task) -> None:
    def steps(objective: Objective, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            objective(BATCH, step / 9).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    whole = build(task, unfreeze_ratio=0.8)
    optimizer = optimizer_of(whole)
    steps(whole, optimizer, 0, 10)
    first = build(task, unfreeze_ratio=0.8)
    optimizer = optimizer_of(first)
    steps(first, optimizer, 0, 4)
    second = build(task, unfreeze_ratio=0.8)
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    resumed.load_state_dict(optimizer.state_dict())
    steps(second, resumed, 4, 10)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in second.state_dict().items())


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_processes_that_train_together_take_layers_in_as_they_begin_to_learn(task: Task, alone: None) -> None:
    objective, reference = build(task, unfreeze_ratio=0.8), build(task, unfreeze_ratio=0.8)
    model = DistributedDataParallel(StepModule(objective), find_unused_parameters=True)
    optimizer, own = optimizer_of(objective), optimizer_of(reference)
    for step in range(8):
        model(BATCH, step / 7)[0].backward()
        reference(BATCH, step / 7).loss.backward()
        assert learning(objective.encoder) == learning(reference.encoder)
        for every in (optimizer, own):
            every.step()
            every.zero_grad(set_to_none=True)
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name])


def test_the_memory_foreseen_is_that_of_the_end_when_everything_learns() -> None:
    loop, optim = LoopSettings(max_steps=10, accelerator="cpu"), Optimisation(learning_rate=1e-3)
    sample = {name: (tuple(BATCH[name].shape[1:]), BATCH[name].dtype) for name in ("image", "label")}
    task = TASKS[0]

    def need(**changes: object) -> int:
        memory = StepMemory(lambda: replace(task, **changes).build(BACKBONE, LABELS), sample, loop, optim)
        found = memory.need(2, 1)
        return found.total - found.program

    assert need(freeze_encoder=True) < need(unfreeze_ratio=1.0) == need()


@pytest.mark.parametrize("kind", [Segmentation, Classification])
def test_settings_that_cannot_work_are_refused_and_others_said_before_training(kind: type[Task]) -> None:
    with pytest.raises(ConfigError, match="unfreeze_ratio is 0; it must be above 0 and at most 1"):
        kind(unfreeze_ratio=0)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="freeze_encoder and unfreeze_ratio are both set"):
        kind(freeze_encoder=True, unfreeze_ratio=0.5)  # type: ignore[call-arg]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_what_is_frozen_is_said_before_training(task: Task) -> None:
    told = " ".join(replace(task, unfreeze_ratio=0.3).summary())
    assert "until all learn after 30% of training" in told
    assert "the encoder is frozen" in " ".join(replace(task, freeze_encoder=True).summary())
    assert "frozen" not in " ".join(task.summary())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_the_schedule_of_a_run_freezes_the_encoder_in_the_steps_it_names(task: Task) -> None:
    objective = build(task)
    for frozen, expected in [(True, set()), (False, {0, 1, 2, 3}), (True, set())]:
        objective.zero_grad(set_to_none=True)
        objective.context = StepContext(encoder_frozen=frozen)
        objective(BATCH, 0.5).loss.backward()
        assert learning(objective.encoder) == expected
        assert any(module.training for module in objective.encoder.modules()) == (not frozen)


def test_what_never_asks_for_gradients_does_not_begin_to_when_the_encoder_thaws() -> None:
    encoder = Normed()
    encoder.stem[0].weight.requires_grad_(False)
    objective = OnlyEncodes(encoder)
    for frozen in (True, False):
        objective.context = StepContext(encoder_frozen=frozen)
        objective.unfreeze(0.0)
    assert [name for name, parameter in encoder.named_parameters() if not parameter.requires_grad] == ["stem.0.weight"]
