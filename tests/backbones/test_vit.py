"""The plain vision transformer: visible tokens alone, positions, registers, and the form of Primus."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones import create_model, create_recipe
from mim3d.backbones.vit import ViTEncoder
from mim3d.core.errors import ConfigError
from mim3d.nn.tokens import rotary_angles, rotate, sincos_positions
from mim3d.training.optim import decay_groups
from tests.primus import PlainPrimus

SMALL = {"token_edge": 4, "width": 24, "depth": 2, "num_heads": 2}
LEARNED = {"positions": "learned", "position_grid": (3, 2, 2)}
GATED = {"positions": "rotary", "num_registers": 3, "mlp": "swiglu", "layer_scale": 0.1}
PRIMUS = {"name": "primus_s", **SMALL, "position_grid": (3, 2, 2), "num_registers": 3}
FORMS = pytest.mark.parametrize("changes", [{}, GATED, LEARNED, PRIMUS], ids=["plain", "gated", "learned", "primus"])


def vit(**changes: Any) -> ViTEncoder:
    torch.manual_seed(0)
    encoder = create_recipe({"name": "vit", **SMALL, **changes}).build().double()
    assert isinstance(encoder, ViTEncoder)
    return encoder


def volume_of(*size: int, batch: int = 2) -> Tensor:
    return torch.rand(batch, 1, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class PlainBlock(nn.Module):
    """A pre-norm block of the library's own modules."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attn(normed, normed, normed, need_weights=False)[0]
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


def test_it_is_the_transformer_of_its_paper() -> None:
    """A convolution as the patch embedding, the library's attention, and the same weights give the same map."""
    encoder, volume = vit(), volume_of(8, 12, 16)
    own = encoder.state_dict()
    tokens = F.conv3d(volume, own["embed.weight"], own["embed.bias"], stride=4).flatten(2).mT
    tokens = tokens + sincos_positions((2, 3, 4), 24)
    for number in range(2):
        block = PlainBlock(24, 2).double()
        names = {"attn.in_proj_": "attn.qkv.", "attn.out_proj.": "attn.proj.", "fc": "mlp.fc"}
        state = {}
        for name in block.state_dict():
            theirs = next((name.replace(a, b) for a, b in names.items() if name.startswith(a)), name)
            state[name] = own[f"blocks.{number}.{theirs}"]
        block.load_state_dict(state)
        tokens = block(tokens)
    expected = F.layer_norm(tokens, (24,), own["norm.weight"], own["norm.bias"], 1e-6).mT.unflatten(2, (2, 3, 4))
    torch.testing.assert_close(encoder.feature_maps(volume), [expected])


@FORMS
def test_visible_tokens_do_not_see_hidden_voxels(changes: dict[str, Any]) -> None:
    encoder, volume = vit(**changes), volume_of(8, 8, 12)
    visible = torch.tensor([[0, 3, 7, 11], [1, 2, 5, 8]])
    hidden = torch.ones(2, 12, dtype=torch.bool).scatter(1, visible, False).reshape(2, 1, 2, 2, 3)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(4, dim=axis)
    tokens = encoder.encode_visible(volume, visible)
    assert torch.equal(encoder.encode_visible(volume.masked_fill(hidden, torch.nan), visible), tokens)
    assert not torch.allclose(encoder.encode_visible(volume + 1, visible), tokens)


@FORMS
def test_with_nothing_hidden_the_tokens_are_those_of_the_map(changes: dict[str, Any]) -> None:
    encoder, volume = vit(**changes), volume_of(8, 8, 12)
    tokens = encoder.encode_visible(volume, torch.arange(12).expand(2, -1))
    torch.testing.assert_close(tokens.mT.unflatten(2, (2, 2, 3)), encoder.feature_maps(volume)[0])


def test_rotary_attention_sees_how_tokens_lie_from_each_other_and_nothing_else() -> None:
    """Dot products of turned vectors follow from the step between their places along each axis."""
    angles = rotary_angles((4, 4, 4), 26).reshape(4, 4, 4, 13).double()
    query, key = torch.rand(2, 26, dtype=torch.float64)

    def product(place: tuple[int, int, int], other: tuple[int, int, int]) -> float:
        return float(rotate(query, angles[place]) @ rotate(key, angles[other]))

    assert product((0, 1, 0), (2, 0, 1)) == pytest.approx(product((1, 3, 2), (3, 2, 3)), rel=1e-6)
    steps = {product((1, 1, 1), other) for other in ((2, 1, 1), (0, 1, 1), (1, 2, 1), (1, 1, 2))}
    assert len(steps) == 4
    # Pairs that no axis has are left as they are, and turning keeps lengths.
    assert not angles[..., 12:].any()
    assert float(rotate(query, angles[3, 2, 1]).norm()) == pytest.approx(float(query.norm()))


def test_the_rotary_form_has_no_absolute_place() -> None:
    """Two tokens of the same voxels stay alike; added positions tell them apart."""
    lone = volume_of(4, 4, 4, batch=1)
    for positions, alike in (("rotary", True), ("sincos", False)):
        tokens = vit(positions=positions).feature_maps(lone.repeat(1, 1, 2, 1, 1))[0]
        assert torch.allclose(tokens[:, :, 0], tokens[:, :, 1], atol=1e-9) == alike


