"""What every registered method, backbone and task must do, in every combination: a new one is tested by existing."""

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from mim3d.backbones import BACKBONES, Backbone, MaskTokenEncoder, VisibleEncoder, create_recipe
from mim3d.core.errors import ConfigError
from mim3d.core.settings import resolve, to_named
from mim3d.loading.samples import SampleDataset
from mim3d.methods import METHODS, Method, create_method
from mim3d.objective import Objective, StepOutput
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from tests.array_scans import ArrayScan, random_scan

LABELS = {0: "background", 1: "left part", 3: "right part"}


#: Settings of each kind of backbone at a width and depth that a test can train.
SMALL: dict[str, dict[str, Any]] = {
    "hybrid": {"widths": (6, 12, 24), "depths": (1, 1, 1), "num_heads": 2},
    "resenc": {"widths": (4, 6, 8), "depths": (1, 1, 1)},
    "swin": {"feature_size": 6, "depths": (1, 2), "num_heads": (1, 2), "window_size": 3},
    "vit": {"token_edge": 8, "width": 24, "depth": 1, "num_heads": 2},
    "primus_nano": {"width": 24, "depth": 1, "num_heads": 2},
}

#: Every kind of backbone, not every size of it.
KINDS = sorted({*(name for name, entry in BACKBONES.items() if isinstance(entry, type)), *SMALL})


def small(kind: str) -> Backbone:
    """The registered recipe at a width and depth that a test can train."""
    return create_recipe({"name": kind, **SMALL[kind]})


def small_method(name: str, recipe: Backbone, shape: tuple[int, int, int]) -> Method:
    """The registered method, planned for a scan, with a decoder that a test can train."""
    method = create_method(name)
    decoder = {"decoder_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
    # A decoder of tokens is that of encoders that are shown the visible ones.
    known = {field.name for field in fields(method)} if issubclass(recipe.encoder_class, VisibleEncoder) else set()
    changes = {key: value for key, value in decoder.items() if key in known}
    return replace(method, **changes).planned(recipe, [shape])


def labelled_scan(edge: int, class_name: str = LABELS[1]) -> ArrayScan:
    scan = random_scan((edge, edge, edge))
    scan.label = np.zeros((edge, edge, edge), dtype=np.uint8)
    scan.label[4:12, 4:12, 4:12], scan.label[12:20, 4:12, 4:12] = 1, 3
    scan.class_locations = {value: np.argwhere(scan.label == value) for value in (1, 3)}
    scan.class_name = class_name
    return scan


def check_step(objective: Objective, batch: dict[str, torch.Tensor]) -> None:
    output = objective(batch, 0.5)
    assert isinstance(output, StepOutput)
    assert output.loss.ndim == 0
    assert torch.isfinite(output.loss)
    assert all(not value.requires_grad and value.ndim == 0 for value in output.logs.values())
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in objective.encoder.parameters())
    objective.after_step(0.5)
    objective.eval()
    assert all(picture.ndim == 3 for picture in objective.pictures(batch).values())


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_settings_of_every_ready_size_are_stored_and_found_again(name: str) -> None:
    recipe = create_recipe(name)
    assert resolve(to_named(recipe, BACKBONES), BACKBONES, "backbone") == recipe


@pytest.mark.parametrize("kind", KINDS)
def test_backbone_keeps_the_encoders_contract(kind: str) -> None:
    recipe = small(kind)
    assert resolve(to_named(recipe, BACKBONES), BACKBONES, "backbone") == recipe
    encoder = recipe.build().eval()
    x, y, z = (2 * voxels for voxels in recipe.input_multiple)
    assert isinstance(encoder, recipe.encoder_class)
    assert (encoder.input_multiple, encoder.token_size) == (recipe.input_multiple, recipe.token_size)
    volume = torch.rand(2, 1, x, y, 2 * z)
    maps = encoder(volume)
    shapes = [(2, w, x // s, y // s, 2 * z // s) for w, s in zip(encoder.widths, encoder.strides, strict=True)]
    assert [tuple(features.shape) for features in maps] == shapes
    if isinstance(encoder, VisibleEncoder):
        visible = torch.arange(0, 16, 2).repeat(2, 1)
        assert encoder.encode_visible(volume, visible).shape == (2, 8, encoder.embed_dim)
    if isinstance(encoder, MaskTokenEncoder):
        check_mask_tokens(encoder, volume, maps)


@torch.no_grad()
def check_mask_tokens(encoder: MaskTokenEncoder, volume: torch.Tensor, maps: list[torch.Tensor]) -> None:
    """Hidden voxels are not seen, visible ones are, and with nothing hidden nothing changes."""
    grid = [voxels // edge for voxels, edge in zip(volume.shape[2:], encoder.stem_size, strict=True)]
    hidden, token = torch.zeros(2, *grid, dtype=torch.bool), torch.ones(encoder.stem_dim)
    for shown, plain in zip(encoder.masked_feature_maps(volume, hidden, token), maps, strict=True):
        torch.testing.assert_close(shown, plain)
    hidden[:, : grid[0] // 2] = True
    other = volume.clone()
    other[:, :, : volume.shape[2] // 2] = torch.nan
    masked = encoder.masked_feature_maps(volume, hidden, token)
    assert all(map(torch.equal, masked, encoder.masked_feature_maps(other, hidden, token)))
    assert not torch.allclose(masked[-1], maps[-1])


@pytest.mark.parametrize("backbone", KINDS)
@pytest.mark.parametrize("name", sorted(METHODS))
def test_method_trains_every_backbone_that_has_what_it_needs(name: str, backbone: str) -> None:
    recipe = small(backbone)
    if not issubclass(recipe.encoder_class, create_method(name).needs):
        with pytest.raises(ConfigError, match=f"method {name} needs a .* which the encoder of backbone {backbone} is"):
            create_method(name).check_backbone(recipe)
        return
    x, y, z = (4 * voxels for voxels in recipe.input_multiple)
    scan = random_scan((x, y, z))
    method = small_method(name, recipe, scan.shape)
    method.check_backbone(recipe)
    assert resolve(to_named(method, METHODS), METHODS, "method") == method
    assert method.summary(recipe, [scan.shape])
    assert method.optimisation.learning_rate or method.optimisation.base_learning_rate
    dataset = SampleDataset([scan], method.sampler(recipe), Intensity(), 0, None)
    check_step(method.build(recipe), default_collate([dataset[0], dataset[1]]))


@pytest.mark.parametrize("backbone", KINDS)
@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_trains_every_backbone(name: str, backbone: str) -> None:
    recipe = small(backbone)
    scan, other = (labelled_scan(2 * max(recipe.input_multiple), LABELS[label]) for label in (1, 3))
    task = create_task(name).checked(recipe).planned(recipe, [scan], LABELS)
    assert resolve(to_named(task, TASKS), TASKS, "task") == task
    dataset = SampleDataset([scan], task.sampler(), Intensity(), 0, task.augment())
    objective = task.build(recipe, LABELS)
    check_step(objective, default_collate([dataset[0], dataset[1]]))
    assert 0 <= task.validate(objective, [scan, other], Intensity(), LABELS)[task.best_by] <= 1
