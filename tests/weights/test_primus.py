"""Weights of Primus, of nnU-Net and nnssl: known by their tensors, with the features of the network they are of."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.nn.tokens import resized_positions
from mim3d.weights import describe, load_encoder, load_into, origin_of
from mim3d.weights.families import recognised
from mim3d.weights.states import HeldWeights
from tests.primus import PlainPrimus

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def volume_for(network: PlainPrimus, channels: int = 1) -> Tensor:
    size = [8 * tokens for tokens in network.grid]
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def nnssl_file(network: PlainPrimus, *, heads: int | None = 2, **more: Any) -> dict[str, Any]:
    """A checkpoint of nnssl, whose plan says the size of crops and, for sizes of one's own, the heads."""
    size = [8 * tokens for tokens in network.grid]
    one_mm = {"spacing": [1, 1, 1], "normalization_schemes": ["ZScoreNormalization"], "patch_size": size}
    plan = {
        "architecture_plans": {"arch_class_name": "Primus", "arch_kwargs": heads and {"encoder_eva_numheads": heads}},
        "pretrain_plan": {"configurations": {"onemmiso": one_mm}},
        "key_to_encoder": "eva",
        "key_to_stem": "down_projection",
        "keys_to_in_proj": ["down_projection.proj"],
        "key_to_lpe": "eva.pos_embed",
    }
    return {"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan, **more}


def nnunet_file(network: PlainPrimus) -> dict[str, Any]:
    """A checkpoint of nnU-Net's trainer, whose plan says the size of crops along Z, Y, X."""
    size = [8 * tokens for tokens in network.grid]
    fine = {"spacing": [3.0, 1.0, 0.8], "normalization_schemes": ["ZScoreNormalization"], "patch_size": size}
    plans = {"configurations": {"3d_fullres": fine}, "transpose_backward": [0, 1, 2]}
    arguments = {"plans": plans, "configuration": "3d_fullres"}
    named = {"trainer_name": "nnUNet_Primus_M_Trainer", "current_epoch": 3}
    return {"network_weights": network.state_dict(), "init_args": arguments, **named}


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "form",
    [{}, {"num_registers": 3}, {"scaled": False}, {"channels": 2}],
    ids=["as published", "registers", "bare", "2"],
)
@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_nnssl_gives_the_features_of_its_network(
    tmp_path: Path, form: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Crops need not be cubes: their plan says how positions lie."""
    network = PlainPrimus(**form)
    file = saved(tmp_path / "w.pth", nnssl_file(network))
    encoder = load_encoder(file)
    assert "100.0% of the values" in capsys.readouterr().out
    assert encoder.recipe.position_grid == network.grid
    volume = volume_for(network, form.get("channels", 1))
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume), [network.features(volume)], **TOLERANCE)
    origin = origin_of(file)
    assert origin is not None
    assert origin.family.startswith("nnssl Primus")
    assert (origin.expects.modality, origin.expects.spacing_mm) == ("unknown", (1.0, 1.0, 1.0))
    assert "transposed convolutions" in origin.remark and "put right" not in origin.expects.orientation


def test_a_network_that_nnunet_fine_tuned_says_no_heads_and_takes_them_from_the_user(tmp_path: Path) -> None:
    network = PlainPrimus()
    file = saved(tmp_path / "w.pth", nnunet_file(network))
    with pytest.raises(CheckpointError, match=r"do not show the number of attention heads.*give --backbone.num_heads"):
        load_encoder(file)
    with pytest.warns(UserWarning, match="blocks that the file may have lost"):
        encoder = load_encoder(file, {"num_heads": 2})
    volume = volume_for(network)
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume), [network.features(volume)], **TOLERANCE)
    found = describe(file)
    assert found.family == "Primus (Wald et al. 2025)"
    assert found.rows["expects voxel size"] == "0.8 x 1 x 3 mm"
    assert "43 tensors matched (100.0% of the values), 0 missing" in found.rows["encoder"]


def test_crops_of_another_size_see_positions_between_those_learned(tmp_path: Path) -> None:
    """Learned positions are interpolated; rotary ones go on counting."""
    network, larger = PlainPrimus(), PlainPrimus((3, 3, 5))
    encoder = load_encoder(saved(tmp_path / "w.pth", nnssl_file(network)))
    positions = resized_positions(network.eva.pos_embed.detach()[0], network.grid, larger.grid)[None]
    larger.load_state_dict({**network.state_dict(), "eva.pos_embed": positions})
    volume = volume_for(larger)
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume), [larger.features(volume)], **TOLERANCE)


@pytest.mark.parametrize("trainer", ["BaseEvaMAETrainer_BS8", None, "VoCoEvaTrainer"])
def test_positions_that_nnssl_trained_along_exchanged_axes_are_put_right(tmp_path: Path, trainer: str | None) -> None:
    """Its MAE is known by its second transformer too; networks for two views lie one deeper."""
    network = PlainPrimus((3, 3, 2))
    content = nnssl_file(network, **({"trainer_name": trainer} if trainer else {}))
    state = content["network_weights"]
    if trainer == "VoCoEvaTrainer":
        content["network_weights"] = {f"encoder.{name}": value for name, value in state.items()}
    if trainer is None:
        content["network_weights"] = state | {name.replace("eva.", "decoder."): value for name, value in state.items()}
    file = saved(tmp_path / "w.pth", content)
    encoder, volume = load_encoder(file), volume_for(network)
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume), [network.features(volume, exchanged=True)], **TOLERANCE)
    assert "which nnssl exchanges, are put right" in describe(file).rows["expects orientation"]


def test_simmim_of_nnssl_has_its_positions_in_order(tmp_path: Path) -> None:
    network = PlainPrimus((3, 3, 2))
    encoder = load_encoder(saved(tmp_path / "w.pth", nnssl_file(network, trainer_name="SimMIMEvaTrainer_BS8")))
    volume = volume_for(network)
    with torch.no_grad():
        torch.testing.assert_close(encoder(volume), [network.features(volume)], **TOLERANCE)


def test_positions_that_cannot_be_put_right_are_refused(tmp_path: Path) -> None:
    uneven = saved(tmp_path / "uneven.pth", nnssl_file(PlainPrimus(), trainer_name="EvaMAETrainer"))
    with pytest.raises(CheckpointError, match=r"crops of 2 x 3 x 4 tokens with the positions of other places"):
        load_encoder(uneven)
    unknown = saved(tmp_path / "x.pth", nnssl_file(PlainPrimus((2, 2, 2)), heads=None, trainer_name="EvaMAETrainer"))
    with pytest.raises(CheckpointError, match="to undo takes the number of attention heads"):
        load_encoder(unknown, {"num_heads": 2})


@pytest.mark.parametrize(("width", "depth", "heads"), [(396, 12, 6), (792, 12, 12), (864, 16, 12), (1056, 24, 16)])
def test_heads_of_published_sizes_are_known(width: int, depth: int, heads: int) -> None:
    with torch.device("meta"):
        shapes = {name: one.shape for name, one in PlainPrimus((2, 2, 2), width, depth, heads).state_dict().items()}
    state = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    found = recognised(HeldWeights(state))
    assert found is not None and not found.open and not found.unfit
    assert {"width": width, "depth": depth, "num_heads": heads, "mlp_ratio": 4.0}.items() <= found.shown.items()
    lost = recognised(HeldWeights({name: value for name, value in state.items() if f"blocks.{depth - 1}." not in name}))
    assert lost is not None and f"holds {depth - 1} of its {depth} blocks" in lost.unfit


def test_files_that_are_not_whole_or_another_size_are_refused(tmp_path: Path) -> None:
    network = PlainPrimus()
    content = nnssl_file(network)
    file = saved(tmp_path / "whole.pth", content)
    for lost, said in (
        ("eva.norm.weight", r"holds no norm.weight, the end of the encoder; it is not whole"),
        ("eva.blocks.1", r"fills only"),
        ("eva.blocks.0.mlp.fc1_g", r"fills only"),
    ):
        held = {name: value for name, value in network.state_dict().items() if not name.startswith(lost)}
        part = saved(tmp_path / "part.pth", {**content, "network_weights": held})
        with pytest.raises(CheckpointError, match=said):
            load_into(load_encoder(file), part, min_coverage=0.95) if said == "fills only" else load_encoder(part)
    wide = load_encoder(saved(tmp_path / "wide.pth", nnssl_file(PlainPrimus(width=36))))
    with pytest.raises(CheckpointError, match=r"another backbone or settings.*It is nnssl Primus.*width 24"):
        load_into(wide, tmp_path / "whole.pth")
    unknown = {name: value for name, value in nnunet_file(network).items() if name != "init_args"}
    with pytest.raises(CheckpointError, match="positions for 24 tokens, whose grid nothing says"):
        load_encoder(saved(tmp_path / "grid.pth", unknown))


def test_tokens_that_a_deeper_network_makes_are_refused_by_name(tmp_path: Path) -> None:
    content = nnssl_file(PlainPrimus())
    state = content["network_weights"]
    kernel = state.pop("down_projection.proj.weight")
    state |= {"down_projection.stem.blocks.0.conv1.conv.weight": kernel, "down_projection.final_proj.weight": kernel}
    file = saved(tmp_path / "v2.pth", content)
    with pytest.raises(CheckpointError, match=r"PrimusV2, PrimusV3.*made by a residual network"):
        load_encoder(file)
    assert "none of mim3d's: its tokens" in describe(file).rows["network"]


@pytest.mark.parametrize("name", ["eva.pos_embed", "eva.blocks.0.attn.q_proj.weight", "eva.blocks.0.mlp.fc1_g.bias"])
@pytest.mark.parametrize("value", [torch.ones(()), torch.ones(5, 7), torch.ones(3, 3).to_sparse()])
def test_tensors_of_odd_shapes_are_refused_in_a_sentence(tmp_path: Path, name: str, value: Tensor) -> None:
    content = nnssl_file(PlainPrimus((2, 2, 2)), trainer_name="EvaMAETrainer")
    content["network_weights"][name] = value
    file = saved(tmp_path / "odd.pth", content)
    with suppress(CheckpointError):
        describe(file)
    said = "learned positions have the shape|fills only|have no place in mim3d's vit|holds sparse values in 1 of"
    with pytest.raises(CheckpointError, match=said):
        load_encoder(file, min_coverage=1)


def test_a_kernel_of_nothing_is_no_error_of_another_kind(tmp_path: Path) -> None:
    content = nnssl_file(PlainPrimus((2, 2, 2)), trainer_name="EvaMAETrainer")
    content["network_weights"]["down_projection.proj.weight"] = torch.ones(0, 0, 0, 0, 0)
    file = saved(tmp_path / "empty.pth", content)
    describe(file)
    with pytest.raises((CheckpointError, ConfigError)):
        load_encoder(file)


def test_without_learned_positions_a_file_is_not_whole_unless_its_plan_says_so(tmp_path: Path) -> None:
    network = PlainPrimus()
    torch.nn.init.zeros_(network.eva.pos_embed)
    content = nnssl_file(network)
    del content["network_weights"]["eva.pos_embed"]
    with pytest.raises(CheckpointError, match=r"holds no eva\.pos_embed"):
        load_encoder(saved(tmp_path / "lost.pth", content))
    content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"]["use_abs_pos_embed"] = False
    volume = volume_for(network)
    with torch.no_grad():
        found = load_encoder(saved(tmp_path / "none.pth", content))(volume)
        torch.testing.assert_close(found, [network.features(volume)], **TOLERANCE)
