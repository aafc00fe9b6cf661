"""Weights load or say why not; foreign files never run code."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mim3d.backbones import BACKBONES, create_model
from mim3d.config import to_named
from mim3d.errors import CheckpointError
from mim3d.nn.decoder import TokenDecoder
from mim3d.nn.positions import sincos_positions
from mim3d.weights import load_encoder, load_into, read_card, save_network

SMALL = {
    "widths": (6, 12, 24),
    "depths": (1, 1, 1),
    "num_heads": 2,
    "decoder_dim": 12,
    "decoder_num_heads": 2,
}


def exported(folder: Path, seed: int = 0) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(seed)
    encoder = create_model("hybrid", **SMALL)
    save_network(folder / "encoder", encoder, {"backbone": to_named(encoder.recipe, BACKBONES)})
    return folder, encoder


def test_an_exported_encoder_comes_back_equal_from_run_folder_and_file(tmp_path: Path) -> None:
    run, encoder = exported(tmp_path)
    for path in (run, run / "encoder", run / "encoder" / "model.safetensors"):
        loaded = load_encoder(path)
        assert loaded.recipe == encoder.recipe
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())


def test_saving_again_replaces_the_export_as_a_whole(tmp_path: Path) -> None:
    exported(tmp_path, seed=0)
    _, encoder = exported(tmp_path, seed=1)
    assert torch.equal(load_encoder(tmp_path).norm.weight, encoder.norm.weight)
    assert [entry.name for entry in tmp_path.iterdir()] == ["encoder"]


def published_file(path: Path, *, shift: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = create_model("hybrid_tiny", depths=(1, 1, 1, 2))
    decoder = TokenDecoder(96, 48, 1, 3, 4096)
    state = dict(encoder.state_dict())
    state |= {k if k == "mask_token" else f"decoder_{k}": v for k, v in decoder.state_dict().items()}
    state["pos_embed"] = sincos_positions((6, 6, 6), 96)[None] + shift
    state["decoder_pos_embed"] = sincos_positions((6, 6, 6), 48)[None]
    state["aggregate_mid.fc1.weight"] = torch.zeros(48, 48)
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, path)
    return encoder


def test_a_published_checkpoint_is_read_with_its_command_line_and_its_recipe_found(tmp_path: Path) -> None:
    encoder = published_file(tmp_path / "mim.pth")
    loaded = load_encoder(tmp_path / "mim.pth")
    assert loaded.recipe.widths == (12, 24, 48, 96)
    assert loaded.recipe.depths == (1, 1, 1, 2)
    assert loaded.recipe.num_heads == 3
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())


def test_the_report_counts_what_is_left_over(tmp_path: Path) -> None:
    published_file(tmp_path / "mim.pth")
    report = load_into(create_model("hybrid_tiny", depths=(1, 1, 1, 2)), tmp_path / "mim.pth")
    assert report.coverage == 1
    assert report.missing == ()
    assert "decoder.mask_token" in report.left_over


def test_other_position_embeddings_are_refused(tmp_path: Path) -> None:
    published_file(tmp_path / "mim.pth", shift=0.5)
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_encoder(tmp_path / "mim.pth")


def test_weights_of_another_backbone_are_refused_and_change_nothing(tmp_path: Path) -> None:
    exported(tmp_path)
    other = create_model("hybrid", **{**SMALL, "widths": (12, 24, 48)})
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fills only .* of the encoder .*60 of another shape"):
        load_into(other, tmp_path)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_a_file_with_code_is_refused_unrun(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"model": Attack()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="holds code that mim3d does not run"):
        load_encoder(tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError):
        load_encoder(tmp_path / "plain.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pt"])
def test_a_damaged_file_is_one_clear_sentence(tmp_path: Path, name: str) -> None:
    source = tmp_path / f"whole{Path(name).suffix}"
    if source.suffix == ".pt":
        torch.save({"a": torch.zeros(1000)}, source)
    else:
        save_file({"a": torch.zeros(1000)}, source)
    (tmp_path / name).write_bytes(source.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=name):
        load_encoder(tmp_path / name)


def test_a_folder_without_weights_and_a_missing_path_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is a folder without model.safetensors"):
        load_encoder(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_encoder(tmp_path / "nowhere")


def test_a_card_of_another_format_is_refused(tmp_path: Path) -> None:
    run, _ = exported(tmp_path)
    (run / "encoder" / "card.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 1"):
        read_card(run)
