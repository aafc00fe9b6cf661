"""MONAI's transformers, in and out: the same tokens as MONAI's own networks, and what cannot be read says why."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import UNETR, MaskedAutoEncoderViT, ViT
from torch import Tensor, nn

from mim3d.backbones import create_model
from mim3d.commands.embed import embed
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.weights import describe, load_encoder, origin_of, save_network
from mim3d.weights.families.monai_vit import monai_positions
from tests.labelled import write_scan

VOLUME = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {
    "in_channels": 1,
    "img_size": 16,
    "patch_size": 8,
    "hidden_size": 24,
    "mlp_dim": 48,
    "num_layers": 3,
    "num_heads": 4,
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*blocks that the file may have lost", "ignore:torch.meshgrid", "ignore:.*anew"
)


def at_random(network: nn.Module) -> nn.Module:
    """A network with weights of about the size that training gives them, norms and class token too."""
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return network.eval()


def tokens_of(network: nn.Module, volume: Tensor = VOLUME) -> Tensor:
    """Tokens after the last norm of MONAI's ViT, without the class token, as a map."""
    seen: list[Tensor] = []
    hook = network.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        network(volume)
    hook.remove()
    grid = [edge // 8 for edge in volume.shape[2:]]
    return seen[0][:, -(grid[0] * grid[1] * grid[2]) :].transpose(1, 2).unflatten(2, grid)


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def same(ours: nn.Module, theirs: Tensor, volume: Tensor = VOLUME) -> None:
    with torch.no_grad():
        torch.testing.assert_close(ours(volume)[-1], theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"proj_type": "perceptron"},
        {"pos_embed_type": "sincos"},
        {"pos_embed_type": "none", "qkv_bias": True},
        {"classification": True, "qkv_bias": True},
        {"classification": True, "proj_type": "perceptron", "pos_embed_type": "sincos"},
    ],
    ids=str,
)
def test_a_vit_gives_the_tokens_of_monais_network(
    tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    network = at_random(ViT(**SMALL, **changes))
    file = saved(tmp_path / "w.pt", {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}})
    with pytest.raises(CheckpointError, match=r"do not show the number of attention heads.*--backbone\.num_heads"):
        load_encoder(file)
    encoder = load_encoder(file, {"num_heads": 4})
    assert "100.0% of the values" in capsys.readouterr().out
    same(encoder, tokens_of(network))
    origin = origin_of(file)
    assert origin is not None
    assert origin.family.startswith("MONAI ViT or UNETR")


def test_fixed_positions_of_monai_show_the_grid_and_learned_ones_a_cube_alone(tmp_path: Path) -> None:
    volume = torch.rand(1, 1, 16, 24, 8, generator=torch.Generator().manual_seed(1))
    network = at_random(ViT(**{**SMALL, "img_size": (16, 24, 8)}, pos_embed_type="sincos"))
    table = network.patch_embedding.position_embeddings
    torch.testing.assert_close(table[0], monai_positions((2, 3, 1), 24), atol=1e-6, rtol=0)
    encoder = load_encoder(saved(tmp_path / "w.pt", network.state_dict()), {"num_heads": 4})
    assert encoder.recipe.position_grid == (2, 3, 1)
    same(encoder, tokens_of(network, volume), volume)
    learned = at_random(ViT(**{**SMALL, "img_size": (16, 24, 8)}))
    with pytest.raises(CheckpointError, match="positions for 6 tokens, whose grid nothing says"):
        load_encoder(saved(tmp_path / "w.pt", learned.state_dict()), {"num_heads": 4})


