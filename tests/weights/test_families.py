"""Published layouts of weights: known by names and shapes, and the same network once they are loaded."""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks.nets.swin_unetr import PatchMerging, PatchMergingV2, SwinUNETR
from torch import Tensor, nn

from benchmarks.yardstick.monai_swin import _rearranged
from mim3d.backbones import create_model
from mim3d.cli import main
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.core.warned import LicenceWarning
from mim3d.datasets.cases import CaseSet, read_cases
from mim3d.nn.tokens import sincos_positions
from mim3d.scans.intensity import Intensity
from mim3d.tasks import create_task
from mim3d.weights import describe, load_encoder, origin_of, read_weights, save_network
from mim3d.weights.families import FAMILIES, recognised
from mim3d.weights.states import HeldWeights
from mim3d.workflows.finetune.planning import fixed_choices
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.initialisation import initialise
from tests.labelled import write_scan

VOLUME = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(1))


class EarlyMerging(PatchMergingV2):
    """MONAI's merging before 1.5, which reads two of the eight neighbours twice."""

    def forward(self, tokens: Tensor) -> Tensor:
        order = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)]
        return self.reduction(self.norm(torch.cat([tokens[:, i::2, j::2, k::2] for i, j, k in order], -1)))


def swinunetr(merging: type[nn.Module] = EarlyMerging, *, v2: bool = False) -> SwinUNETR:
    """MONAI's network with random weights."""
    import monai.networks.nets.swin_unetr as module

    module.rearrange = _rearranged
    torch.manual_seed(0)
    return SwinUNETR(1, 2, feature_size=12, num_heads=(2, 3, 4, 6), downsample=merging, use_v2=v2).eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def first_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("mlp.linear", "mlp.fc"): value for key, value in state.items()}


HEADS = {
    "rotation_head.weight": torch.ones(4, 192),
    "contrastive_head.weight": torch.ones(8, 192),
    "conv.weight": torch.ones(1, 192, 1, 1, 1),
}


def pretraining_first(network: SwinUNETR) -> Any:
    names = first_names(network.swinViT.state_dict())
    return {"epoch": 1, "state_dict": under("module.", names | HEADS), "optimizer": {"state": {}}}


def pretraining_new(network: SwinUNETR) -> Any:
    return {"state_dict": under("module.", under("swinViT.", network.swinViT.state_dict()) | HEADS)}


def pretraining_older(network: SwinUNETR) -> Any:
    return {"state_dict": under("swin_vit.", first_names(network.swinViT.state_dict())) | HEADS}


def voco_large(network: SwinUNETR) -> Any:
    kept = {key: value for key, value in network.state_dict().items() if not key.startswith(("decoder", "out."))}
    heads = {f"{side}.layer1.0.weight": torch.ones(8, 12) for side in ("student", "teacher")}
    return under("backbone.", kept) | heads


def voco_training(network: SwinUNETR) -> Any:
    state = network.swinViT.state_dict()
    student = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    both = under("student.swinViT.", student) | under("teacher.swinViT.", state)
    return {"global_step": 3, "state_dict": both, "optimizer": {}}


def suprem(network: SwinUNETR) -> Any:
    state = under("module.backbone.", network.state_dict()) | {"module.organ_embedding": torch.ones(2, 4)}
    return {"net": state, "optimizer": {}, "scheduler": {}, "epoch": 3}


