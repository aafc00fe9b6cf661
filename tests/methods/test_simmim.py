"""SimMIM: the mask token stands in place of hidden blocks, only their voxels count, and a plain form agrees."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from mim3d.backbones import Hybrid, ViT
from mim3d.backbones.contract import Backbone, MaskTokenEncoder
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.loading.samples import SampleDataset
from mim3d.methods.simmim import SimMIM, SimMIMObjective
from mim3d.objective import Batch
from mim3d.scans.intensity import Intensity
from tests.array_scans import random_scan

VIT = ViT(token_edge=4, width=24, depth=2, num_heads=2)
HIPPOCAMPUS = (35, 50, 36)


class CoarseEncoder(MaskTokenEncoder):
    """Tokens of 2^3 in the stem, and a coarsest map of one place for 8^3 voxels, as hierarchical transformers have."""

    def __init__(self, recipe: "Coarse") -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = recipe, (2, 8), (6, 10)
        self.stem_size, self.stem_dim = (2, 2, 2), 6
        self.stem, self.down = nn.Conv3d(recipe.in_channels, 6, 2, stride=2), nn.Conv3d(6, 10, 6, stride=4, padding=1)

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        finer = self.stem(volume_BCXYZ)
        return [finer, self.down(finer)]

    def masked_feature_maps(self, volume_BCXYZ: Tensor, hidden_BXYZ: Tensor, token_E: Tensor) -> list[Tensor]:
        shown = torch.where(hidden_BXYZ[..., None], token_E, self.stem(volume_BCXYZ).movedim(1, -1)).movedim(-1, 1)
        return [shown, self.down(shown)]


@dataclass(frozen=True, kw_only=True)
class Coarse(Backbone):
    """Settings of it."""

    encoder_class = CoarseEncoder

    @property
    def input_multiple(self) -> Triple:
        return 8, 8, 8


#: Blocks of several places of the map, of one, and of a part of one.
CASES = [(VIT, (8, 8, 8)), (VIT, (4, 4, 8)), (Coarse(), (8, 8, 8)), (Coarse(), (4, 4, 4))]


def simmim(recipe: Backbone, mask_size: Triple) -> tuple[SimMIMObjective, Batch]:
    """An objective in float64 and a batch."""
    method = SimMIM(size=(8, 16, 16), mask_size=mask_size).planned(recipe, [(40, 40, 40)])
    torch.manual_seed(0)
    objective = method.build(recipe).double()
    dataset = SampleDataset([random_scan((40, 40, 40))], method.sampler(recipe), Intensity(), 0, None)
    batch: Batch = default_collate([dataset[0], dataset[1]])
    return objective, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def hidden_voxels(objective: SimMIMObjective, batch: Batch) -> Tensor:
    """Mask ``(B, 1, X, Y, Z)`` of the voxels inside hidden blocks."""
    mask = batch["hidden/crop"].flatten(0, 1).reshape(-1, 1, *objective.crop.unit_grid)
    for axis, edge in enumerate(objective.mask_size, start=2):
        mask = mask.repeat_interleave(edge, dim=axis)
    return mask


@pytest.mark.parametrize(("recipe", "mask_size"), CASES)
def test_the_mask_token_is_seen_in_place_of_hidden_voxels(recipe: Backbone, mask_size: Triple) -> None:
    objective, batch = simmim(recipe, mask_size)
    volume, hidden = batch["crop"].flatten(0, 1), batch["hidden/crop"].flatten(0, 1)
    mask = hidden_voxels(objective, batch)
    assert mask.double().mean().item() == pytest.approx(objective.crop.num_hidden_units / objective.crop.num_units)
    predicted, _ = objective.predict(volume, hidden)
    assert torch.equal(objective.predict(volume.masked_fill(mask, torch.nan), hidden)[0], predicted)
    assert not torch.allclose(objective.predict(volume + 1, hidden)[0], predicted)
    with torch.no_grad():
        objective.mask_token.normal_()
    assert not torch.allclose(objective.predict(volume, hidden)[0], predicted)


@pytest.mark.parametrize(
    ("recipe", "mask_size"), [*CASES, (replace(VIT, in_channels=2), (8, 8, 8)), (Coarse(in_channels=2), (4, 4, 4))]
)
def test_loss_and_gradients_are_those_of_a_plain_implementation(recipe: Backbone, mask_size: Triple) -> None:
    """Every voxel is predicted, place by place of the map, and the error of hidden ones is averaged."""
    objective, batch = simmim(recipe, mask_size)
    # A second channel, where the backbone has one.
    second = batch["crop"].flip(-1)[:, :, : recipe.in_channels - 1]
    batch["crop"] = torch.cat([batch["crop"], second], dim=2)
    volumes, mask = batch["crop"].flatten(0, 1), hidden_voxels(objective, batch)
    encoder, stride = objective.encoder, objective.stride
    stem = encoder.stem_size[0]
    (*_, features) = encoder.masked_feature_maps(volumes, mask[:, 0, ::stem, ::stem, ::stem], objective.mask_token)
    predicted = torch.zeros_like(volumes)
    for sample, place in itertools.product(range(2), itertools.product(*map(range, features.shape[2:]))):
        row = features[sample, :, place[0], place[1], place[2]] @ objective.pred.weight.T + objective.pred.bias
        x, y, z = (slice(stride * first, stride * (first + 1)) for first in place)
        predicted[sample, :, x, y, z] = row.reshape(stride, stride, stride, -1).movedim(-1, 0)
    expected = ((predicted - volumes).abs() * mask).sum() / mask.sum() / recipe.in_channels
    ours = objective(batch, 0.0).loss
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    names, parameters = zip(*objective.named_parameters(), strict=True)
    grads, theirs = (torch.autograd.grad(loss, parameters) for loss in (ours, expected))
    for name, grad, other in zip(names, grads, theirs, strict=True):
        assert other.any(), name
        assert float((grad - other).abs().max()) <= 1e-5 * float(other.abs().max()), name


def test_the_encoder_with_its_mask_token_is_the_transformer_of_the_paper() -> None:
    """The learned token replaces embedded ones before positions are added, as a plain forward pass does it."""
    objective, batch = simmim(VIT, (8, 8, 8))
    encoder, volume = objective.encoder, batch["crop"].flatten(0, 1)
    hidden = hidden_voxels(objective, batch)[:, 0, ::4, ::4, ::4]
    embedded = F.conv3d(volume, encoder.embed.weight, encoder.embed.bias, stride=4)
    embedded = torch.where(hidden[:, None], objective.mask_token[:, None, None, None], embedded)

    def shown(_module: nn.Module, _inputs: Any, _output: Tensor) -> Tensor:
        return embedded.movedim(1, -1)

    handle = encoder.embed.register_forward_hook(shown)
    (expected,) = encoder.feature_maps(volume)
    handle.remove()
    torch.testing.assert_close(encoder.masked_feature_maps(volume, hidden, objective.mask_token), [expected])


@pytest.mark.parametrize(
    ("recipe", "shape", "size", "blocks"),
    [
        (ViT(width=24, num_heads=2), (512, 512, 200), (96, 96, 96), (32, 32, 32)),
        (ViT(width=24, num_heads=2), HIPPOCAMPUS, (32, 48, 32), (16, 16, 16)),
        (ViT(token_edge=8, width=24, num_heads=2), HIPPOCAMPUS, (32, 48, 32), (16, 16, 16)),
        (ViT(token_edge=12, width=24, num_heads=2), HIPPOCAMPUS, (48, 48, 48), (48, 48, 48)),
        (Coarse(), HIPPOCAMPUS, (32, 48, 32), (16, 16, 16)),
    ],
)
def test_blocks_and_crops_suit_the_scans(recipe: Backbone, shape: Triple, size: Triple, blocks: Triple) -> None:
    if size == blocks:
        with pytest.raises(ConfigError, match="of 1 units; at least one must be hidden"):
            SimMIM().planned(recipe, [shape])
        return
    planned = SimMIM().planned(recipe, [shape])
    assert (planned.size, planned.mask_size) == (size, blocks)
    assert planned.planned(recipe, [shape]) == planned
    assert planned.summary(recipe, [shape])[0].startswith(f"crop: {'x'.join(map(str, size))} voxels, ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_size": (6, 8, 8)}, r"a block must hold whole tokens of 4 voxels.*; use 4, or leave mask_size out"),
        ({"mask_size": (0, 8, 8)}, "a block must hold whole tokens"),
        ({"size": (36, 32, 32), "mask_size": (8, 8, 8)}, r"method.size axis X \(36\) .* use 32 or 40"),
        ({"mask_ratio": 0.01}, "hides 0 of"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SimMIM(**changes).planned(VIT, [HIPPOCAMPUS])


def test_an_encoder_without_mask_tokens_is_refused_in_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"method SimMIM needs a MaskTokenEncoder, which the encoder of .* is not"):
        SimMIM().planned(Hybrid(), [HIPPOCAMPUS])


def test_logs_hold_the_loss_of_a_constant_guess() -> None:
    objective, batch = simmim(VIT, (8, 8, 8))
    logs = objective(batch, 0.0).logs
    voxels = batch["crop"].flatten(0, 1)[hidden_voxels(objective, batch)]
    assert float(logs["guess/crop"]) == pytest.approx(float((voxels - voxels.median()).abs().mean()))
    assert SimMIM().idle_parts({key: float(value) for key, value in logs.items()} | {"loss/crop": 0.9}) != []