def unetr(**changes: Any) -> nn.Module:
    """MONAI's network at small width, whose depth and tokens leave no choice."""
    small = {"img_size": 16, "feature_size": 2, "hidden_size": 24, "mlp_dim": 24, "num_heads": 4}
    return at_random(UNETR(in_channels=2, out_channels=2, **{**small, **changes}))


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
def test_a_unetr_gives_the_tokens_of_its_encoder_whose_channels_its_decoder_shows(
    tmp_path: Path, proj_type: str
) -> None:
    network = unetr(proj_type=proj_type)
    encoder = load_encoder(saved(tmp_path / "w.pt", network.state_dict()), {"num_heads": 4})
    assert (encoder.recipe.in_channels, encoder.recipe.token_edge) == (2, 16)
    volume = torch.rand(1, 2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = network.vit(volume)[0]
        torch.testing.assert_close(encoder(volume)[0].flatten(2).transpose(1, 2), theirs, atol=1e-5, rtol=1e-5)


def test_a_masked_autoencoder_gives_the_tokens_of_its_encoder(tmp_path: Path) -> None:
    small = {name: value for name, value in SMALL.items() if name != "num_classes"}
    decoder = {"decoder_hidden_size": 12, "decoder_mlp_dim": 12, "decoder_num_layers": 1, "decoder_num_heads": 2}
    network = at_random(MaskedAutoEncoderViT(**small, **decoder))
    encoder = load_encoder(saved(tmp_path / "w.pt", network.state_dict()), {"num_heads": 4})
    with torch.no_grad():
        tokens = network.patch_embedding(VOLUME)
        tokens = network.blocks(torch.cat([network.cls_token, tokens], dim=1))[:, 1:]
        same(encoder, tokens.transpose(1, 2).unflatten(2, (2, 2, 2)))


def test_what_is_no_network_of_ours_says_why(tmp_path: Path) -> None:
    two = at_random(ViT(**{**SMALL, "in_channels": 2}, proj_type="perceptron"))
    with pytest.raises(
        CheckpointError, match=r"linear layer of 1024 values \(proj_type perceptron\), which are no cube"
    ):
        load_encoder(saved(tmp_path / "two.pt", two.state_dict()), {"num_heads": 4})
    slabs = at_random(ViT(**{**SMALL, "patch_size": (8, 8, 4)}))
    with pytest.raises(CheckpointError, match=r"its tokens have \(8, 8, 4\) voxels, mim3d's are cubes"):
        load_encoder(saved(tmp_path / "slabs.pt", slabs.state_dict()), {"num_heads": 4})
    state = at_random(ViT(**SMALL)).state_dict()
    state.pop("patch_embedding.position_embeddings")
    with pytest.raises(
        CheckpointError, match=r"nearest family is MONAI ViT.*lacks a tensor patch_embedding.position_emb"
    ):
        load_encoder(saved(tmp_path / "without.pt", state), {"num_heads": 4})
    assert "linear layer" in describe(tmp_path / "two.pt").rows["network"]


def test_what_mim3d_exports_for_monai_is_read_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_model("vit", token_edge=8, width=24, depth=2, num_heads=4, mlp_ratio=2.0).eval()
    card = {"backbone": {"name": "vit", "token_edge": 8, "width": 24, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}}
    save_network(tmp_path / "own", encoder, {**card, "input_multiple": [8, 8, 8]})
    out = export(str(tmp_path / "own"), str(tmp_path / "out"), format="monai-weights", patch_size=(16, 24, 8))
    back = load_encoder(Path(out) / "vit.pt", {"num_heads": 4})
    assert back.recipe == encoder.recipe
    with torch.no_grad():
        assert torch.equal(back(VOLUME)[0], encoder(VOLUME)[0])


def test_what_came_from_monai_goes_back_to_it(tmp_path: Path) -> None:
    network = at_random(ViT(**SMALL))
    file = saved(tmp_path / "w.pt", network.state_dict())
    encoder = load_encoder(file, {"num_heads": 4})
    save_network(tmp_path / "own", encoder, {"backbone": {"name": "vit", **vars(encoder.recipe)}})
    out = Path(export(str(tmp_path / "own"), str(tmp_path / "out"), format="monai-weights", patch_size=(16, 16, 16)))
    back = ViT(**SMALL, qkv_bias=True)
    back.load_state_dict(torch.load(out / "vit.pt", weights_only=True))
    torch.testing.assert_close(tokens_of(back.eval()), tokens_of(network), atol=1e-5, rtol=1e-5)
    assert "module.eps" not in (out / "README.md").read_text()


@pytest.mark.parametrize("proj_type", ["conv", "perceptron"])
def test_damaged_shapes_are_never_an_error_of_another_kind(tmp_path: Path, proj_type: str) -> None:
    state = at_random(ViT(**SMALL, proj_type=proj_type, classification=True)).state_dict()
    for every, (name, value) in enumerate(state.items()):
        if "blocks.1" in name or "blocks.2" in name:
            continue
        wrong = {**state, name: value.new_zeros([0] * (value.ndim + every % 2))}
        file = saved(tmp_path / "w.pt", wrong)
        for act in (describe, lambda path: load_encoder(path, {"num_heads": 4})):
            with suppress(CheckpointError, ConfigError):
                act(file)


def test_features_come_from_windows_of_the_size_that_learned_positions_are_for(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", at_random(ViT(**SMALL)).state_dict())
    write_scan(tmp_path / "scan.nii.gz", VOLUME[0, 0].numpy())
    out = tmp_path / "f.csv"
    embed(str(tmp_path / "scan.nii.gz"), file, str(out), backbone={"num_heads": 4})
    about = json.loads((tmp_path / "f.csv.json").read_text())
    assert about["identity"]["window_size"] == [16] * 3
