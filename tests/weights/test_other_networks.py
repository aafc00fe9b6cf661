"""Weights of networks that are nearly ours, that hold nothing learned, or that are no weights at all."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mim3d.backbones import create_model
from mim3d.backbones.contract import Backbone, Encoder
from mim3d.core.errors import CheckpointError
from mim3d.core.types import Triple
from mim3d.nn.tokens import sincos_positions
from mim3d.weights import describe, load_encoder, load_into

#: The number of heads, which no tensor shows.
HEADS = {"num_heads": 4}

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def layer(name: str, out: int, *inside: int) -> dict[str, Tensor]:
    return {f"{name}.weight": drawn(out, *inside), f"{name}.bias": drawn(out)}


def transformer() -> dict[str, Tensor]:
    """A plain transformer of volumes in the names of timm."""
    state = {"cls_token": drawn(1, 1, 24), "pos_embed": drawn(1, 9, 24), **layer("patch_embed.proj", 24, 1, 8, 8, 8)}
    for number in range(2):
        block = f"blocks.{number}"
        state |= layer(f"{block}.norm1", 24) | layer(f"{block}.attn.qkv", 72, 24) | layer(f"{block}.attn.proj", 24, 24)
        state |= layer(f"{block}.norm2", 24) | layer(f"{block}.mlp.fc1", 96, 24) | layer(f"{block}.mlp.fc2", 24, 96)
    return state | layer("norm", 24)


def mim() -> dict[str, Tensor]:
    return {**create_model("hybrid_tiny").state_dict(), "pos_embed": sincos_positions((2, 2, 2), 96)[None]}


def swin() -> dict[str, Tensor]:
    """A Swin of four stages in the names of MONAI."""
    encoder = create_model({"name": "swin", "feature_size": 12, "num_heads": [2, 3, 4, 6]})
    return {f"swinViT.{name}": value for name, value in encoder.state_dict().items()}


def resenc() -> dict[str, Tensor]:
    encoder = create_model({"name": "resenc", "widths": [4, 8], "depths": [1, 1]})
    return {f"encoder.{name}": value for name, value in encoder.state_dict().items()}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


#: A network -> what it has besides, or in another shape.
OTHERS: dict[str, tuple[Callable[[], dict[str, Tensor]], dict[str, Tensor]]] = {
    "norms of queries": (transformer, {"blocks.0.attn.q_norm.weight": drawn(6)}),
    "factors of branches": (transformer, {"blocks.1.gamma_1": drawn(24)}),
    "biases of places": (transformer, {"blocks.0.attn.relative_position_bias_table": drawn(343, 4)}),
    "a norm of the mean": (transformer, {"fc_norm.weight": drawn(24)}),
    "a norm of tokens": (transformer, {"patch_embed.norm.weight": drawn(24)}),
    "a norm before blocks": (transformer, {"norm_pre.weight": drawn(24)}),
    "a token of distillation": (transformer, {"dist_token": drawn(1, 1, 24)}),
    "positions as a picture": (transformer, {"pos_embed": drawn(1, 2, 2, 24)}),
    "rotary positions": (transformer, {"rope_embed.periods": drawn(3)}),
    "a class token": (mim, {"cls_token": drawn(1, 1, 96)}),
    "another block": (mim, {"blocks4.0.attn.q_norm.weight": drawn(8)}),
    "a normed stem": (swin, {"swinViT.patch_embed.norm.weight": drawn(12)}),
    "positions of a Swin": (swin, {"swinViT.absolute_pos_embed": drawn(1, 12, 4, 4, 4)}),
    "larger tokens": (swin, {"swinViT.patch_embed.proj.weight": drawn(12, 1, 4, 4, 4)}),
    "batch norms": (resenc, {"encoder.stem.convs.0.norm.running_mean": drawn(4)}),
    "squeezed channels": (resenc, {"encoder.stages.0.blocks.0.squeeze_excitation.conv1.weight": drawn(2, 4, 1, 1, 1)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_network_with_parts_that_ours_lacks_is_not_taken_for_ours(tmp_path: Path, what: str) -> None:
    make, more = OTHERS[what]
    name = next(iter(more)).removeprefix("swinViT.").removeprefix("encoder.")
    file = saved(tmp_path / "w.pt", {"state_dict": {**make(), **more}})
    with pytest.raises(CheckpointError, match=f"1 tensor of its encoder, the first {name}.*it is another network"):
        load_encoder(file, HEADS if make is transformer else None)
    assert "it is another network" in describe(file).rows["network"]


def test_parts_that_a_named_backbone_lacks_are_warned_of(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", {**swin(), "swinViT.patch_embed.norm.weight": drawn(12)})
    backbone = {"name": "swin", "feature_size": 12, "num_heads": [2, 3, 4, 6]}
    with pytest.warns(UserWarning, match=r"1 tensor of its encoder, the first patch_embed\.norm.*something else"):
        load_encoder(file, backbone)


@pytest.mark.filterwarnings("ignore:.*may have lost")
def test_positions_that_no_tensor_shows_are_asked_for(tmp_path: Path) -> None:
    state = transformer()
    del state["pos_embed"]
    file = saved(tmp_path / "w.pt", state)
    with pytest.raises(CheckpointError, match=r"the positions of tokens.*give --backbone\.positions\."):
        load_encoder(file, HEADS)
    with pytest.raises(CheckpointError, match=r"give --backbone\.num_heads and --backbone\.positions\."):
        load_encoder(file)
    assert load_encoder(file, {**HEADS, "positions": "rotary"}).recipe.positions == "rotary"
    assert "--backbone.positions" in describe(file).rows["network"]


@pytest.mark.filterwarnings("ignore:.*may have lost")
def test_registers_have_either_of_their_names(tmp_path: Path) -> None:
    state, more = transformer(), drawn(1, 3, 24)
    encoders = [
        load_encoder(saved(tmp_path / "w.pt", {**state, name: more}), HEADS)
        for name in ("reg_token", "register_tokens")
    ]
    assert encoders[0].recipe.num_registers == 4
    volume = drawn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(*(encoder.eval()(volume)[0] for encoder in encoders))


@pytest.mark.filterwarnings("ignore:.*may have lost")
def test_positions_beside_an_encoder_are_found_behind_any_prefix(tmp_path: Path) -> None:
    state = {f"net.encoder.{name}": value for name, value in transformer().items() if name != "pos_embed"}
    state |= {"net.encoder_pos_embed": drawn(1, 8, 24), "loss.weight": drawn(3)}
    assert load_encoder(saved(tmp_path / "w.pt", state), HEADS).recipe.positions == "learned"


class TimmEncoder(Encoder):
    """A network of somebody's own with the names of timm."""

    strides = (8,)
    widths = (24,)

    def __init__(self, recipe: Backbone) -> None:
        super().__init__()
        self.recipe = recipe
        for name, value in transformer().items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, nn.Parameter(torch.zeros_like(value)))

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """None of them are asked for."""
        return [volume_BCXYZ]


