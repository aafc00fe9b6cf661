"""The memory of a training step, known before the first one."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mim3d.backbones import Backbone, Hybrid, create_recipe
from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.core.resources import peak_memory_bytes, resident_memory_bytes
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.training.memory import (
    ACCUMULATING_RESERVE,
    CONVOLVING_RESERVE,
    RESERVE,
    SCRATCH_BYTES,
    MemoryNeed,
    SampleShapes,
    StepMemory,
    can_be_known,
    is_out_of_memory,
    usable_bytes,
)
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.training.toy_training import ToyObjective, toy_run

OPTIM = Optimisation(learning_rate=1e-3)
ROWS, WIDE, NARROW = 3000, 700, 500

LEVELS = (
    Level(name="coarse", footprint=(32, 32, 32), size=(32, 32, 32), mask_ratio=0.5, num_children=3),
    Level(name="middle", footprint=(16, 16, 16), size=(32, 32, 32), mask_ratio=0.5),
)
SMALL = Hybrid(widths=(24, 48), depths=(2, 1), num_heads=4)
DECODER = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}


class Chain(Objective):
    """Two layers with a hyperbolic tangent between them, whose every storage is known."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDE, NARROW, bias=False)
        self.out = nn.Linear(NARROW, 1, bias=False)
        self.register_buffer("buffer", torch.zeros(10))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        return StepOutput(self.out(torch.tanh(self.wide(batch["x"]))).square().sum())


CHAIN_SAMPLE = {"x": ((ROWS, WIDE), torch.float32)}


def loop(**settings: object) -> LoopSettings:
    return LoopSettings(**{"max_steps": 10, "accelerator": "cpu", **settings})


def mim_sample(method: MiM, recipe: Backbone) -> SampleShapes:
    class Scan:
        shape = (64, 64, 64)
        body_box = ((0, 0, 0), (64, 64, 64))

        def foreground_ratio(self, origin, size):
            return 1.0

    return method.sampler(recipe).draw(Scan(), np.random.default_rng(0)).shapes(1)


def mim_need(
    method: MiM, recipe: Backbone, batch_size: int = 1, accumulation: int = 1, **settings: object
) -> MemoryNeed:
    memory = StepMemory(lambda: method.build(recipe), mim_sample(method, recipe), loop(**settings), method.optimisation)
    return memory.need(batch_size, accumulation)


def tensors(need: MemoryNeed) -> int:
    return need.total - need.program - need.reserve


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_every_storage_of_a_known_network_is_counted_once(samples: int) -> None:
    need = StepMemory(Chain, CHAIN_SAMPLE, loop(), OPTIM).need(samples, 1)
    weights = 4 * (WIDE * NARROW + NARROW)
    layer, column = 4 * samples * ROWS * NARROW, 4 * samples * ROWS
    assert need.parameters == weights + 40
    assert need.optimiser == 2 * weights + 2 * 4
    assert need.batch == 2 * 4 * samples * ROWS * WIDE
    # The fullest moment: the saved hidden layer, its gradient and that of the layer before; the gradient of the
    # second weight is there already, the errors that the square has saved are not freed before the end.
    assert need.gradients == 4 * NARROW
    assert 3 * layer <= need.activations <= 3 * layer + 4 * column
    assert need.reserve == int(RESERVE["cpu"] * tensors(need)) + SCRATCH_BYTES["cpu"]
    assert need.program == pytest.approx(resident_memory_bytes(), rel=0.1)


def test_with_several_micro_batches_all_gradients_are_there_from_the_beginning() -> None:
    memory = StepMemory(Chain, CHAIN_SAMPLE, loop(accumulation=2), OPTIM)
    assert memory.need(1, 2).gradients == 4 * (WIDE * NARROW + NARROW)
    assert memory.need(1, 2).activations >= memory.need(1, 1).activations
    accumulated = memory.need(1, 2)
    assert accumulated.reserve == int(ACCUMULATING_RESERVE["cpu"] * tensors(accumulated)) + SCRATCH_BYTES["cpu"]