#: Name of the layout -> how files of it are made, how its network merges, and the family that is found.
SWIN: dict[str, tuple[Callable[[SwinUNETR], Any], type[nn.Module], bool, str]] = {
    "pretraining_first": (pretraining_first, EarlyMerging, False, "SwinUNETR pre-training"),
    "pretraining_new": (pretraining_new, EarlyMerging, False, "SwinUNETR pre-training"),
    "pretraining_older": (pretraining_older, EarlyMerging, False, "SwinUNETR pre-training"),
    "monai": (lambda network: network.state_dict(), PatchMerging, False, "MONAI SwinUNETR"),
    "monai_v2": (lambda network: {"model": network.state_dict()}, PatchMerging, True, "MONAI SwinUNETR"),
    "voco_10k": (lambda network: under("swinViT.", network.swinViT.state_dict()), EarlyMerging, True, "VoCo 10k"),
    "voco_training": (voco_training, EarlyMerging, True, "VoCo 10k"),
    "voco_large": (voco_large, EarlyMerging, True, "VoCo large-scale"),
    "suprem": (suprem, EarlyMerging, False, "SuPreM Swin UNETR"),
}


@pytest.mark.filterwarnings("ignore:The file holds several networks")
@pytest.mark.parametrize("layout", SWIN)
def test_a_swin_of_every_layout_gives_the_maps_of_its_own_network(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, merging, v2, family = SWIN[layout]
    network = swinunetr(merging, v2=v2)
    torch.save(make(network), tmp_path / "w.pt")
    found = recognised(read_weights(tmp_path / "w.pt"))
    assert found is not None
    assert found.family.name.startswith(family)
    encoder = load_encoder(tmp_path / "w.pt")
    assert "100.0% of the values" in capsys.readouterr().out
    with torch.no_grad():
        for ours, theirs in zip(encoder(VOLUME), network.swinViT(VOLUME, normalize=True), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def saved(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def test_a_backbone_that_is_named_otherwise_than_the_family_fixes_is_warned_of(tmp_path: Path) -> None:
    file = saved(tmp_path / "w.pt", suprem(swinunetr()))
    with pytest.warns(UserWarning, match="SuPreM.*downsample merging where theirs is published.*something else"):
        load_encoder(file, {"name": "swin", "feature_size": 12, "num_heads": [2, 3, 4, 6]})
    assert load_encoder(file, {"downsample": "merging"}).recipe.downsample == "merging"


def test_a_file_without_its_end_and_one_of_another_size_are_named(tmp_path: Path) -> None:
    state = pretraining_new(swinunetr())["state_dict"]
    half = saved(tmp_path / "half.pt", {"state_dict": dict(list(state.items())[: len(state) // 2])})
    with pytest.raises(CheckpointError, match=r"half\.pt is .*SwinUNETR, but holds 2 of the 4 stages.*it is not whole"):
        load_encoder(half)
    whole = saved(tmp_path / "w.pt", {"state_dict": state})
    for backbone in ("swin_small", "hybrid_nano"):
        with pytest.raises(CheckpointError, match=r"fills only .*It is SwinUNETR pre-training.*feature_size 12"):
            load_encoder(whole, backbone)


@pytest.mark.parametrize("network", ["unet", "segresnet"])
def test_a_network_that_no_backbone_is_says_which_it_is(tmp_path: Path, network: str) -> None:
    names = {
        "unet": ("module.backbone.down_tr64.ops.0.conv1.weight", "module.backbone.down_tr512.ops.1.conv1.weight"),
        "segresnet": ("module.convInit.conv.weight", "module.down_layers.0.1.conv1.conv.weight"),
    }
    file = saved(tmp_path / "w.pt", {"net": {name: torch.ones(4, 1, 3, 3, 3) for name in names[network]}})
    with pytest.raises(CheckpointError, match=r"SuPreM.* which no backbone of mim3d is, so its weights cannot be used"):
        load_encoder(file)
    assert "none of mim3d's: it is" in describe(file).rows["network"]


def test_an_unknown_layout_shows_its_names_and_the_nearest_family(tmp_path: Path) -> None:
    state = {"patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "head.weight": torch.ones(3, 8)}
    file = saved(tmp_path / "w.pt", {"model": state})
    told = r"2 tensors such as patch_embed\.proj\.weight \(8, 3, 4, 4\), head\.weight \(3, 8\); the nearest family is"
    with pytest.raises(CheckpointError, match=told):
        load_encoder(file)
    assert describe(file).rows["family"].startswith("unknown: 2 tensors")
    other = saved(tmp_path / "other.pt", {"a": torch.ones(2, 2)})
    assert describe(other).rows["family"].endswith("none of the families of weights that mim3d knows is near")


def test_a_description_says_family_size_coverage_input_and_licence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(tmp_path / "w.pt", suprem(swinunetr()))
    assert main(["weights", file]) == 0
    said = capsys.readouterr().out
    for part in (
        "SuPreM Swin UNETR",
        "not for commercial use",
        "swin: feature_size 12, depths [2, 2, 2, 2]",
        "100.0% of the values",
        "under net, each name behind module.",
        "expects voxel size   1.5 x 1.5 x 1.5 mm",
        "-175 to 250 HU mapped to 0 to 1",
    ):
        assert part in said
    assert main(["weights", file, "--json", "true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["origin"]["expects"]["spacing_mm"] == [1.5, 1.5, 1.5]
    assert told["origin"]["commercial"] is False


def test_our_own_weights_are_described_by_their_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encoder = create_model("hybrid_nano")
    card = {"backbone": "hybrid_nano", "spacing_mm": [1.0, 1.0, 2.0], "intensity": {"kind": "zscore", "window": None}}
    save_network(tmp_path / "own", encoder, card)
    assert main(["weights", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "hybrid_nano" in said
    assert "100.0% of the values" in said
    assert "1.0 x 1.0 x 2.0 mm" in said
    assert "z-score of each scan" in said
    assert origin_of(tmp_path / "own") is None


@pytest.fixture
def cases(tmp_path: Path) -> CaseSet:
    """Scans of voxels of 1 x 1 x 6 mm."""
    for number in range(2):
        write_scan(tmp_path / "scans" / f"{number}.nii.gz", np.ones((8, 8, 4), np.int16), np.diag([1.0, 1.0, 6.0, 1.0]))
    return read_cases(str(tmp_path / "scans"))


def test_fine_tuning_plans_from_what_the_family_expects_and_says_so(
    tmp_path: Path, cases: CaseSet, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(LicenceWarning, match="SuPreM.*not for commercial use.*may be bound by these terms"):
        initial = initialise(None, saved(tmp_path / "w.pt", suprem(swinunetr())), 1)
    said = " ".join(capsys.readouterr().out.split())
    assert "SuPreM Swin UNETR (Li et al. 2024); its network expects modality CT" in said
    assert "voxel size 1.5 x 1.5 x 1.5 mm, orientation RAS+, intensities -175 to 250 HU" in said
    assert initial.own_intensity == Intensity(window=(-175.0, 250.0))
    with pytest.warns(UserWarning, match=r"learned at spacing_mm 1.5 1.5 1.5, but the scans have 1 1 6 \(median\)"):
        assert initial.spacing_mm(None, cases) == (1.5, 1.5, 1.5)
    with pytest.warns(UserWarning, match="prepared at 2 2 2"):
        assert initial.spacing_mm((2.0, 2.0, 2.0), cases) == (2.0, 2.0, 2.0)
    asked = FinetuneSettings("data", out="out")
    fixed = fixed_choices(cases, create_task("segmentation"), asked, initial)
    assert fixed.values["spacing_mm"] == (1.5, 1.5, 1.5)
    assert fixed.by == {"spacing_mm": "of the encoder", "intensity": "of the encoder"} | {
        name: by for name, by in fixed.by.items() if name not in ("spacing_mm", "intensity")
    }


def resenc_unet(kernels: Any = 3) -> nn.Module:
    """nnU-Net's network with random weights, whose norms are not those that it begins with."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    torch.manual_seed(0)
    network = ResidualEncoderUNet(
        1, 3, [4, 8, 16], nn.Conv3d, kernels, [1, 2, 2], [1, 2, 1], 2, [1, 1], True, nn.InstanceNorm3d,
        {"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True},
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network.eval()


#: A configuration of a plan as nnU-Net writes it, along Z, Y, X.
CONFIGURATION = {"spacing": [3.0, 1.0, 0.8], "normalization_schemes": ["ZScoreNormalization"]}
PLANS = {"configurations": {"3d_fullres": CONFIGURATION}, "transpose_backward": [0, 1, 2]}


def nnunet_file(state: dict[str, Tensor], **plan: Any) -> Any:
    plans = {**PLANS, "configurations": {"3d_fullres": {**CONFIGURATION, **plan}}}
    arguments = {"plans": plans, "configuration": "3d_fullres", "device": torch.device("cpu")}
    return {"network_weights": state, "init_args": arguments, "trainer_name": "nnUNetTrainer", "current_epoch": 3}


def nnssl_file(state: dict[str, Tensor]) -> Any:
    one_mm = {"onemmiso": {**CONFIGURATION, "spacing": [1, 1, 1]}}
    plan = {"pretrain_plan": {"configurations": one_mm}, "key_to_encoder": "encoder.stages"}
    return {"network_weights": state, "nnssl_adaptation_plan": plan}


@pytest.mark.parametrize(
    ("make", "family", "spacing"),
    [
        (nnunet_file, "nnU-Net residual encoder", (0.8, 1.0, 3.0)),
        (nnssl_file, "nnssl ResEnc", (1.0, 1.0, 1.0)),
        (dict, "nnU-Net residual encoder", None),
    ],
)
@pytest.mark.filterwarnings("error")
def test_a_residual_encoder_gives_the_maps_of_nnunets_network(
    tmp_path: Path, make: Callable[..., Any], family: str, spacing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    network = resenc_unet()
    file = saved(tmp_path / "w.pth", make(network.state_dict()))
    encoder = load_encoder(file)
    assert "100.0% of the values" in capsys.readouterr().out
    with torch.no_grad():
        for ours, theirs in zip(encoder(VOLUME), network.encoder(VOLUME), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    origin = origin_of(file)
    assert origin is not None
    assert origin.family.startswith(family)
    assert origin.expects.spacing_mm == spacing
    assert origin.expects.intensity == (None if spacing is None else Intensity(kind="zscore", window=None))


def test_the_voxel_size_of_a_plan_with_exchanged_axes_is_that_of_the_files(tmp_path: Path) -> None:
    content = nnunet_file(resenc_unet().state_dict())
    # Axes of the plan are the last, the first and the second of the arrays.
    content["init_args"]["plans"] |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    origin = origin_of(saved(tmp_path / "w.pth", content))
    assert origin is not None
    assert origin.expects.spacing_mm == (3.0, 0.8, 1.0)


@pytest.mark.parametrize("name", ["3DINO", "SuPreM", "MAE of pictures"])
def test_terms_that_exclude_commerce_are_known(name: str) -> None:
    found = [family for family in FAMILIES if family.name.startswith(name)]
    assert found
    assert not any(family.commercial for family in found)


def test_what_mim3d_exported_along_other_axes_is_turned_back(tmp_path: Path) -> None:
    state = resenc_unet().state_dict()
    turned = {key: value.transpose(2, 4) if value.ndim == 5 else value for key, value in state.items()}
    file = saved(tmp_path / "w.pth", {**nnssl_file(turned), "mim3d": {"axes": "ZYX"}})
    assert torch.equal(load_encoder(file).stem.convs[0].conv.weight, state["encoder.stem.convs.0.conv.weight"])


def test_networks_of_nnunet_that_are_none_of_ours_say_why(tmp_path: Path) -> None:
    flat = saved(tmp_path / "flat.pth", nnunet_file(resenc_unet([[1, 3, 3], 3, 3]).state_dict()))
    with pytest.raises(CheckpointError, match=r"kernels of \(1, 3, 3\), mim3d's \(3, 3, 3\) alone"):
        load_encoder(flat)
    strides = {"arch_kwargs": {"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}}
    slabs = saved(tmp_path / "slabs.pth", nnunet_file(resenc_unet().state_dict(), architecture=strides))
    with pytest.raises(CheckpointError, match=r"its plan has strides \[\[1, 1, 1\], \[1, 2, 2\]"):
        load_encoder(slabs)
    plain = {f"encoder.stages.{stage}.0.convs.0.conv.weight": torch.ones(4, 4, 3, 3, 3) for stage in range(2)}
    with pytest.raises(CheckpointError, match=r"PlainConvUNet.*no residual blocks"):
        load_encoder(saved(tmp_path / "plain.pth", nnunet_file(plain)))


def test_a_mapping_of_intensities_that_mim3d_has_not_is_named(tmp_path: Path) -> None:
    schemes = {"normalization_schemes": ["CTNormalization"]}
    origin = origin_of(saved(tmp_path / "w.pth", nnunet_file(resenc_unet().state_dict(), **schemes)))
    assert origin is not None
    assert origin.expects.intensity is None
    assert "nnU-Net's CTNormalization" in str(origin)


class PlainTransformer(nn.Module):
    """A vision transformer of torch's own layers, of volumes or pictures, with a class token and learned positions."""

    def __init__(self, axes: int = 3, edge: int = 8, grid: int = 2, channels: int = 1, width: int = 24) -> None:
        super().__init__()
        torch.manual_seed(0)
        convolution = nn.Conv3d if axes == 3 else nn.Conv2d
        self.embed = convolution(channels, width, edge, edge)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 1 + grid**axes, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, nn.functional.gelu, 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)
        self.eval()

    def forward(self, image: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens after the last norm, without the class token."""
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + (self.positions if positions is None else positions)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens)[:, 1:]

    def published(self) -> dict[str, Tensor]:
        """Its tensors in the names of timm and MAE."""
        names = {"in_proj_": "qkv.", "self_attn.": "attn.", "out_proj.": "proj.", "linear": "mlp.fc"}
        state = {"cls_token": self.token, "pos_embed": self.positions}
        state |= {f"patch_embed.proj.{name}": value for name, value in self.embed.state_dict().items()}
        for name, value in self.layers.state_dict().items():
            for theirs, published in names.items():
                name = name.replace(theirs, published)
            state[f"blocks.{name}"] = value
        return state | {f"norm.{name}": value for name, value in self.norm.state_dict().items()}


def with_decoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = {"mask_token": torch.ones(1, 1, 12), "decoder_pos_embed": torch.ones(1, 9, 12)}
    return state | decoder | {"decoder_blocks.0.norm1.weight": torch.ones(12), "decoder_pred.weight": torch.ones(8, 12)}


def mae_file(network: PlainTransformer) -> Any:
    return {"model": with_decoder(network.published()), "args": argparse.Namespace(model="mae"), "epoch": 1}


def hi_end_file(network: PlainTransformer) -> Any:
    state = network.published()
    with torch.no_grad():
        # Its class token has no position.
        network.positions[:, 0] = 0
    table = state.pop("pos_embed")[:, 1:]
    beside = {"encoder_to_decoder.0.weight": torch.ones(2, 2), "decoder.norm.weight": torch.ones(2)}
    return {
        "epoch": 1,
        "state_dict": under("module.", under("encoder.", state) | {"encoder_pos_embed": table} | beside),
    }


def three_dino_file(network: PlainTransformer) -> Any:
    """Blocks in chunks, and factors of branches beside them, which the network has in its weights."""
    state = {}
    for name, value in network.published().items():
        if name.startswith("blocks."):
            number = int(name.split(".")[1])
            name = name.replace(f"blocks.{number}.", f"blocks.{number // 2}.{number}.")
            for branch, scale in (("attn.proj.", "ls1"), ("mlp.fc2.", "ls2")):
                if branch in name:
                    factors = torch.linspace(0.5, 2, len(value))
                    state[f"{name.partition(branch)[0]}{scale}.gamma"] = factors
                    value = value / (factors[:, None] if value.ndim == 2 else factors)
        state[f"backbone.{name}"] = value
    return {"teacher": state | {"backbone.mask_token": torch.ones(1, 24), "dino_head.mlp.0.weight": torch.ones(2, 2)}}


SMALL_VOLUME = VOLUME[..., :16, :16, :16]


@pytest.mark.parametrize(
    ("make", "family"), [(mae_file, "MAE of volumes"), (hi_end_file, "Hi-End-MAE"), (three_dino_file, "3DINO")]
)
def test_a_transformer_of_every_layout_gives_the_tokens_of_its_own_network(
    tmp_path: Path, make: Callable[[PlainTransformer], Any], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    network = PlainTransformer()
    file = saved(tmp_path / "w.pth", make(network))
    with pytest.raises(CheckpointError, match=r"do not show the number of attention heads.*--backbone\.num_heads"):
        load_encoder(file)
    with pytest.warns(UserWarning, match="blocks that the file may have lost"):
        encoder = load_encoder(file, {"num_heads": 4})
    assert "100.0% of the values" in capsys.readouterr().out
    with torch.no_grad():
        tokens = encoder(SMALL_VOLUME)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, network(SMALL_VOLUME), atol=1e-5, rtol=1e-5)
    origin = origin_of(file)
    assert origin is not None
    assert origin.family.startswith(family)


def test_positions_for_crops_of_another_size_are_interpolated_as_in_3dino(tmp_path: Path) -> None:
    network = PlainTransformer()
    file = saved(tmp_path / "w.pth", three_dino_file(network))
    with pytest.warns(UserWarning, match="may have lost"):
        encoder = load_encoder(file, {"num_heads": 4})
    table = network.positions[:, 1:].reshape(1, 2, 2, 2, -1).permute(0, 4, 1, 2, 3)
    table = nn.functional.interpolate(table, scale_factor=(3.1 / 2,) * 3, mode="trilinear")
    positions = torch.cat([network.positions[:, :1], table.flatten(2).transpose(1, 2)], dim=1)
    volume = VOLUME[..., :24, :24, :24]
    with torch.no_grad():
        tokens = encoder(volume)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, network(volume, positions), atol=1e-5, rtol=1e-5)


def test_fixed_positions_are_computed_and_fit_any_grid(tmp_path: Path) -> None:
    network = PlainTransformer()
    with torch.no_grad():
        network.positions[0, 1:] = sincos_positions((2, 2, 2), 24)
    with pytest.warns(UserWarning, match="may have lost"):
        encoder = load_encoder(saved(tmp_path / "w.pth", mae_file(network)), {"num_heads": 4})
    assert encoder.recipe.positions == "sincos"
    with torch.no_grad():
        tokens = encoder(SMALL_VOLUME)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, network(SMALL_VOLUME), atol=1e-5, rtol=1e-5)


def test_a_transformer_of_pictures_is_made_as_deep_as_wide(tmp_path: Path) -> None:
    network = PlainTransformer(axes=2, channels=3)
    file = saved(tmp_path / "w.pth", mae_file(network))
    with pytest.warns(UserWarning, match="may have lost"):
        encoder = load_encoder(file, {"num_heads": 4})
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        tokens = encoder(picture[..., None].expand(-1, -1, -1, -1, 8))[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, network(picture), atol=1e-5, rtol=1e-5)
        # A grey picture is seen by one channel as it is by three.
        with pytest.warns(UserWarning, match=r"may have lost|learned from 3 channels"):
            grey = initialise({"num_heads": 4}, file, 1).encoder
        assert grey is not None
        volume = picture[:, :1, :, :, None].expand(-1, -1, -1, -1, 8)
        tokens = grey.eval()(volume)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, network(picture[:, :1].expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)


def test_heads_of_published_transformers_are_known_and_lost_blocks_named(tmp_path: Path) -> None:
    """Shapes alone: no values are needed to know a network."""
    names = PlainTransformer(width=24).published()
    wide = {}
    for name, value in names.items():
        shape = [size * 32 if size in (24, 72, 96) else size for size in value.shape]
        for number in range(12) if name.startswith("blocks.0.") else [0]:
            wide[name.replace("blocks.0.", f"blocks.{number}.")] = torch.zeros(1).expand(shape)
    wide = {
        name: value for name, value in wide.items() if not name.startswith("blocks.") or int(name.split(".")[1]) < 12
    }
    found = recognised(HeldWeights({**wide, "pos_embed": torch.ones(1, 9, 768), "cls_token": torch.ones(1, 1, 768)}))
    assert found is not None
    assert found.shown["num_heads"] == 12
    assert found.unfit == ""
    lost = {name: value for name, value in wide.items() if not name.startswith("blocks.11.")}
    found = recognised(HeldWeights({**lost, "pos_embed": torch.ones(1, 9, 768), "cls_token": torch.ones(1, 1, 768)}))
    assert found is not None
    assert found.unfit == ", but holds 11 of its 12 blocks; it is not whole, so copy it again"


def test_damaged_shapes_are_never_an_error_of_another_kind(tmp_path: Path) -> None:
    files = [suprem(swinunetr()), three_dino_file(PlainTransformer()), nnssl_file(resenc_unet().state_dict())]
    for number, content in enumerate(files):
        place = next(name for name, value in content.items() if isinstance(value, dict) and len(value) > 9)
        for every, (name, value) in enumerate(content[place].items()):
            if every % 37 == number:
                wrong = {**content[place], name: value.new_zeros([0] * (value.ndim + every % 2))}
                file = saved(tmp_path / "w.pt", {**content, place: wrong})
                for act in (describe, load_encoder):
                    with suppress(CheckpointError, ConfigError):
                        act(file)


@pytest.mark.parametrize("said", [None, "learned from CT, but z-score suits these"])
def test_a_modality_that_is_not_that_of_the_scans_is_said(
    tmp_path: Path, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = PlainTransformer()
    with pytest.warns(UserWarning, match="may have lost"):
        initial = initialise({"num_heads": 4}, saved(tmp_path / "w.pt", hi_end_file(network)), 1)
    planned = Intensity(kind="zscore", window=None) if said else Intensity()
    monkeypatch.setattr("mim3d.workflows.shared.initialisation.plan_intensity", lambda scans: planned)
    with pytest.warns(UserWarning, match=said) if said else nullcontext():
        assert initial.intensity(None, None) == planned


@pytest.mark.parametrize("prefix", ["module.backbone.", "module.", ""])
def test_mim_of_a_published_size_needs_no_word_pre_trained_or_fine_tuned(tmp_path: Path, prefix: str) -> None:
    network = create_model("hybrid_tiny")
    state = {**network.state_dict(), "pos_embed": sincos_positions((2, 2, 2), 96)[None]}
    others = {"module.decoder5.conv.weight" if prefix else "decoder_pred.weight": torch.ones(2, 2)}
    file = saved(tmp_path / "w.pth", {"state_dict": under(prefix, state) | others, "epoch": 3})
    encoder = load_encoder(file)
    assert encoder.recipe == network.recipe
    volume = VOLUME[..., :16, :16, :16]
    with torch.no_grad():
        for ours, theirs in zip(encoder(volume), network.eval()(volume), strict=True):
            assert torch.equal(ours, theirs)
    assert describe(file).rows["expects intensities"] == "-1000 to 1000 HU mapped to 0 to 1"
