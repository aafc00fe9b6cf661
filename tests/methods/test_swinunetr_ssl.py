"""SwinUNETR's pre-training: turns that match their labels, cuts within their share, a contrast of pairs."""

import itertools
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from mim3d.backbones import Hybrid, Swin, ViT
from mim3d.backbones.contract import Backbone
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run
from mim3d.loading.loader import Loader
from mim3d.loading.samples import SampleDataset
from mim3d.methods.swinunetr_ssl.method import SwinUNETRSSL
from mim3d.methods.swinunetr_ssl.objective import ThreeTasksObjective
from mim3d.methods.swinunetr_ssl.views import CutOut, covered, draw_boxes, two_views
from mim3d.nn.losses import pair_cosines, view_contrast
from mim3d.objective import Batch, StepContext
from mim3d.scans.intensity import Intensity
from mim3d.training.launch import seed_step
from mim3d.training.loop import train
from mim3d.training.memory import StepMemory
from mim3d.training.optim import build_optimizer, set_learning_rate
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings
from tests.array_scans import random_scan
from tests.distributed.launching import ended, start
from tests.killing import killed_after

RECIPE = Swin(feature_size=8, depths=(2, 1), num_heads=(2, 4), window_size=3)
METHOD = SwinUNETRSSL(size=(16, 16, 8), contrast_dim=6)
CUT_OUT = SwinUNETRSSL().cut_out


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(method: SwinUNETRSSL, samples: range = range(3)) -> Batch:
    scans = [random_scan((24, 20, 12), seed=seed, name=f"scan_{seed}") for seed in range(4)]
    dataset = SampleDataset(scans, method.sampler(RECIPE), Intensity(), 0, None)
    return default_collate([dataset[index] for index in samples])


def made(recipe: Backbone = RECIPE, **changes: Any) -> tuple[ThreeTasksObjective, Batch]:
    method = replace(METHOD, **changes)
    torch.manual_seed(0)
    return method.build(recipe), batch_of(method)


def test_labels_of_turns_are_the_turns_of_the_voxels() -> None:
    crops = torch.rand(12, 2, 6, 6, 4)
    views = two_views(crops, CutOut(0.0, (0.05, 0.25), 0.5), generator())
    assert set(views.turns_V.tolist()) == {0, 1, 2, 3}
    assert views.turns_V[:12].tolist() != views.turns_V[12:].tolist()
    for view, (turns, whole) in enumerate(zip(views.turns_V, views.whole_VCXYZ, strict=True)):
        assert torch.equal(whole, torch.rot90(crops[view % 12], int(turns), (1, 2)))
    assert torch.equal(views.shown_VCXYZ, views.whole_VCXYZ)


@pytest.mark.parametrize("size", [(96, 96, 64), (32, 32, 32), (16, 16, 8)])
def test_boxes_stay_within_their_share_and_have_the_edges_asked_for(size: tuple[int, int, int]) -> None:
    first, edges, kept = draw_boxes(size, 40, CUT_OUT, generator())
    assert bool((first >= 0).all())
    assert bool((first + edges <= torch.tensor(size)).all())
    for axis, voxels in enumerate(size):
        least, largest = max(1, math.ceil(0.05 * voxels)), max(1, int(0.25 * voxels))
        assert (int(edges[..., axis].min()), int(edges[..., axis].max())) == (least, largest)
    shares = covered(first[:8], edges[:8], kept[:8], size).float().mean((1, 2, 3))
    assert float(shares.max()) <= 0.3
    voxels_kept = (edges.prod(-1) * kept).sum(1) / math.prod(size)
    assert float(voxels_kept.max()) <= 0.3
    assert float(voxels_kept.max()) > 0.2
    # The share is what was drawn for a view, not what the boxes happen to reach.
    assert float(voxels_kept.std()) > 0.05


def test_covered_voxels_are_those_inside_a_chosen_box() -> None:
    size = (7, 6, 5)
    first, edges, _ = draw_boxes(size, 3, CutOut(0.9, (0.2, 0.6), 0.5), generator())
    chosen = torch.rand(first.shape[:2], generator=generator()) < 0.3
    expected = torch.zeros(3, *size, dtype=torch.bool)
    for view, box in itertools.product(range(3), range(first.shape[1])):
        if chosen[view, box]:
            x, y, z = (slice(a, a + n) for a, n in zip(first[view, box], edges[view, box], strict=True))
            expected[view, x, y, z] = True
    assert torch.equal(covered(first, edges, chosen, size), expected)


