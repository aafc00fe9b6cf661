"""Leaving out hidden tokens changes nothing: every loss and every gradient equals those of the dense network."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.yardstick.batches import random_batch
from benchmarks.yardstick.dense_mim import DenseMiM
from mim3d.backbones.hybrid import Hybrid
from mim3d.kernels.masked.operator import kernel_forced
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.methods.mim.objective import MiMObjective

BACKBONE = Hybrid(widths=(6, 12, 24), depths=(2, 1, 2), num_heads=2)
DECODER = {"decoder_dim": 24, "decoder_depth": 2, "decoder_num_heads": 2}
COARSE = Level(name="coarse", footprint=(64, 64, 32), size=(32, 32, 16), mask_ratio=0.5, num_children=2)
MIDDLE = Level(name="middle", footprint=(32, 32, 16), size=(32, 32, 16), mask_ratio=0.6, num_children=2)
FINE = Level(name="fine", footprint=(8, 8, 8), size=(16, 24, 16), mask_ratio=0.5)


def alone(level: Level, ratio: float) -> Level:
    return replace(level, mask_ratio=ratio, num_children=0)


def gradients(module: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


def assert_close(ours: Tensor, expected: Tensor, name: str) -> None:
    """Relative to the largest value of the tensor; all of it is computed in float64."""
    scale = float(expected.abs().max())
    assert float((ours - expected).abs().max()) <= 1e-9 * max(scale, 1e-12), name


def assert_exact(objective: MiMObjective, batch: dict[str, Tensor]) -> None:
    dense = DenseMiM(objective)
    output = objective(batch, 0.0)
    expected, terms = dense(batch)
    assert_close(output.loss, expected, "loss")
    guesses = {f"guess/{geometry.level.name}" for geometry in objective.hierarchy.levels}
    assert terms.keys() == output.logs.keys() - guesses
    for name, value in terms.items():
        assert_close(output.logs[name], value, name)
    ours = gradients(objective, output.loss)
    theirs = {name.removeprefix("heads."): grad for name, grad in gradients(dense, expected).items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(list(objective.parameters()))
    for name, grad in ours.items():
        assert_close(grad, theirs[name], name)


def check(levels: Sequence[Level], batch_size: int, seed: int, **changes: object) -> None:
    method = MiM(levels=tuple(levels), **DECODER, **changes)
    torch.manual_seed(seed)
    objective = method.build(BACKBONE).double()
    batch = random_batch(method, BACKBONE, batch_size, seed)
    assert_exact(
        objective, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_levels_together(batch_size: int, seed: int) -> None:
    check([COARSE, MIDDLE, FINE], batch_size, seed)


@pytest.mark.parametrize("level", [COARSE, MIDDLE, FINE], ids=lambda level: level.name)
@pytest.mark.parametrize("ratio", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_each_level_alone_at_every_ratio(level: Level, ratio: float) -> None:
    check([alone(level, ratio)], batch_size=2, seed=3)


@pytest.mark.parametrize("changes", [{"alignment": "cosine"}, {"negatives": "batch"}, {"normalise_targets": False}])
def test_every_form_of_the_losses(changes: dict[str, object]) -> None:
    check([COARSE, MIDDLE, FINE], batch_size=2, seed=4, **changes)


def test_small_chunks() -> None:
    check([COARSE, MIDDLE, FINE], batch_size=1, seed=5, chunk_size=1)


@pytest.mark.parametrize("kernel", ["torch", "cpp"])
def test_bfloat16_stays_within_rounding_of_float32(kernel: str) -> None:
    method = MiM(levels=(COARSE, MIDDLE, FINE), **DECODER)
    torch.manual_seed(0)
    objective = method.build(BACKBONE)
    batch = random_batch(method, BACKBONE, 2)
    expected = objective(batch, 0.0)
    with kernel_forced(kernel), torch.autocast("cpu", dtype=torch.bfloat16):
        output = objective(batch, 0.0)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    for name in ("loss/coarse", "loss/middle", "loss/fine"):
        assert float(output.logs[name]) == pytest.approx(float(expected.logs[name]), rel=4e-3)
    assert float(output.loss) == pytest.approx(float(expected.loss.detach()), rel=1e-2)
    assert all(parameter.grad.dtype == torch.float32 for parameter in objective.parameters())