def test_masked_places_show_the_learned_token_with_their_position() -> None:
    encoder, volume = vit(), volume_of(8, 8, 8)
    hidden = torch.ones(2, 2, 2, 2, dtype=torch.bool)
    (shown,) = encoder.masked_feature_maps(volume, hidden, torch.rand(24, dtype=torch.float64))
    assert torch.equal(shown[0], shown[1])
    assert not torch.allclose(shown[0, :, 0, 0, 0], shown[0, :, 1, 0, 0])


@pytest.mark.parametrize("form", [GATED, PRIMUS], ids=["gated", "primus"])
def test_every_parameter_learns_and_recomputing_changes_nothing(form: dict[str, Any]) -> None:
    grads = []
    for recompute in (False, True):
        encoder = vit(**form, recompute=recompute, drop_path=0.1)
        torch.manual_seed(3)
        encoder.feature_maps(volume_of(8, 8, 8))[0].square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
    assert all(grad is not None and grad.any() for grad in grads[0].values())
    torch.testing.assert_close(grads[0], grads[1])


def test_registers_and_layer_scales_are_spared_from_weight_decay() -> None:
    decayed, spared = decay_groups(vit(**PRIMUS))
    assert {"registers", "blocks.0.scale1", "blocks.0.attn.query_bias", "blocks.0.mlp.norm.weight"} <= spared.keys()
    assert {name.rpartition(".")[0] for name in decayed} == {
        "embed",
        *(f"blocks.{n}.{part}" for n in range(2) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    }


def test_a_gated_mlp_has_as_many_parameters() -> None:
    sizes = [sum(p.numel() for p in vit(width=96, mlp=mlp).blocks.parameters()) for mlp in ("gelu", "swiglu")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_tiny", 6.1), ("vit_small", 22.9), ("vit_base", 88.2), ("vit_large", 306.5)]
)
def test_ready_sizes_have_the_parameters_of_their_paper(name: str, millions: float) -> None:
    with torch.device("meta"):
        encoder = create_model(name)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "number"),
    [("primus_s", 23_577_444), ("primus_b", 92_317_896), ("primus_m", 145_578_528), ("primus_l", 324_102_240)],
)
def test_sizes_of_primus_have_the_parameters_of_its_authors_package(name: str, number: int) -> None:
    """Those of its encoder for crops of 96 voxels."""
    with torch.device("meta"):
        encoder = create_model(name)
    assert sum(p.numel() for p in encoder.parameters()) == number


def test_primus_is_the_network_of_its_authors() -> None:
    """Plain layers, complex numbers for rotary positions, and the same weights give the same map."""
    primus = PlainPrimus()
    theirs = {name.removeprefix("eva."): value for name, value in primus.state_dict().items()}
    encoder = create_model("primus_s", width=24, depth=2, num_heads=2, position_grid=primus.grid)
    state = {"position_table": theirs["pos_embed"][0], "norm.weight": theirs["norm.weight"]}
    state |= {"norm.bias": theirs["norm.bias"]}
    state |= {f"embed.{kind}": theirs[f"down_projection.proj.{kind}"] for kind in ("weight", "bias")}
    for name in encoder.blocks.state_dict():
        block, _, part = name.partition(".")
        part = part.replace("scale", "gamma_")
        sources = {
            "attn.qkv.weight": [f"attn.{one}_proj.weight" for one in "qkv"],
            "attn.query_bias": ["attn.q_proj.bias"],
            "attn.value_bias": ["attn.v_proj.bias"],
            "mlp.fc1.weight": ["mlp.fc1_g.weight", "mlp.fc1_x.weight"],
            "mlp.fc1.bias": ["mlp.fc1_g.bias", "mlp.fc1_x.bias"],
        }.get(part, [part])
        state[f"blocks.{name}"] = torch.cat([theirs[f"blocks.{block}.{source}"] for source in sources])
    encoder.load_state_dict(state)
    volume = torch.randn(2, 1, 16, 24, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval().feature_maps(volume), [primus.features(volume)], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_heads": 5}, "token width 24 is not a multiple of num_heads"),
        ({"num_heads": 8, "positions": "rotary"}, "heads of 3 channels; rotary positions need an even number"),
        ({"token_edge": 0}, "token_edge is 0; it must be from 1 to 256"),
        ({"depth": 0}, "depth is 0"),
        ({"num_registers": -1}, "num_registers is -1"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0"),
        ({"positions": "none"}, "positions"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
        ({"num_heads": 8, "positions": "learned_rotary"}, "heads of 3 channels; rotary positions need an even number"),
        ({"rotary_base": 1.0}, "rotary_base is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vit(**changes)


def test_an_input_that_no_tokens_fill_is_refused_with_sizes_that_fit() -> None:
    with pytest.raises(ConfigError, match=r"axis Z \(10\) is not a multiple of stride 4; use 8 or 12"):
        vit().feature_maps(volume_of(8, 8, 10))