@pytest.mark.parametrize(("swap_prob", "num_crops"), [(0.0, 3), (1.0, 3), (0.5, 3), (1.0, 1)])
def test_cuts_show_noise_or_another_crop_at_the_same_place_and_the_rest_is_untouched(
    swap_prob: float, num_crops: int
) -> None:
    # Crops of ranges of their own, so that a voxel says where it comes from.
    crops = torch.rand(num_crops, 1, 16, 16, 16) + 10 * torch.arange(num_crops).reshape(-1, 1, 1, 1, 1)
    views = two_views(crops, CutOut(0.3, (0.05, 0.25), swap_prob), generator(1))
    assert bool(views.cut_V1XYZ.any())
    assert torch.equal(views.shown_VCXYZ[~views.cut_V1XYZ], views.whole_VCXYZ[~views.cut_V1XYZ])
    for view, (shown, cut) in enumerate(zip(views.shown_VCXYZ, views.cut_V1XYZ, strict=True)):
        own, source = view % num_crops, shown[cut] // 10
        if swap_prob == 1.0 and num_crops > 1:
            assert not bool((source == own).any())
            others = views.whole_VCXYZ[view // num_crops * num_crops :][:num_crops]
            (other,) = set(source.int().tolist()) or {own}
            assert torch.equal(shown[cut], others[other][cut])
        elif swap_prob < 1.0 or num_crops == 1:
            # Noise stays within the intensities of its own view.
            inside = shown[cut][source == own] - 10 * own
            assert inside.numel() == 0 or (float(inside.min()) >= 0 and float(inside.max()) <= 1)
    if swap_prob == 0.0:
        assert bool((views.shown_VCXYZ // 10 == views.whole_VCXYZ // 10).all())


def test_views_are_the_same_when_a_step_is_repeated_and_others_in_the_next() -> None:
    objective, batch = made()
    losses = []
    for step in (1, 1, 2):
        objective.context = StepContext(seed=0, step=step)
        losses.append(float(objective(batch, 0.0).loss.detach()))
    assert losses[0] == losses[1] != losses[2]


def test_the_contrast_has_neither_the_pair_nor_itself_among_its_negatives() -> None:
    vectors = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    normed = F.normalize(vectors, dim=1)
    terms = []
    for view in range(8):
        pair = (view + 4) % 8
        negatives = [other for other in range(8) if other not in (view, pair)]
        positive = torch.exp(normed[view] @ normed[pair] / 0.5)
        terms.append(-torch.log(positive / (positive + torch.exp(normed[negatives] @ normed[view] / 0.5).sum())))
    assert float(view_contrast(vectors, 0.5)) == pytest.approx(float(torch.stack(terms).mean()), rel=1e-6)
    # Pairs that are the same, and all else at right angles: the loss of 6 negatives at cosine 0.
    apart = torch.eye(4, 5).repeat(2, 1)
    assert float(view_contrast(apart, 0.5)) == pytest.approx(math.log(1 + 6 * math.exp(-2.0)), rel=1e-5)
    assert {name: float(cosine) for name, cosine in pair_cosines(apart).items()} == pytest.approx(
        {"positive": 1.0, "negative": 0.0}
    )


def test_a_batch_of_one_crop_has_no_contrast_and_says_so() -> None:
    objective, batch = made()
    single = {key: value[:1] for key, value in batch.items()}
    output = objective(single, 0.0)
    assert float(output.logs["loss/contrast"]) == float(output.logs["guess/contrast"]) == 0.0
    assert "cosine/negative" not in output.logs
    output.loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in objective.parameters())
    (sentence,) = (each for each in METHOD.idle_parts(numbers(output.logs)) if each.startswith("contrast"))
    assert "--batch_size 2 or more" in sentence


def numbers(logs: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in logs.items()}


def plain_loss(objective: ThreeTasksObjective, batch: Batch) -> Tensor:
    """The paper's step: two passes, one for each view, and losses written out."""
    crops = batch["crop"][:, 0]
    views = two_views(crops, METHOD.cut_out, objective.context.generator(crops.device))
    inpainting, rotation, vectors = [], [], []
    for shown, whole, turns in zip(
        views.shown_VCXYZ.chunk(2), views.whole_VCXYZ.chunk(2), views.turns_V.chunk(2), strict=True
    ):
        top = objective.encoder.feature_maps(shown)[-1]
        pooled = top.flatten(2).sum(2) / top[0, 0].numel()
        scores = pooled @ objective.rotation.weight.T + objective.rotation.bias
        rotation += [scores[i].logsumexp(0) - scores[i, turn] for i, turn in enumerate(turns)]
        vectors.append(pooled @ objective.contrast.weight.T + objective.contrast.bias)
        features = top
        decoder = objective.inpaint
        for up, convolution, norm in zip(decoder.ups, decoder.convolutions, decoder.norms, strict=True):
            features = F.conv_transpose3d(features, up.weight, up.bias, stride=up.stride)
            features = F.conv3d(features, convolution.weight, convolution.bias, padding=1)
            mean, variance = (f(features, (1, 2, 3, 4)) for f in (torch.mean, lambda t, d: t.var(d, correction=0)))
            scaled = (features - mean.reshape(-1, 1, 1, 1, 1)) / (variance.reshape(-1, 1, 1, 1, 1) + norm.eps).sqrt()
            features = F.gelu(scaled * norm.weight.reshape(-1, 1, 1, 1) + norm.bias.reshape(-1, 1, 1, 1))
        # Each place of the finest map holds the voxels of its own cube.
        weight = decoder.pred.weight.reshape(2, 2, 2, features.shape[1]).permute(3, 0, 1, 2)[:, None]
        voxels = F.conv_transpose3d(features, weight, stride=2)
        voxels = voxels + decoder.pred.bias.reshape(2, 2, 2).repeat(*(size // 2 for size in voxels.shape[2:]))
        inpainting.append((voxels - whole).abs().mean())
    normed = [vector / vector.norm(dim=1, keepdim=True) for vector in vectors]
    cosines = torch.cat(normed) @ torch.cat(normed).T
    contrast = []
    for view in range(len(cosines)):
        others = [other for other in range(len(cosines)) if other != view]
        pair = (view + len(crops)) % len(cosines)
        contrast.append((cosines[view, others] / 0.5).logsumexp(0) - cosines[view, pair] / 0.5)
    return torch.stack(inpainting).mean() + torch.stack(rotation).mean() + torch.stack(contrast).mean()


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    objective, batch = made()
    found = []
    for loss in (objective(batch, 0.0).loss, plain_loss(objective, batch)):
        grads = torch.autograd.grad(loss, list(objective.parameters()))
        found.append((loss, grads))
    (ours, grads), (plain, plain_grads) = found
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)
    for (name, _), grad, reference in zip(objective.named_parameters(), grads, plain_grads, strict=True):
        assert float((grad - reference).abs().max()) <= 1e-5 * max(float(reference.abs().max()), 1e-2), name


def test_all_views_go_through_the_encoder_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = made()
    seen: list[int] = []
    objective.encoder.register_forward_hook(lambda _module, inputs, _maps: seen.append(len(inputs[0])))
    objective(batch, 0.0)
    assert seen == [6]


@pytest.mark.parametrize(
    ("recipe", "shape", "size"),
    [
        (Swin(), (512, 512, 120), (96, 96, 96)),
        (Swin(), (35, 50, 36), (32, 32, 32)),
        (Swin(depths=(2, 2, 2), num_heads=(3, 6, 12)), (51, 40, 36), (32, 32, 32)),
        (Hybrid(), (70, 90, 20), (64, 64, 16)),
        (ViT(token_edge=8), (35, 50, 36), (32, 32, 32)),
    ],
)
def test_crops_are_planned_within_the_scans_and_as_long_along_x_as_along_y(
    recipe: Backbone, shape: tuple[int, int, int], size: tuple[int, int, int]
) -> None:
    method = SwinUNETRSSL().planned(recipe, [shape])
    assert method.size == size
    assert f"{size[0]}x{size[1]}x{size[2]} voxels" in method.summary(recipe, [shape])[0]


@pytest.mark.parametrize(
    ("changes", "shape", "said"),
    [
        ({"size": (32, 64, 32)}, (64, 64, 64), "must be as long along X as along Y"),
        ({"size": (40, 40, 32)}, (64, 64, 64), r"axis X \(40\) is not a multiple of stride 32; use 32 or 64"),
        ({"size": (96, 96, 96)}, (40, 40, 40), r"93% of every 96x96x96 crop would be padding.*use 32x32x32"),
        ({}, (20, 20, 20), "76% of every 32x32x32 crop would be padding.*use a backbone whose input may be smaller"),
        ({"box_ratio": (0.3, 0.1)}, (64, 64, 64), "box_ratio .0.3, 0.1. must be two shares"),
        ({"box_ratio": (0.01, 0.02)}, (96, 96, 96), "and 4096 are the most"),
        ({"cut_ratio": 1.0}, (64, 64, 64), "cut_ratio .1.0. must lie between"),
        ({"swap_prob": 2.0}, (64, 64, 64), "swap_prob .2.0. is no probability"),
        ({"temperature": 0.0}, (64, 64, 64), "temperature .0.0."),
        ({"loss_weights": (0.0, 0.0, 0.0)}, (64, 64, 64), "not all of them zero"),
        ({"contrast_dim": 0}, (64, 64, 64), "contrast_dim .0."),
        ({"max_air": 2.0}, (64, 64, 64), "max_air .2.0. is no share"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], shape: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SwinUNETRSSL(**changes).planned(Swin(), [shape])


def test_logs_tell_health_from_idleness_and_collapse() -> None:
    objective, batch = made()
    logs = numbers(objective(batch, 0.0).logs)
    whole = two_views(
        batch["crop"].flatten(0, 1), METHOD.cut_out, objective.context.generator(torch.device("cpu"))
    ).whole_VCXYZ
    assert logs["guess/inpainting"] == pytest.approx(float((whole - whole.median()).abs().mean()), rel=1e-5)
    assert logs["guess/rotation"] == pytest.approx(math.log(4))
    assert logs["guess/contrast"] == pytest.approx(math.log(5))
    assert 0 <= logs["cut"] <= 0.3
    assert 0 <= logs["accuracy/rotation"] <= 1
    healthy = {**logs, "loss/inpainting": 0.1, "loss/rotation": 0.5, "loss/contrast": 0.9, "spread/features": 0.5}
    assert METHOD.idle_parts(healthy) == []
    (idle,) = METHOD.idle_parts({**healthy, "loss/rotation": 1.38})
    assert idle.startswith("rotation is idle: its loss ended at 1.380, and that of a guess is 1.386")
    assert METHOD.idle_parts({**healthy, "spread/features": 0.001})[0].startswith("the features have collapsed")
    unweighted = replace(METHOD, loss_weights=(1.0, 0.0, 1.0))
    assert unweighted.idle_parts({**healthy, "loss/rotation": 1.4}) == []


def test_pictures_show_a_view_whole_cut_and_inpainted() -> None:
    objective, batch = made(cut_ratio=0.9)
    objective.eval()
    pictures = objective.pictures(batch)
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == dict.fromkeys(
        ("view/whole", "view/cut", "view/inpainted"), (16, 16, 8)
    )
    assert not torch.equal(pictures["view/whole"], pictures["view/cut"])


def test_memory_is_known_beforehand() -> None:
    objective, batch = made()
    sample = {key: (tuple(value.shape[1:]), value.dtype) for key, value in batch.items()}
    loop = LoopSettings(max_steps=1, accelerator="cpu")
    need = StepMemory(lambda: METHOD.build(RECIPE), sample, loop, Optimisation(learning_rate=1e-3)).need(2, 1)
    values = sum(value.numel() for value in [*objective.parameters(), *objective.buffers()])
    assert need.parameters == pytest.approx(4 * values, rel=0.05)


OPTIM = Optimisation(learning_rate=1e-2, weight_decay=0.0)


def learn(out: Path, **settings: object) -> ThreeTasksObjective:
    run = Run.create(out, command="pretrain", settings={"seed": 0}, inputs={}, resume=True)
    seed_step(0, 0)
    objective = METHOD.build(RECIPE)
    scans = [random_scan((24, 20, 12), seed=seed, name=f"scan_{seed}") for seed in range(4)]
    loader = Loader(scans, METHOD.sampler(RECIPE), Intensity(), batch_size=2, seed=0, augment=None)
    loop = LoopSettings(**{"max_steps": 4, "accelerator": "cpu", "checkpoint_every": 2, "log_every": 1, **settings})
    loop = replace(loop, precision="32-true")
    train(objective, loader, run=run, loop=loop, optim=OPTIM)
    return objective


def test_a_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    whole = learn(tmp_path / "whole").state_dict()
    with killed_after(ThreeTasksObjective, 3):
        learn(tmp_path / "stopped")
    resumed = learn(tmp_path / "stopped").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_two_processes_contrast_each_its_own_views_and_average_their_gradients(tmp_path: Path) -> None:
    ((code, output),) = ended([start([sys.executable, __file__, str(tmp_path)])], timeout_s=300)
    assert code == 0, output
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    seed_step(0, 0)
    objective = METHOD.build(RECIPE)
    for rank in range(2):
        objective.context = StepContext(seed=0, step=1, rank=rank)
        (objective(batch_of(METHOD, range(2 * rank, 2 * rank + 2)), 0.0).loss / 2).backward()
    optimizer = build_optimizer(objective, make_schedule(OPTIM, effective_batch=4, max_steps=1))
    set_learning_rate(optimizer, 1e-2)
    optimizer.step()
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    trained = learn(Path(sys.argv[1]) / "run", max_steps=1, devices=2)
    torch.save(trained.state_dict(), Path(sys.argv[1]) / f"{os.environ['LOCAL_RANK']}.pt")
