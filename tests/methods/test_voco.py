"""VoCo: targets that are overlaps, a teacher that follows by its momentum, and losses as the paper writes them."""

import copy
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from mim3d.backbones import Backbone, Hybrid
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run
from mim3d.loading.loader import Loader
from mim3d.loading.samples import SampleDataset
from mim3d.methods import create_method
from mim3d.methods.voco.grid import CropGrid, plan_grid
from mim3d.methods.voco.method import VoCo
from mim3d.methods.voco.objective import VoCoObjective, _similarities
from mim3d.objective import Batch, StepContext
from mim3d.scans.intensity import Intensity
from mim3d.training.launch import seed_step
from mim3d.training.loop import train
from mim3d.training.memory import StepMemory
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.array_scans import random_scan
from tests.distributed.launching import ended, start
from tests.killing import killed_after

RECIPE = Hybrid(widths=(4, 8), depths=(1, 1), num_heads=2)
METHOD = VoCo(crop_size=(8, 8, 8), cells=(2, 2, 1), num_crops=3, dim=16)


def made(method: VoCo = METHOD, backbone: Backbone = RECIPE) -> tuple[VoCoObjective, Batch]:
    torch.manual_seed(0)
    objective = method.build(backbone)
    dataset = SampleDataset([random_scan((20, 18, 12))], method.sampler(backbone), Intensity(), 0, None)
    return objective, default_collate([dataset[0], dataset[1]])


def moved(objective: VoCoObjective) -> VoCoObjective:
    """The teacher elsewhere than the student, as after some steps."""
    for parameter in objective.teacher.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return objective


@pytest.mark.parametrize("cells", [(4, 4, 1), (2, 3, 2)])
def test_targets_are_overlaps_counted_voxel_by_voxel(cells):
    grid = CropGrid(cells, (4, 6, 5))
    sampler = replace(METHOD, num_crops=20).sampler(RECIPE)
    sampler.grid = grid
    scan = random_scan((40, 40, 30))
    sample = sampler.draw(scan, np.random.default_rng(0))
    owner = np.full(scan.shape, -1)
    for number, crop in enumerate(sample.images["base"]):
        place = tuple(slice(first, first + edge) for first, edge in zip(crop.origin, crop.footprint, strict=True))
        assert (owner[place] == -1).all(), "base crops must not overlap"
        owner[place] = number
    for crop, shares in zip(sample.images["crop"], sample.arrays["overlap"], strict=True):
        place = tuple(slice(first, first + edge) for first, edge in zip(crop.origin, crop.footprint, strict=True))
        counted = [(owner[place] == number).mean() for number in range(grid.num_bases)]
        np.testing.assert_allclose(shares, counted, atol=1e-6)
        assert shares.sum() == pytest.approx(1)


def plain_vectors(network: nn.Module, crops: Tensor) -> list[Tensor]:
    """Every crop's maps pooled one by one, and a projection written out, its hidden units normalised over all crops."""
    encoder, project = network
    pooled = [torch.cat([features[0].mean((1, 2, 3)) for features in encoder.feature_maps(c[None])]) for c in crops]
    hidden = torch.stack([project.fc1.weight @ vector + project.fc1.bias for vector in pooled])
    hidden = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, correction=0) + 1e-5)
    return [project.fc2.weight @ vector.clamp(min=0) + project.fc2.bias for vector in hidden]


def plain_losses(
    student: tuple[list[Tensor], list[Tensor]], teacher: tuple[list[Tensor], list[Tensor]], overlaps: Tensor
) -> Tensor:
    """The three losses of one sample with loops over crops and base crops, as the paper writes them."""
    positive, weight, negatives, pairs = 0.0, 0.0, [], []
    for r, crop in enumerate(student[0]):
        for k, base in enumerate(student[1]):
            one = torch.cosine_similarity(crop, teacher[1][k], 0).clamp(min=0)
            other = torch.cosine_similarity(teacher[0][r], base, 0).clamp(min=0)
            s, y = (one + other) / 2, float(overlaps[r, k])
            if y > 0:
                positive = positive - y * torch.log(1 - abs(y - s) + 1e-6)
                weight += y
            else:
                negatives.append(s**2)
    for i, base in enumerate(student[1]):
        for other in student[1][i + 1 :]:
            pairs.append(torch.cosine_similarity(base, other, 0).clamp(min=0) ** 2)
    return torch.stack([positive / weight, torch.stack(negatives).mean(), torch.stack(pairs).mean()])


