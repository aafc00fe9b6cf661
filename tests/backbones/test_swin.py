"""Swin: MONAI's encoder to the digit, windows without masks, and attention without stored scores."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.yardstick.monai_swin import as_monai_names, monai_swin
from mim3d.backbones import create_model, create_recipe
from mim3d.backbones.swin import MERGING_ORDERS, Swin, SwinEncoder
from mim3d.core.errors import ConfigError
from mim3d.kernels.biased_attention import biased_attention
from mim3d.kernels.machine import CHUNK_BYTES
from mim3d.nn.windows import WindowAttention, merge_neighbours, relative_places, window_runs

#: Four stages, as MONAI's forward pass has them.
NARROW = {"feature_size": 12, "depths": (2, 2, 1, 1), "num_heads": (2, 3, 4, 6)}
TWO_STAGES = {"feature_size": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 3}


def swin(**changes: Any) -> SwinEncoder:
    torch.manual_seed(0)
    encoder = create_model("swin", **{**TWO_STAGES, **changes})
    assert isinstance(encoder, SwinEncoder)
    return encoder


def random_volume(*size: int) -> Tensor:
    return torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(1))


def gradients(encoder: nn.Module, volume: Tensor) -> dict[str, Tensor]:
    maps = encoder(volume)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(features.shape, generator=generator, dtype=features.dtype) for features in maps]
    loss = torch.stack([(features * direction).sum() for features, direction in zip(maps, directions, strict=True)])
    encoder.zero_grad()
    loss.sum().backward()
    return {name: parameter.grad for name, parameter in encoder.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        # Grids of 16 and 8 tokens do not fill windows of 7; those of 4 and 2 are shorter than one.
        ({}, (32, 32, 32)),
        ({"v2": True}, (32, 32, 32)),
        ({"downsample": "mergingv2", "window_size": 4, "in_channels": 1}, (32, 64, 32)),
    ],
)
def test_maps_and_gradients_are_those_of_monai_with_the_same_weights(
    changes: dict[str, Any], size: tuple[int, int, int]
) -> None:
    recipe = Swin(**{**NARROW, **changes})
    torch.manual_seed(0)
    ours, theirs = recipe.build(), monai_swin(recipe)
    ours.load_state_dict(as_monai_names(theirs.state_dict()))
    volume = random_volume(*size)[:1]
    with torch.no_grad():
        for features, expected in zip(ours(volume), theirs(volume), strict=True):
            torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = ours.double(), theirs.double()
    found, expected_grads = gradients(ours, volume.double()), gradients(theirs, volume.double())
    for name, grad in found.items():
        assert float((grad - expected_grads[name]).abs().max()) <= 1e-9 * float(expected_grads[name].abs().max()), name


@pytest.mark.parametrize("v2", [False, True])
def test_names_and_shapes_are_those_of_monai_without_its_tables(v2: bool) -> None:
    recipe = Swin(feature_size=12, v2=v2)
    ours, theirs = recipe.build().state_dict(), as_monai_names(monai_swin(recipe).state_dict())
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


@pytest.mark.parametrize("window", [2, 3, 4, 7])
def test_windows_are_those_that_rolling_and_masking_leave(window: int) -> None:
    for size, shifted in itertools.product(range(window, 3 * window + 2), (False, True)):
        shift = window // 2 if shifted and size > window else 0
        whole = -(-size // window) * window
        # Which window a token lies in when the grid is rolled, and which side of the seam within it.
        rolled = [((place - shift) % whole) for place in range(whole)]
        region = [(place // window, shift > 0 and place >= whole - shift) for place in rolled]
        runs = window_runs(size, window, shift)
        first, found = 0, []
        for run in runs:
            assert run.shown == run.length or run.count == 1
            for _ in range(run.count):
                keys = range(first, first + run.length)
                assert {region[place] for place in keys} == {region[first]}
                assert sum(cell == region[first] for cell in region) == run.length
                assert rolled[first] % window == run.place
                found += [place for place in keys if place < size]
                assert run.shown == sum(place < size for place in keys)
                first += run.length
        assert found == list(range(size))


def test_relative_places_number_the_offsets() -> None:
    places = relative_places(3)
    one, other = 1 * 9 + 2 * 3 + 0, 2 * 9 + 0 * 3 + 1
    assert int(places[one, other]) == (1 - 2 + 2) * 25 + (2 - 0 + 2) * 5 + (0 - 1 + 2)
    assert places.shape == (27, 27)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5 + bias).softmax(-1) @ value


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("windows", "heads", "queries", "keys"), [(5, 2, 4, 6), (1, 3, 7, 7), (40, 1, 90, 100)])
@pytest.mark.parametrize("channels", [5, 16])
def test_attention_with_a_learned_bias_equals_the_scores_written_out(
    windows: int, heads: int, queries: int, keys: int, channels: int, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**17)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    # As a window's projections lie side by side, or each of them for itself.
    tokens = [random(windows, rows, 3, heads, channels)[:, :, 1].transpose(1, 2) for rows in (queries, keys, keys)]
    inputs = [*(tokens if strided else [each.contiguous() for each in tokens]), random(heads, queries, keys)]
    inputs = [each.requires_grad_() for each in inputs]
    direction = random(windows, heads, queries, channels)
    found, expected = (attend(*inputs) for attend in (biased_attention, plain_attention))
    torch.testing.assert_close(found, expected)
    grads, expected_grads = (torch.autograd.grad((each * direction).sum(), inputs) for each in (found, expected))
    for grad, reference in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference)


def test_attention_in_bfloat16_has_the_gradients_of_float32_up_to_rounding() -> None:
    narrow = [torch.randn(20, 2, 9, 8).bfloat16().requires_grad_() for _ in range(3)]
    narrow.append(torch.randn(2, 9, 9, requires_grad=True))
    wide = [each.detach().float().requires_grad_() for each in narrow]
    direction = torch.randn(20, 2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = biased_attention(*narrow)
        grads = torch.autograd.grad((found * direction).sum(), narrow)
    expected = plain_attention(*wide)
    assert found.dtype == grads[0].dtype == torch.bfloat16
    assert grads[3].dtype == torch.float32
    pairs = zip((found, *grads), (expected, *torch.autograd.grad((expected * direction).sum(), wide)), strict=True)
    for one, other in pairs:
        assert float((one.float() - other).detach().norm()) <= 0.02 * float(other.detach().norm())


def test_attention_keeps_no_scores_for_the_backward_pass() -> None:
    query, key, value = (torch.rand(64, 2, 30, 4, requires_grad=True) for _ in range(3))
    bias = torch.rand(2, 30, 30, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        biased_attention(query, key, value, bias)
    assert max(tensor.numel() for tensor in kept) <= query.numel()


def test_tokens_of_parts_that_a_shift_cuts_apart_do_not_see_each_other() -> None:
    attention = WindowAttention(4, 2, 4, shifted=True)
    tokens = torch.rand(1, 8, 8, 8, 4)
    other = tokens.clone()
    other[:, 2:] = 0.0
    with torch.no_grad():
        seen, changed = (attention(grid, relative_places(4)) for grid in (tokens, other))
    torch.testing.assert_close(seen[:, :2], changed[:, :2])
    assert not torch.allclose(seen[:, 2:], changed[:, 2:])


@pytest.mark.parametrize("order", sorted(MERGING_ORDERS))
def test_neighbours_are_merged_in_the_order_that_is_asked_for(order: str) -> None:
    tokens = torch.rand(1, 4, 2, 6, 3)
    merged = merge_neighbours(tokens, MERGING_ORDERS[order]).unflatten(-1, (8, 3))
    for place, (x, y, z) in enumerate(MERGING_ORDERS[order]):
        assert torch.equal(merged[..., place, :], tokens[:, x::2, y::2, z::2])
    read = set(MERGING_ORDERS[order])
    assert len(read) == (6 if order == "published" else 8)


def test_a_learned_token_stands_in_place_of_hidden_ones_after_the_embedding() -> None:
    encoder = swin()
    volume, token = random_volume(16, 16, 16), torch.full((8,), 0.5)
    hidden = torch.rand(2, 8, 8, 8) < 0.5
    finest = encoder.masked_feature_maps(volume, hidden, torch.arange(8.0))[0]
    expected = torch.nn.functional.layer_norm(torch.arange(8.0), (8,))
    assert torch.allclose(finest.movedim(1, -1)[hidden], expected)
    everything = encoder.masked_feature_maps(volume, torch.ones_like(hidden), token)
    assert torch.equal(everything[-1][0], everything[-1][1])


def test_recomputation_and_drop_path_keep_the_gradients() -> None:
    volume = random_volume(8, 16, 8)
    found = []
    for recompute in (False, True):
        encoder = swin(recompute=recompute, drop_path=0.5, v2=True)
        torch.manual_seed(3)
        found.append(gradients(encoder, volume))
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())
    plain = gradients(swin(v2=True), volume)
    assert any(not torch.equal(plain[name], grad) for name, grad in found[0].items())


def test_nothing_that_follows_from_the_window_is_in_a_checkpoint() -> None:
    assert not [name for name in swin().state_dict() if "places" in name or "index" in name]


def test_layers_go_block_by_block_from_the_stem_to_the_last_merging() -> None:
    encoder = swin(v2=True)
    layers = {name: encoder.layer_of(name) for name in encoder.state_dict()}
    assert encoder.num_layers == 5
    assert layers["patch_embed.proj.weight"] == 0
    assert layers["layers1c.0.layer.conv1.conv.weight"] == layers["layers1.0.blocks.0.norm1.weight"] == 1
    assert layers["layers1.0.blocks.1.attn.qkv.bias"] == 2
    assert layers["layers1.0.downsample.norm.bias"] == layers["layers2.0.blocks.0.mlp.linear1.bias"] == 3
    assert layers["layers2c.0.layer.conv2.conv.weight"] == 3
    assert layers["layers2.0.downsample.reduction.weight"] == 5


@pytest.mark.parametrize(
    ("name", "features", "strides", "millions"),
    [
        ("swin_nano", 24, (2, 4, 8), 0.158),
        ("swin_tiny", 24, (2, 4, 8, 16, 32), 2.17),
        ("swin_small", 48, (2, 4, 8, 16, 32), 8.1),
        ("swin_base", 96, (2, 4, 8, 16, 32), 31.8),
        ("swin_large", 192, (2, 4, 8, 16, 32), 126.8),
    ],
)
def test_ready_sizes_have_the_features_of_swinunetr(
    name: str, features: int, strides: tuple[int, ...], millions: float
) -> None:
    with torch.device("meta"):
        encoder = create_recipe(name).build()
    assert encoder.widths == tuple(features * 2**level for level in range(len(strides)))
    assert encoder.strides == strides
    assert sum(parameter.numel() for parameter in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depths": (2, 2, 2)}, r"depths \[2, 2, 2\] and num_heads \[2, 4\] must have one entry per stage"),
        ({"num_heads": (3, 4)}, "a stage of width 8 cannot have 3 heads"),
        ({"depths": (0, 2)}, "depths .0, 2. must be 1 to 8 numbers, each from 1 to 1000"),
        ({"window_size": 0}, "window_size .0. must be"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        swin(**changes)


def test_an_input_that_is_no_multiple_of_the_coarsest_token_is_refused_with_sizes_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"axis Y \(12\) is not a multiple of stride 8; use 8 or 16"):
        swin()(random_volume(16, 12, 16))
