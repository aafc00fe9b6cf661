"""Weights load or say why not; foreign files never run code."""

import argparse
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mim3d.backbones import BACKBONES, create_model
from mim3d.core.errors import CheckpointError
from mim3d.core.settings import to_named
from mim3d.nn.decoder import TokenDecoder
from mim3d.nn.tokens import sincos_positions
from mim3d.weights import InputLayers, load_encoder, load_into, read_card, save_network
from mim3d.weights.states import read_state

SMALL = {
    "widths": (6, 12, 24),
    "depths": (1, 1, 1),
    "num_heads": 2,
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


def published_file(path: Path, *, shift: float = 0.0, depths: tuple[int, ...] = (1, 1, 1, 2)) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = create_model("hybrid_tiny", depths=depths)
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
    with pytest.raises(CheckpointError, match=r"depths \[1, 1, 1, 2\]\) do not show the number of attention heads"):
        load_encoder(tmp_path / "mim.pth")
    with pytest.warns(UserWarning, match="blocks that the file may have lost"):
        loaded = load_encoder(tmp_path / "mim.pth", {"num_heads": 3})
    assert loaded.recipe.widths == (12, 24, 48, 96)
    assert loaded.recipe.depths == (1, 1, 1, 2)
    assert loaded.recipe.num_heads == 3
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in encoder.state_dict().items())


def test_a_published_checkpoint_of_a_published_size_needs_no_word(tmp_path: Path) -> None:
    encoder = published_file(tmp_path / "mim.pth", depths=(2, 2, 2, 11))
    assert load_encoder(tmp_path / "mim.pth").recipe == encoder.recipe


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
    with pytest.raises(CheckpointError, match=r"holds no tensors by name, but model \(an object\)"):
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


def test_a_file_of_an_early_torch_is_read_and_text_is_refused(tmp_path: Path) -> None:
    _, encoder = exported(tmp_path)
    state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"model": state}, tmp_path / "early.pth", _use_new_zipfile_serialization=False)
    assert load_into(of_channels(1), tmp_path / "early.pth").coverage == 1
    assert torch.equal(next(iter(read_state(tmp_path / "early.pth").values())), next(encoder.parameters()))
    for text in ("image,class\na,b\n", "", "cposix\nsystem\n", "\x80\x02}q\x00.", "(lp0\n"):
        (tmp_path / "text.pth").write_text(text)
        with pytest.raises(CheckpointError, match=r"text\.pth cannot be read as weights") as refused:
            load_encoder(tmp_path / "text.pth")
        assert "weights_only" not in str(refused.value)


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


def test_an_encoder_runs_on_grids_of_any_size_and_shape(tmp_path: Path) -> None:
    run, encoder = exported(tmp_path)
    loaded = load_encoder(run)
    with torch.no_grad():
        for size in ((48, 48, 48), (32, 48, 16)):
            maps = loaded.feature_maps(torch.zeros(1, 1, *size))
            assert [tuple(one.shape[2:]) for one in maps] == [
                tuple(axis // stride for axis in size) for stride in encoder.strides
            ]
            assert all(torch.isfinite(one).all() for one in maps)


def of_channels(number: int) -> torch.nn.Module:
    return create_model("hybrid", **SMALL, in_channels=number)


@pytest.mark.parametrize("how", ["mean", "repeat"])
def test_input_layers_adapted_to_more_channels_give_what_they_gave_where_all_look_alike(
    tmp_path: Path, how: InputLayers
) -> None:
    run, encoder = exported(tmp_path)
    wider = of_channels(3)
    report = load_into(wider, run, input_layers=how)
    assert report.adapted == ("patch_embed1.proj.weight",) and report.coverage == 1
    assert "1 of them adapted to the input's channels" in str(report)
    volume = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        known, adapted = (
            net.feature_maps(x) for net, x in ((encoder, volume), (wider, volume.expand(1, 3, 16, 16, 16)))
        )
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(known, adapted, strict=True))


def test_fewer_channels_take_the_mean_or_the_first_ones(tmp_path: Path) -> None:
    encoder = of_channels(4)
    save_network(tmp_path / "encoder", encoder, {"backbone": to_named(encoder.recipe, BACKBONES)})
    known = encoder.state_dict()["patch_embed1.proj.weight"]
    for how, wanted in (("mean", known.mean(1, keepdim=True).expand(-1, 2, -1, -1, -1)), ("repeat", known[:, :2])):
        narrower = of_channels(2)
        load_into(narrower, tmp_path, input_layers=how)
        assert torch.allclose(narrower.state_dict()["patch_embed1.proj.weight"], 2 * wanted)


def test_new_input_layers_are_left_as_they_were_drawn_and_everything_else_is_taken(tmp_path: Path) -> None:
    run, _ = exported(tmp_path)
    wider = of_channels(3)
    before = wider.state_dict()["patch_embed1.proj.weight"].clone()
    with pytest.warns(UserWarning, match=r"1 of its .* tensors starts anew: patch_embed1\.proj\.weight"):
        report = load_into(wider, run, input_layers="new")
    assert torch.equal(wider.state_dict()["patch_embed1.proj.weight"], before)
    assert report.adapted == () and len(report.mismatched) == 1 and report.coverage > 0.9


def test_a_published_file_that_fills_too_little_of_an_encoder_is_refused(tmp_path: Path) -> None:
    published_file(tmp_path / "mim.pth")
    with pytest.raises(CheckpointError, match=r"fills only .* of the encoder"):
        load_into(create_model("hybrid_tiny", depths=(1, 1, 1, 9)), tmp_path / "mim.pth")
    content = torch.load(tmp_path / "mim.pth", weights_only=False)
    kept = {key: value for key, value in content["model"].items() if "blocks4" not in key or "norm" in key}
    torch.save({"model": kept}, tmp_path / "part.pth")
    with (
        pytest.warns(UserWarning, match="blocks that the file may have lost"),
        pytest.raises(CheckpointError, match=r"fills only .* of the encoder"),
    ):
        load_encoder(tmp_path / "part.pth", {"num_heads": 3})


def test_a_file_of_something_else_altogether_is_refused(tmp_path: Path) -> None:
    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no names of tensors that mim3d knows"):
        load_encoder(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"fills only 0.0% of the encoder"):
        load_into(of_channels(1), tmp_path / "other.safetensors")


def test_tensors_without_names_are_passed_over(tmp_path: Path) -> None:
    torch.save({0: torch.zeros(2), "module.a": torch.ones(3)}, tmp_path / "mixed.pt")
    assert list(read_state(tmp_path / "mixed.pt")) == ["a"]