def test_losses_and_gradients_are_those_of_a_plain_implementation():
    objective, batch = made()
    objective = moved(objective).double()
    batch = {key: value.double() for key, value in batch.items()}
    plain = nn.ModuleList([copy.deepcopy(objective.encoder), copy.deepcopy(objective.project)])
    output = objective(batch, 0.0)
    output.loss.backward()
    views = objective.views(batch)
    with torch.no_grad():
        teacher = plain_vectors(objective.teacher, views)
    student = plain_vectors(plain, views)
    # Three random crops of each of two samples, then four base crops of each.
    parts = [[slice(3 * i, 3 * i + 3), slice(6 + 4 * i, 10 + 4 * i)] for i in range(2)]
    losses = torch.stack(
        [
            plain_losses(tuple(student[p] for p in part), tuple(teacher[p] for p in part), batch["overlap"][i])
            for i, part in enumerate(parts)
        ]
    ).mean(0)
    losses.sum().backward()
    named = [output.logs[f"loss/{name}"] for name in ("positive", "negative", "regularisation")]
    torch.testing.assert_close(torch.stack(named).double(), losses.detach(), rtol=1e-5, atol=1e-6)
    ours = [*objective.encoder.parameters(), *objective.project.parameters()]
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.parameters())
    for parameter, expected in zip(ours, plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-5 * largest)
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


@torch.no_grad()
def test_the_teacher_begins_as_the_student_and_moves_exactly_by_its_momentum():
    objective, _ = made()
    student = nn.ModuleList([objective.encoder, objective.project])
    for parameter in student.parameters():
        parameter.add_(torch.randn_like(parameter))
    before = [parameter.clone() for parameter in objective.teacher.parameters()]
    objective.after_step(0.0)
    for old, kept, new in zip(before, objective.teacher.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(kept, 0.9 * old + 0.1 * new)
        assert not kept.requires_grad
    objective.after_weights()
    assert all(map(torch.equal, objective.teacher.parameters(), student.parameters()))
    assert {name.removeprefix("teacher.0.") for name in objective.state_dict() if name.startswith("teacher.0.")} == set(
        objective.encoder.state_dict()
    )


def test_the_teacher_drops_no_paths():
    objective, _ = made(backbone=replace(RECIPE, drop_path=0.5))
    objective.train()
    assert objective.encoder.training
    assert not any(module.training for module in objective.teacher.modules())


def test_views_follow_from_the_step_and_leave_base_crops_as_they_are():
    objective, batch = made()
    first = objective.views(batch)
    assert torch.equal(first, objective.views(batch))
    assert torch.equal(first[6:], batch["base"].flatten(0, 1))
    objective.context = StepContext(step=7)
    assert not torch.equal(first[:6], objective.views(batch)[:6])
    plain, _ = made(replace(METHOD, crop_flip_prob=0.0, crop_bias=0.0))
    assert torch.equal(plain.views(batch)[:6], batch["crop"].flatten(0, 1))


@torch.no_grad()
def test_chunks_change_nothing():
    objective, batch = made()
    other, _ = made(replace(METHOD, chunk_size=3))
    torch.testing.assert_close(objective(batch, 0.0).loss, other(batch, 0.0).loss)


@pytest.mark.parametrize(
    ("multiple", "shape", "cells", "edge"),
    [
        (16, (512, 512, 300), (4, 4, 1), 64),
        (32, (256, 256, 64), (4, 4, 1), 64),
        (16, (94, 94, 63), (2, 2, 1), 32),
        (8, (35, 50, 36), (2, 3, 2), 16),
        (32, (94, 94, 63), (2, 2, 1), 32),
        (8, (64, 64, 64), (2, 2, 2), 32),
    ],
)
def test_the_grid_is_planned_for_what_scans_hold(multiple, shape, cells, edge):
    grid = plan_grid((multiple,) * 3, [shape], None, None)
    assert (grid.cells, grid.crop_size) == (cells, (edge,) * 3)
    assert all(voxels <= size for voxels, size in zip(grid.footprint, shape, strict=True))
    assert plan_grid((multiple,) * 3, [shape], grid.crop_size, None) == grid
    assert plan_grid((multiple,) * 3, [shape], None, grid.cells).num_bases == grid.num_bases


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "VoCo needs 4 base crops side by side, and the scans, of 35x50x36 voxels .* smaller tokens"),
        ({"cells": (4, 4, 1)}, "method.cells 4x4x1, and the scans, of 35x50x36 .* do not hold them"),
        ({"crop_size": (24, 24, 24)}, "crop_size axis X .24. is not a multiple of stride 32; use 32"),
        ({"crop_size": (32, 32, 32), "cells": (4, 4, 1)}, "89% of it would be padding, .* to have them planned"),
        ({"crop_size": (32, 32, 32), "cells": (1, 2, 1)}, "it has fewer than 4"),
        ({"cells": (0, 4, 1)}, "from 1 to 16"),
        ({"momentum": 1.0}, "method.momentum .1.0."),
        ({"num_crops": 0}, "method.num_crops .0."),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(settings, said):
    wide = Hybrid(widths=(4,) * 5, depths=(1,) * 5, num_heads=2)
    with pytest.raises(ConfigError, match=said):
        create_method({"name": "VoCo", **settings}).planned(wide, [(35, 50, 36)])