@dataclass(frozen=True, kw_only=True)
class TimmRecipe(Backbone):
    """Settings of that network."""

    @property
    def encoder_class(self) -> type[Encoder]:
        """The network."""
        return TimmEncoder

    @property
    def input_multiple(self) -> Triple:
        """The edge of a token."""
        return 8, 8, 8


def test_a_network_of_ones_own_takes_a_file_by_its_own_names(tmp_path: Path) -> None:
    state = transformer()
    encoder = TimmRecipe().build()
    report = load_into(encoder, saved(tmp_path / "w.pt", {"model": state}))
    assert report.coverage == 1
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_weights_that_hold_one_value_alone_are_refused(tmp_path: Path, value: float) -> None:
    state = {name: torch.full_like(one, value) if one.is_floating_point() else one for name, one in swin().items()}
    file = saved(tmp_path / "w.pt", state)
    with pytest.raises(
        CheckpointError, match=r"w\.pt holds one and the same value throughout each of .* copy it again"
    ):
        load_encoder(file)
    assert describe(file).rows["values"].startswith("cannot be used: it holds one and the same value")


def test_a_download_whose_end_is_zeros_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file(swin(), file)
    content = file.read_bytes()
    kept = len(content) * 2 // 3
    file.write_bytes(content[:kept] + bytes(len(content) - kept))
    with pytest.raises(CheckpointError, match="one and the same value throughout"):
        load_encoder(file)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_small_file_of_a_huge_network_takes_no_memory(tmp_path: Path, device: str) -> None:
    state = {}
    for name, value in transformer().items():
        shape = [size * 512 if size in (24, 72, 96) else size for size in value.shape]
        state[name] = torch.zeros(1, device=device).expand(shape)
    file = saved(tmp_path / "w.pt", state)
    for act in (describe, lambda path: load_encoder(path, HEADS)):
        with pytest.raises(CheckpointError, match="repeat values or have none"):
            act(file)


@pytest.mark.parametrize("make", [transformer, mim, swin, resenc])
@pytest.mark.parametrize("kind", ["meta", "sparse"])
def test_tensors_without_plain_values_are_named_before_anything_is_made_of_them(
    tmp_path: Path, make: Callable[[], dict[str, Tensor]], kind: str
) -> None:
    state = {name: one.to("meta") if kind == "meta" else one.to_sparse() for name, one in make().items()}
    file = saved(tmp_path / "w.pt", state)
    for act in (describe, load_encoder):
        with pytest.raises(CheckpointError, match=r"w\.pt holds (no values but shapes alone|sparse values) in \d+ of"):
            act(file)


CONTENTS = {
    b"version https://git-lfs.github.com/spec/v1\noid ": "a pointer of Git LFS; fetch",
    b"\n<!DOCTYPE html><html>404</html>": "a web page; download the file itself",
    bytes(4096): "begins with zeros alone",
    b"": "it is empty",
}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("content", CONTENTS)
def test_what_lies_in_the_place_of_weights_is_said(tmp_path: Path, content: bytes, ending: str) -> None:
    file = tmp_path / f"w.{ending}"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=CONTENTS[content]):
        describe(file)


def test_a_file_with_the_ending_of_the_other_kind_says_which_it_is(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "w.pt").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"it is a safetensors file; give it the ending \.safetensors"):
        describe(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"it is an archive; torch's have the ending \.pt"):
        describe(saved(tmp_path / "w.safetensors", transformer()))