def test_more_is_kept_in_reserve_for_the_copies_that_convolutions_make() -> None:
    class Convolved(Chain):
        def forward(self, batch: Batch, progress: float) -> StepOutput:
            return StepOutput(torch.conv1d(batch["x"].mT, self.wide.weight[:, :9, None]).square().sum())

    need = StepMemory(Convolved, {"x": ((50, 9), torch.float32)}, loop(), OPTIM).need(1, 1)
    assert need.reserve == int(CONVOLVING_RESERVE["cpu"] * tensors(need)) + SCRATCH_BYTES["cpu"]


def test_processes_that_train_together_hold_gradients_twice() -> None:
    together = StepMemory(Chain, CHAIN_SAMPLE, loop(devices=2, accumulation=2), OPTIM).need(1, 2)
    assert together.gradients == 2 * 4 * (WIDE * NARROW + NARROW)


def test_steps_of_any_number_of_samples_lie_on_the_line_through_one_and_two() -> None:
    method = MiM(levels=LEVELS, **DECODER)
    line = StepMemory(lambda: method.build(SMALL), mim_sample(method, SMALL), loop(), method.optimisation)
    six = {key: ((6 * shape[0], *shape[1:]), dtype) for key, (shape, dtype) in mim_sample(method, SMALL).items()}

    def grouped(samples: Callable[[], Objective] = lambda: method.build(SMALL)) -> Objective:
        objective = samples()
        forward = objective.forward
        objective.forward = (
            lambda batch, progress: forward(  # type: ignore[method-assign]
                {key: value.reshape(6, -1, *value.shape[2:]) for key, value in batch.items()}, progress
            )
        )
        return objective

    whole = StepMemory(grouped, six, loop(), method.optimisation)
    assert tensors(line.need(6, 1)) == pytest.approx(tensors(whole.need(1, 1)), rel=0.01)


def test_recomputation_smaller_chunks_and_half_precision_need_less() -> None:
    # A small decoder and few hidden places, so that the convolution stages decide.
    small = {**DECODER, "decoder_dim": 8}
    method = MiM(levels=(LEVELS[0], replace(LEVELS[1], mask_ratio=0.1)), chunk_size=16, **small)
    recipe = replace(SMALL, widths=(48, 48))
    asked = tensors(mim_need(method, recipe, 4))
    recomputed = tensors(mim_need(method, replace(recipe, recompute=True), 4))
    chunked = tensors(mim_need(replace(method, chunk_size=1), replace(recipe, recompute=True), 4))
    assert recomputed < 0.7 * asked
    assert chunked < 0.95 * recomputed
    assert tensors(mim_need(method, recipe, 4, precision="bf16-mixed")) < 0.95 * asked


def test_nothing_is_computed_and_no_memory_is_taken() -> None:
    levels = (Level(name="whole", footprint=(96, 96, 96), size=(96, 96, 96), mask_ratio=0.5),)
    before = resident_memory_bytes() or 0
    need = mim_need(MiM(levels=levels), create_recipe("hybrid_huge"), 64)
    assert need.parameters > 2**30
    assert need.total > 32 * 2**30
    assert (resident_memory_bytes() or 0) - before < 2**28


def test_a_dry_run_leaves_no_trace_in_later_steps() -> None:
    method = MiM(levels=LEVELS, **DECODER)

    def loss() -> float:
        torch.manual_seed(0)
        objective = method.build(SMALL)
        sample = mim_sample(method, SMALL)
        batch = {key: torch.rand(1, *shape) for key, (shape, dtype) in sample.items() if dtype == torch.float32}
        drawn = method.hierarchy(SMALL).draw(np.random.default_rng(0))
        for level, masks in zip(LEVELS, drawn, strict=True):
            batch[f"hidden/{level.name}"] = torch.from_numpy(masks.hidden)[None]
            batch[f"place/{level.name}"] = torch.from_numpy(masks.places)[None]
            batch[f"corner/{level.name}"] = torch.from_numpy(masks.offsets)[None]
        value = objective(batch, 0.0).loss
        value.backward()
        return float(value.detach())

    # The dry run comes first, so that whatever it keeps would be met.
    mim_need(method, SMALL)
    first = loss()
    mim_need(method, SMALL, precision="bf16-mixed")
    assert loss() == first
    assert type(torch.zeros(1)) is torch.Tensor