def test_collapse_and_idleness_are_told():
    assert METHOD.idle_parts({"spread/features": 0.6, "similarity/positive": 0.5, "similarity/negative": 0.1}) == []
    (collapsed,) = METHOD.idle_parts({"spread/vectors": 0.001})
    assert "collapsed" in collapsed
    (idle,) = METHOD.idle_parts({"spread/features": 0.6, "similarity/positive": 0.2, "similarity/negative": 0.2})
    assert "nothing was learned of places" in idle


@pytest.mark.parametrize(
    ("cells", "crop_size"), [((2, 2, 2), (5, 4, 3)), ((3, 2, 1), (4, 4, 4)), ((4, 4, 1), (3, 2, 2))]
)
def test_base_crops_that_a_random_crop_overlaps_are_counted_over_all_places(cells, crop_size):
    grid = CropGrid(cells, crop_size)
    spare = np.array(grid.footprint) - np.array(crop_size)
    everywhere = np.array(list(np.ndindex(*(spare + 1))))
    assert grid.num_overlapped == pytest.approx((grid.overlaps(everywhere) > 0).sum(1).mean())


def test_a_grid_on_which_little_is_apart_is_noted():
    method = VoCo().planned(RECIPE, [(128, 128, 128)])
    assert "a random crop overlaps 7.6 of 8 base crops" in method.summary(RECIPE, [(128, 128, 128)])[-1]
    wider = VoCo(cells=(3, 3, 1)).planned(RECIPE, [(128, 128, 128)])
    for each in (wider, VoCo()):
        assert not any("note" in line for line in each.summary(RECIPE, [(300, 300, 128)]))


def test_batches_in_which_no_base_crop_is_apart_do_not_hide_that_nothing_was_learned():
    """On a grid of 2 x 2 x 2 most random crops overlap all base crops."""
    overlap = torch.tensor([[[0.125] * 8, [0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0]]])
    logs = [_similarities(torch.full((1, 1, 8), 0.8), overlap[:, [row]]) for row in (0, 1)]
    means = {name: sum(float(each[name]) for each in logs) / 2 for name in logs[0]}
    assert means["similarity/positive"] == means["similarity/negative"] == pytest.approx(0.8)
    assert "nothing was learned of places" in METHOD.idle_parts(means)[0]


def test_health_is_logged_and_a_healthy_encoder_has_similarities_near_the_overlaps():
    objective, batch = made()
    logs = objective(batch, 0.0).logs
    overlap = batch["overlap"]
    assert float(logs["overlap"]) == pytest.approx(float(overlap.square().sum() / overlap.sum()))
    assert (
        0 <= float(logs["similarity/negative"]) <= 1
        and 0 < float(logs["spread/features"]) < float(logs["spread/vectors"]) <= 1
    )
    objective.eval()
    assert all(picture.shape == (8, 8, 8) for picture in objective.pictures(batch).values())


def test_memory_is_known_beforehand():
    _, batch = made()
    sample = {key: (tuple(value.shape[1:]), value.dtype) for key, value in batch.items()}
    loop = LoopSettings(max_steps=1, accelerator="cpu")
    need = StepMemory(lambda: METHOD.build(RECIPE), sample, loop, Optimisation(learning_rate=1e-3)).need(1, 1)
    objective, _ = made()
    values = sum(value.numel() for value in [*objective.parameters(), *objective.buffers()])
    assert need.parameters == pytest.approx(4 * values, rel=0.01)


def learn(out: Path, **settings: object) -> VoCoObjective:
    run = Run.create(out, command="pretrain", settings={"seed": 0}, inputs={}, resume=True)
    seed_step(0, 0)
    objective = METHOD.build(RECIPE)
    scans = [random_scan((20, 18, 12), seed=index, name=f"scan_{index}") for index in range(4)]
    loader = Loader(scans, METHOD.sampler(RECIPE), Intensity(), batch_size=1, seed=0, augment=None)
    loop = LoopSettings(**{"max_steps": 4, "accelerator": "cpu", "checkpoint_every": 2, "log_every": 1, **settings})
    train(objective, loader, run=run, loop=loop, optim=Optimisation(learning_rate=1e-2))
    return objective


def test_a_resumed_run_has_the_same_teacher_and_all_processes_have_one(tmp_path):
    whole = learn(tmp_path / "whole").state_dict()
    with killed_after(VoCoObjective, 3):
        learn(tmp_path / "stopped")
    resumed = learn(tmp_path / "stopped").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert not torch.equal(whole["teacher.1.fc1.weight"], whole["project.fc1.weight"])


def test_the_teacher_is_whole_in_two_processes(tmp_path):
    ((code, output),) = ended([start([sys.executable, __file__, str(tmp_path)])], timeout_s=300)
    assert code == 0, output
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


if __name__ == "__main__":
    trained = learn(Path(sys.argv[1]) / "run", max_steps=2, devices=2)
    torch.save(trained.state_dict(), Path(sys.argv[1]) / f"{os.environ['LOCAL_RANK']}.pt")
