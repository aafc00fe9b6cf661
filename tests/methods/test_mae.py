"""The masked autoencoder: hidden voxels are not seen, MiM's only level is the same, and a plain form agrees."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from mim3d.backbones import Hybrid, ViT, create_recipe
from mim3d.backbones.contract import Backbone, Encoder, VisibleEncoder
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.loading.samples import SampleDataset
from mim3d.methods.mae import MAE, DenseMAEObjective, MAEObjective
from mim3d.methods.masked_crop import MaskedCropMethod
from mim3d.methods.mim.hierarchy import Level
from mim3d.methods.mim.method import MiM
from mim3d.methods.simmim import SimMIM
from mim3d.nn.decoder import MapDecoder
from mim3d.nn.tokens import sincos_positions
from mim3d.objective import Batch
from mim3d.scans.intensity import Intensity
from tests.array_scans import random_scan

VIT = ViT(token_edge=4, width=24, depth=2, num_heads=2)
HYBRID = Hybrid(widths=(6, 12, 24), depths=(1, 1, 1), num_heads=2)
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2}
HIPPOCAMPUS = (35, 50, 36)


class StagesEncoder(Encoder):
    """Two convolutions, each of which halves the grid and sees across its places."""

    def __init__(self, recipe: "Stages") -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = recipe, (2, 4), (4, 6)
        self.stages = nn.ModuleList(
            nn.Conv3d(a, b, 4, stride=2, padding=1) for a, b in ((recipe.in_channels, 4), (4, 6))
        )

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        finer = self.stages[0](volume_BCXYZ).tanh()
        return [finer, self.stages[1](finer).tanh()]


@dataclass(frozen=True, kw_only=True)
class Stages(Backbone):
    """Settings of it."""

    encoder_class = StagesEncoder

    @property
    def input_multiple(self) -> Triple:
        return 4, 4, 4


def batch_of(method: MiM | MaskedCropMethod, recipe: Backbone, samples: int = 2) -> Batch:
    scans = [random_scan((40, 40, 40), seed=seed, name=f"scan_{seed}") for seed in range(2)]
    dataset = SampleDataset(scans, method.sampler(recipe), Intensity(), 0, None)
    return default_collate([dataset[index] for index in range(samples)])


def mae(recipe: Backbone, **changes: Any) -> tuple[Any, Batch]:
    """An objective in float64 and a batch."""
    own = DECODER if issubclass(recipe.encoder_class, VisibleEncoder) else {}
    method = MAE(**{"size": (8, 16, 16), **own, **changes}).planned(recipe, [(40, 40, 40)])
    torch.manual_seed(0)
    objective = method.build(recipe).double()
    batch = {
        key: value.double() if value.is_floating_point() else value for key, value in batch_of(method, recipe).items()
    }
    return objective, batch


def gradients(objective: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*objective.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same(objective: nn.Module, ours: Tensor, plain: Tensor) -> None:
    """Loss and the gradient of every parameter, relative to its largest value."""
    assert ours.item() == pytest.approx(plain.item(), rel=1e-5)
    theirs = gradients(objective, plain)
    for name, grad in gradients(objective, ours).items():
        assert float((grad - theirs[name]).abs().max()) <= 1e-5 * float(theirs[name].abs().max()), name


def test_mim_with_one_level_is_the_masked_autoencoder() -> None:
    """The same masks, voxels and first weights, and the same loss and gradients."""
    autoencoder = MAE(mask_ratio=0.6, **DECODER).planned(HYBRID, [(40, 40, 40)])
    assert autoencoder.size is not None
    level = Level(name="crop", footprint=autoencoder.size, size=autoencoder.size, mask_ratio=0.6)
    mim = MiM(levels=(level,), **DECODER).planned(HYBRID, [(40, 40, 40)])
    losses, grads = [], []
    for method in (autoencoder, mim):
        torch.manual_seed(0)
        objective, batch = method.build(HYBRID), batch_of(method, HYBRID)
        loss = objective(batch, 0.0).loss
        losses.append((loss.item(), batch))
        grads.append(gradients(objective, loss))
    (ours, batch), (theirs, other) = losses
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert batch.keys() == other.keys() and all(torch.equal(batch[key], other[key]) for key in batch)
    assert batch["hidden/crop"].sum(-1).unique().tolist() == [math.floor(0.6 * 125 + 0.5)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("recipe", [VIT, HYBRID, Stages()], ids=lambda recipe: type(recipe).__name__)
def test_predictions_see_no_hidden_voxel_and_every_parameter_learns(recipe: Backbone) -> None:
    objective, batch = mae(recipe, size=(16, 16, 16))
    volume, hidden = batch["crop"].flatten(0, 1), batch["hidden/crop"].flatten(0, 1)
    mask = hidden.reshape(-1, 1, *objective.crop.token_grid)
    for axis, edge in enumerate(objective.mask_size, start=2):
        mask = mask.repeat_interleave(edge, dim=axis)
    predicted, _ = objective.predict(volume, hidden)
    assert torch.equal(objective.predict(volume.masked_fill(mask, torch.nan), hidden)[0], predicted)
    assert not torch.allclose(objective.predict(volume + 1, hidden)[0], predicted)
    # Only hidden voxels are in the loss: visible ones may be anything where they do not change the prediction.
    objective.predict = lambda volume, hidden: (predicted, predicted)
    changed = {**batch, "crop": torch.where(mask, volume, 5.0).reshape(batch["crop"].shape)}
    assert objective(changed, 0.0).loss == objective(batch, 0.0).loss
    del objective.predict
    assert all(grad.any() for grad in gradients(objective, objective(batch, 0.0).loss).values())


def plain_block(tokens: Tensor, weights: dict[str, Tensor], prefix: str, num_heads: int) -> Tensor:
    """One pre-norm block of one sample ``(L, E)``, head by head."""

    def linear(values: Tensor, name: str) -> Tensor:
        return values @ weights[f"{prefix}{name}.weight"].T + weights[f"{prefix}{name}.bias"]

    def norm(values: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            values, values.shape[-1:], *(weights[f"{prefix}{name}.{end}"] for end in ("weight", "bias")), 1e-6
        )

    query, key, value = linear(norm(tokens, "norm1"), "attn.qkv").chunk(3, dim=-1)
    heads = []
    for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (query, key, value)), strict=True):
        heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
    tokens = tokens + linear(torch.cat(heads, dim=-1), "attn.proj")
    return tokens + linear(F.gelu(linear(norm(tokens, "norm2"), "mlp.fc1")), "mlp.fc2")


def plain_mae(objective: MAEObjective, batch: Batch) -> Tensor:
    """The paper's algorithm sample by sample and token by token, on the parameters of ours."""
    weights, edge = dict(objective.named_parameters()), VIT.token_edge
    errors = []
    for volume, hidden in zip(batch["crop"].flatten(0, 1), batch["hidden/crop"].flatten(0, 1), strict=True):
        grid = [voxels // edge for voxels in volume.shape[1:]]
        embedded = F.conv3d(volume[None], weights["encoder.embed.weight"], weights["encoder.embed.bias"], stride=edge)
        places = sincos_positions((grid[0], grid[1], grid[2]), VIT.width).double()
        tokens = (embedded[0].flatten(1).T + places)[~hidden]
        for number in range(VIT.depth):
            tokens = plain_block(tokens, weights, f"encoder.blocks.{number}.", VIT.num_heads)
        tokens = F.layer_norm(tokens, (VIT.width,), weights["encoder.norm.weight"], weights["encoder.norm.bias"], 1e-6)
        shown = iter(tokens @ weights["decoder.embed.weight"].T + weights["decoder.embed.bias"])
        rows = [weights["decoder.mask_token"][0, 0] if is_hidden else next(shown) for is_hidden in hidden.tolist()]
        row_places = sincos_positions((grid[0], grid[1], grid[2]), 12).double()
        tokens = plain_block(torch.stack(rows) + row_places, weights, "decoder.blocks.0.", 2)
        tokens = F.layer_norm(tokens, (12,), weights["decoder.norm.weight"], weights["decoder.norm.bias"], 1e-6)
        predicted = tokens @ weights["decoder.pred.weight"].T + weights["decoder.pred.bias"]
        for index in hidden.nonzero().flatten().tolist():
            z, rest = index % grid[2], index // grid[2]
            x, y = rest // grid[1], rest % grid[1]
            box = [slice(edge * first, edge * (first + 1)) for first in (x, y, z)]
            voxels = volume[0][box[0], box[1], box[2]].flatten()
            target = (voxels - voxels.mean()) / (voxels.var() + 1e-6).sqrt()
            errors.append((predicted[index] - target).square())
    return torch.cat(errors).mean()


def test_loss_and_gradients_are_those_of_a_plain_implementation() -> None:
    objective, batch = mae(VIT)
    assert_same(objective, objective(batch, 0.0).loss, plain_mae(objective, batch))


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("fill", ["learned", "zero"])
def test_dense_loss_and_gradients_are_those_of_a_plain_implementation(fill: str, skips: bool) -> None:
    """Places are filled, predicted and compared one by one, by the library's own layers."""
    objective, batch = mae(Stages(), mask_fill=fill, skip_connections=skips, normalise_targets=False)
    weights = dict(objective.named_parameters())
    volumes, masks = batch["crop"].flatten(0, 1), batch["hidden/crop"].flatten(0, 1)
    boxes = [
        tuple(slice(8 * first, 8 * first + 8) for first in place)
        for place in torch.cartesian_prod(*map(torch.arange, (1, 2, 2)))
    ]
    token = weights["mask_token"].reshape(8, 8, 8) if fill == "learned" else torch.zeros(8, 8, 8).double()
    errors = []
    for volume, hidden in zip(volumes, masks, strict=True):
        shown = volume[0].clone()
        for place, box in enumerate(boxes):
            if hidden[place]:
                shown[box] = token
        finer, coarser = objective.encoder.feature_maps(shown[None, None])
        features = F.conv_transpose3d(coarser, weights["decoder.ups.0.weight"], weights["decoder.ups.0.bias"], stride=2)
        if skips:
            features = features + F.conv3d(finer, weights["decoder.skips.0.weight"], weights["decoder.skips.0.bias"])
        features = F.conv3d(
            features, *(weights[f"decoder.convolutions.0.{end}"] for end in ("weight", "bias")), padding=1
        )
        features = F.gelu(F.group_norm(features, 1, weights["decoder.norms.0.weight"], weights["decoder.norms.0.bias"]))
        voxels = F.conv3d(features, weights["decoder.pred.weight"], weights["decoder.pred.bias"])[0]
        predicted = voxels.reshape(2, 2, 2, 4, 8, 8).permute(3, 0, 4, 1, 5, 2).reshape(8, 16, 16)
        errors += [(predicted[box] - volume[0][box]).square().flatten() for p, box in enumerate(boxes) if hidden[p]]
    assert_same(objective, objective(batch, 0.0).loss, torch.cat(errors).mean())


def test_without_skip_connections_the_coarsest_map_alone_is_decoded() -> None:
    maps = [torch.rand(1, 4, 8, 8, 8), torch.rand(1, 6, 4, 4, 4)]
    for skips in (True, False):
        decoder = MapDecoder((2, 4), (4, 6), 1, skip_connections=skips)
        assert torch.equal(decoder(maps), decoder([maps[0] + 1, maps[1]])) != skips
    single = MapDecoder((4,), (6,), 2, skip_connections=True)
    assert single(maps[1:]).shape == (1, 2, 16, 16, 16)


@pytest.mark.parametrize(
    ("recipe", "size", "places"),
    [
        (ViT(token_edge=8, width=24, num_heads=2), (32, 48, 32), (8, 8, 8)),
        (ViT(width=24, num_heads=2), (32, 48, 32), (16, 16, 16)),
        (HYBRID, (32, 48, 32), (8, 8, 8)),
        (Stages(), (32, 48, 32), (8, 8, 8)),
    ],
)
def test_small_scans_get_crops_that_fit_them(recipe: Backbone, size: Triple, places: Triple) -> None:
    planned = MAE().planned(recipe, [HIPPOCAMPUS])
    assert (planned.size, planned.mask_size) == (size, places)
    assert planned.summary(recipe, [HIPPOCAMPUS])[0].startswith(f"crop: {'x'.join(map(str, size))} voxels")
    assert planned.planned(recipe, [HIPPOCAMPUS]) == planned


def test_large_scans_get_the_papers_crop() -> None:
    assert MAE().planned(ViT(), [(512, 512, 200)]).size == (96, 96, 96)
    planned = MAE().planned(Stages(), [(512, 512, 200)])
    assert (planned.size, planned.mask_size) == ((96, 96, 96), (16, 16, 16))
    assert isinstance(MAE(**DECODER).build(VIT), MAEObjective)
    assert isinstance(MAE().build(Stages()), DenseMAEObjective)


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (VIT, {"size": (96, 96, 96)}, r"93% of every 96x96x96 crop would be padding.*\(median\); use 24x24x24"),
        (VIT, {"size": (30, 32, 32)}, r"method.size axis X \(30\) is not a multiple of stride 4; use 28 or 32"),
        (VIT, {"mask_size": (8, 8, 8)}, "mask_size is 8, but this backbone hides its tokens of 4 voxels; leave"),
        (Stages(), {"mask_size": (0, 8, 8)}, "mask_size .* must be at least 1 voxel"),
        (VIT, {"mask_ratio": 1.0}, "hides 216 of 216 units; at least one must be hidden and one visible"),
        (VIT, {"decoder_dim": 13}, r"decoder_dim \(13\) is not a multiple of method.decoder_num_heads"),
        (ViT(token_edge=64, width=24, num_heads=2), {}, "use a backbone with smaller tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(recipe: Backbone, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MAE(**{**DECODER, **changes}).planned(recipe, [HIPPOCAMPUS])


@pytest.mark.parametrize(
    ("recipe", "changes", "said"),
    [
        (
            Stages(),
            {"decoder_depth": 4},
            r"decoder_depth \(4\) means nothing for a backbone of feature maps.*leave it",
        ),
        (
            HYBRID,
            {"mask_fill": "zero"},
            r"mask_fill \(zero\) means nothing for an encoder .* hybrid is",
        ),
        (VIT, {"skip_connections": False}, r"skip_connections \(False\) means nothing"),
    ],
)
def test_settings_that_would_be_passed_over_are_refused(recipe: Backbone, changes: dict[str, Any], said: str) -> None:
    method = MAE(**changes)
    for ask in (method.check_backbone, method.build):
        with pytest.raises(ConfigError, match=said):
            ask(recipe)
    planned = MAE().planned(recipe, [HIPPOCAMPUS])
    planned.check_backbone(recipe)


@pytest.mark.parametrize(
    ("recipe", "floor"),
    [
        *(({"name": name}, 1e-3) for name in ("hybrid_nano", "vit_nano", "swin_nano", "resenc_nano")),
        *(({"name": name}, 3e-4) for name in ("hybrid_base", "swin_tiny", "resenc_s")),
        (Stages(), 1e-4),
    ],
)
def test_the_floor_of_the_rate_follows_the_width_of_the_coarsest_map(recipe: Any, floor: float) -> None:
    recipe = create_recipe(recipe) if isinstance(recipe, dict) else recipe
    assert MAE().least_learning_rate(recipe) == SimMIM().least_learning_rate(recipe) == floor


def test_logs_tell_health_from_collapse() -> None:
    method = MAE(size=(16, 16, 16), **DECODER).planned(VIT, [(40, 40, 40)])
    objective, batch = method.build(VIT), batch_of(method, VIT)
    logs = objective(batch, 0.0).logs
    assert set(logs) == {"loss/crop", "guess/crop", "spread/crop", "air"}
    # Of the unbiased variance that voxels are divided by, a guess of their mean misses (n - 1) / n.
    assert float(logs["guess/crop"]) == pytest.approx(63 / 64, rel=1e-3)
    assert 0.1 < float(logs["spread/crop"]) <= 1.1
    healthy = {"loss/crop": 0.8, "guess/crop": 0.98, "spread/crop": 0.5}
    assert method.idle_parts(healthy) == []
    assert "that of a constant guess is 0.980" in method.idle_parts({**healthy, "loss/crop": 0.979})[0]
    assert "the encoder has collapsed" in method.idle_parts({**healthy, "spread/crop": 0.001})[0]
    with torch.no_grad():
        assert isinstance(objective.encoder.norm, nn.LayerNorm)
        objective.encoder.norm.weight.zero_()
        objective.encoder.norm.bias.fill_(1.0)
    assert float(objective(batch, 0.0).logs["spread/crop"]) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("build", [lambda: mae(VIT), lambda: mae(Stages())])
def test_pictures_show_hidden_places_as_hidden_and_visible_ones_as_they_are(build: Callable[[], Any]) -> None:
    objective, batch = build()
    pictures = objective.pictures(batch)
    assert set(pictures) == {"crop/original", "crop/masked", "crop/reconstructed"}
    shown = pictures["crop/masked"] != 0
    assert shown.float().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(pictures["crop/reconstructed"][shown], pictures["crop/original"][shown])
    assert not torch.equal(pictures["crop/reconstructed"], pictures["crop/original"])