MEASURED = """
import sys
import numpy as np, torch
sys.path.insert(0, ".")
from mim3d.backbones import create_recipe
from mim3d.training.optim import build_optimizer
from mim3d.kernels.machine import keep_freed_memory
from mim3d.methods.mim.method import MiM
from mim3d.training.schedule import make_schedule
from mim3d.core.resources import peak_memory_bytes
from tests.training.test_memory import mim_need

class Scan:
    shape, body_box = (64,) * 3, ((0,) * 3, (64,) * 3)
    foreground_ratio = staticmethod(lambda origin, size: 1.0)

torch.set_num_threads(1)
keep_freed_memory()
recipe, method = create_recipe("hybrid_nano"), MiM()
predicted = mim_need(method, recipe, 4).total
rng = np.random.default_rng(0)
objective = method.build(recipe)
optimizer = build_optimizer(objective, make_schedule(method.optimisation, effective_batch=4, max_steps=2))
for _ in range(3):
    drawn = [method.sampler(recipe).draw(Scan(), rng) for _ in range(4)]
    batch = {key: torch.rand(4, len(reads), 1, *reads[0].size) for key, reads in drawn[0].images.items()}
    batch |= {key: torch.from_numpy(np.stack([d.arrays[key] for d in drawn])) for key in drawn[0].arrays}
    objective(batch, 0.0).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(predicted, peak_memory_bytes())
"""


@pytest.mark.skipif(peak_memory_bytes() is None, reason="this system does not tell the peak of memory")
def test_the_prediction_is_what_real_steps_take() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    predicted, measured = (int(word) for word in done.stdout.split())
    assert 0.95 * measured < predicted < 1.25 * measured


def test_settings_that_cannot_work_are_refused_by_the_dry_run() -> None:
    with pytest.raises(ConfigError, match="learning rate"):
        StepMemory(Chain, CHAIN_SAMPLE, loop(), Optimisation()).need(1, 1)


def test_what_can_be_used_is_shared_by_the_processes_of_a_cpu() -> None:
    alone, together = usable_bytes(loop()), usable_bytes(loop(devices=2))
    assert alone is not None and together == pytest.approx(alone / 2, rel=0.1)
    assert usable_bytes(loop(devices=2), 2**30) == 2**29
    assert usable_bytes(loop(accelerator="cuda", devices=2), 2**30) == 2**30
    assert usable_bytes(loop(accelerator="mps")) is None
    assert can_be_known(loop()) and not can_be_known(loop(accelerator="mps"))
    assert can_be_known(loop(accelerator="cuda")) == torch.cuda.is_available()


def test_sizes_and_parts_are_put_into_words() -> None:
    need = MemoryNeed(2**30, 0, 2**31, 2**20, 2**32)
    assert need.parts() == "parameters 1.0 GiB, optimiser 2.0 GiB, batch 1 MiB, activations 4.0 GiB"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("not enough memory: you tried to allocate 4000000 bytes."),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_ends_a_run_with_its_last_checkpoint_and_a_remedy(tmp_path, monkeypatch, error) -> None:
    step = ToyObjective.forward
    seen = []

    def forward(self: ToyObjective, batch: Batch, progress: float) -> StepOutput:
        seen.append(progress)
        if len(seen) >= 6:
            raise error
        return step(self, batch, progress)

    assert is_out_of_memory(error)
    monkeypatch.setattr(ToyObjective, "forward", forward)
    remedy = r"ran out of memory; the checkpoint of step 5 is kept in .*--resume true.*--backbone.recompute true"
    with pytest.raises(Mim3dError, match=remedy):
        toy_run(tmp_path / "run", checkpoint_every=2, validating=False)


def test_other_failures_keep_their_words(tmp_path, monkeypatch) -> None:
    def forward(self: ToyObjective, batch: Batch, progress: float) -> StepOutput:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(ToyObjective, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        toy_run(tmp_path / "run")


def test_a_run_notes_the_most_memory_it_held(tmp_path, capsys) -> None:
    import json

    _, _, run = toy_run(tmp_path / "run", validating=False)
    noted = json.loads(run.manifest_path.read_text())["derived"]["peak_memory_bytes"]
    assert noted == pytest.approx(peak_memory_bytes(), rel=0.2)
    assert re.search(r"all 12 steps are done, in .*; at most .* of memory", capsys.readouterr().err)
