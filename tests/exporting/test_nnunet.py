"""The checkpoint for nnU-Net: its network takes the tensors and computes the same, and nnU-Net trains from it."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import mim3d
from mim3d.backbones import create_recipe
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError
from mim3d.exporting.nnunet_primus import primus_entries, unlike_primus
from mim3d.tasks.trained import load_trained
from mim3d.weights import IN_CARD, origin_of
from tests.primus import PlainPrimus

ZSCORE = {"kind": "zscore", "window": None}

PRIMUS = {"name": "primus_nano", "width": 24, "depth": 2, "num_heads": 2, "position_grid": [2, 3, 4]}


def resenc(**changes):
    return {"name": "resenc", "widths": [4, 8, 8], "depths": [1, 1, 2], **changes}


def exported(run, out: Path, **settings) -> dict:
    export(str(run), str(out), format="nnunet", **settings)
    return torch.load(out / "checkpoint_final.pth", weights_only=True)


def unet_of(plan: dict, num_classes: int = 2) -> nn.Module:
    """The network as nnU-Net builds it of a plan: classes are found by their dotted paths."""
    from pydoc import locate

    architecture = plan["architecture_plans"]
    given = dict(architecture["arch_kwargs"])
    given |= {name: given[name] and locate(given[name]) for name in architecture["arch_kwargs_requiring_import"]}
    return locate(architecture["arch_class_name"])(
        input_channels=plan["pretrain_num_input_channels"], num_classes=num_classes, deep_supervision=False, **given
    ).eval()


@pytest.mark.parametrize("axes", ["XYZ", "ZYX"])
def test_nnunets_encoder_gives_our_features(make, tmp_path, axes):
    run = make("encoder", backbone=resenc(), channels=2, spacing_mm=[1.0, 1.0, 1.5], intensity=ZSCORE)
    content = exported(run, tmp_path / "out", axes=axes, patch_size=(8, 8, 12))
    plan, state = content["nnssl_adaptation_plan"], content["network_weights"]
    # As nnU-Net's trainer fills it: stem and stages apart, each in whole.
    encoder = unet_of(plan).encoder
    for part, key in ((encoder.stem, plan["key_to_stem"]), (encoder.stages, plan["key_to_encoder"])):
        part.load_state_dict({name.removeprefix(f"{key}."): v for name, v in state.items() if name.startswith(key)})
    image = torch.randn(1, 2, 8, 12, 16, generator=torch.Generator().manual_seed(1))
    ours = mim3d.load_encoder(run)
    with torch.no_grad():
        theirs = encoder(image if axes == "XYZ" else image.transpose(2, 4))
        for one, other in zip(ours.feature_maps(image), theirs, strict=True):
            torch.testing.assert_close(one, other if axes == "XYZ" else other.transpose(2, 4), atol=1e-5, rtol=1e-5)
    if axes == "XYZ":
        assert all(torch.equal(value, state[f"encoder.{key}"]) for key, value in ours.state_dict().items())


def test_the_plan_says_how_scans_are_prepared_along_nnunets_axes(make, tmp_path):
    run = make("encoder", backbone=resenc(), spacing_mm=[1.0, 1.2, 3.0])
    content = exported(run, tmp_path / "out", patch_size=(8, 12, 16))
    plan = content["nnssl_adaptation_plan"]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [3.0, 1.2, 1.0] and configuration["spacing_style"] == "median"
    assert configuration["normalization_schemes"] == ["CTNormalization"]
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"] == [16, 12, 8]
    assert plan["keys_to_in_proj"][0] + ".weight" in content["network_weights"]
    assert plan["architecture_kwargs"]["n_stages"] == 3 and plan["key_to_lpe"] is None
    # A repository of Hugging Face is known by the plan alone.
    assert json.loads((tmp_path / "out" / "adaptation_plan.json").read_text()) == plan
    text = (tmp_path / "out" / "README.md").read_text()
    assert "1 x 1.2 x 3 mm (X, Y, Z)" in text and "--axes\nZYX" in text and "clip(v, -160, 240)" in text


def test_scans_that_kept_their_voxel_size_are_planned_so(make, tmp_path):
    run = make("encoder", backbone=resenc(), intensity=ZSCORE)
    plan = exported(run, tmp_path / "out", patch_size=(8, 8, 8))["nnssl_adaptation_plan"]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] is None and configuration["spacing_style"] == "noresample"
    assert configuration["normalization_schemes"] == ["ZScoreNormalization"]


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_a_decoder_of_nnunets_form_goes_along_whole(make, tmp_path, deep_supervision):
    task = {"decoder": "nnunet", "deep_supervision": deep_supervision}
    run = make("segmenter", task=task, backbone=resenc())
    content = exported(run, tmp_path / "out")
    unet = unet_of(content["nnssl_adaptation_plan"], num_classes=3)
    unet.load_state_dict(content["network_weights"])
    image = torch.randn(1, 1, 8, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(unet(image), load_trained(run).module.logits(image), atol=1e-5, rtol=1e-5)
    assert "The decoder is the trained one" in (tmp_path / "out" / "README.md").read_text()


def test_another_decoder_stays_behind(make, tmp_path):
    content = exported(make("segmenter", task={"decoder": "additive"}, backbone=resenc()), tmp_path / "out")
    # nnU-Net's first weights, which are always the same.
    again = exported(tmp_path / "runs" / "patient_mueller", tmp_path / "again")
    assert all(torch.equal(value, again["network_weights"][key]) for key, value in content["network_weights"].items())
    assert "The decoder in the file is not trained" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        ({"name": "hybrid", "widths": [8, 16], "depths": [1, 1], "num_heads": 2}, "nnU-Net has no such network"),
        (
            {"name": "vit", "token_edge": 4, "width": 24, "depth": 1, "num_heads": 2, "positions": "rotary"},
            "is Primus, and this one has positions rotary where that has learned_rotary",
        ),
        ({**PRIMUS, "name": "primus_nano", "num_registers": 2}, "2 registers where that has none"),
        ({**PRIMUS, "name": "primus_nano", "token_edge": 6}, "token_edge 6 where that has powers of 2"),
    ],
)
def test_an_encoder_that_nnunet_has_no_network_for_is_refused(make, tmp_path, backbone, why):
    with pytest.raises(
        CheckpointError, match=rf"the backbone \w+, but --format nnunet is for resenc and primus.*{why}"
    ):
        export(str(make("encoder", backbone=backbone)), str(tmp_path / "out"), format="nnunet")
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_read_back_as_weights(make, tmp_path):
    run = make("encoder", backbone=resenc())
    exported(run, tmp_path / "out", patch_size=(8, 8, 8))
    again = mim3d.load_encoder(tmp_path / "out" / "checkpoint_final.pth", resenc())
    ours = mim3d.load_encoder(run).state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("began", [None, {"family": "3DINO", "licence": "CC BY-NC-ND 4.0", "commercial": False}])
def test_a_checkpoint_of_ours_has_our_terms_and_not_those_of_the_layouts_authors(make, tmp_path, began):
    run = make("encoder", backbone=resenc(), **({} if began is None else {IN_CARD: began}))
    with nullcontext() if began is None else pytest.warns(UserWarning, match="3DINO"):
        export(str(run), str(tmp_path / "out"), format="nnunet", patch_size=(8, 8, 8), license="apache-2.0")
    origin = origin_of(tmp_path / "out" / "checkpoint_final.pth")
    assert origin is not None and origin.family.startswith("mim3d, exported in the layout of")
    assert origin.commercial == (began is None)
    assert origin.licence == ("apache-2.0" if began is None else "CC BY-NC-ND 4.0")


def plain_primus(content: dict) -> PlainPrimus:
    """The network that a checkpoint is for, with its tensors, as nnU-Net's trainer fills it: stem and encoder whole."""
    plan, state = content["nnssl_adaptation_plan"], content["network_weights"]
    arguments = plan["architecture_plans"]["arch_kwargs"]
    assert plan["architecture_plans"]["arch_class_name"] == "PrimusX"
    network = PlainPrimus(
        tuple(voxels // 8 for voxels in plan["recommended_downstream_patchsize"]),
        arguments["embed_dim"],
        arguments["encoder_eva_depth"],
        arguments["encoder_eva_numheads"],
        channels=plan["pretrain_num_input_channels"],
        scaled=arguments["scale_attn_inner"],
    )
    for part in (plan["key_to_encoder"], plan["key_to_stem"]):
        inside = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(part)}
        network.get_submodule(part).load_state_dict(inside)
    return network


@pytest.mark.parametrize("patch_size", [(16, 24, 32), (24, 16, 16)], ids=["of its positions", "another"])
@pytest.mark.parametrize("axes", ["XYZ", "ZYX"])
def test_nnunets_primus_gives_our_features(make, tmp_path, axes, patch_size):
    """The plain network stands for nnU-Net's, whose package needs others (a slow test has it)."""
    run = make("encoder", backbone=PRIMUS, channels=2, spacing_mm=[1.0, 1.0, 1.5], intensity=ZSCORE)
    content = exported(run, tmp_path / "out", axes=axes, patch_size=patch_size)
    plan, network, ours = content["nnssl_adaptation_plan"], plain_primus(content), mim3d.load_encoder(run)
    array = torch.randn(1, 2, *patch_size[::-1], generator=torch.Generator().manual_seed(1))
    image = array if axes == "XYZ" else array.transpose(2, 4)
    with torch.no_grad():
        expected = ours.feature_maps(image)[0]
        expected = expected if axes == "XYZ" else expected.transpose(2, 4)
        torch.testing.assert_close(network.features(array), expected, atol=1e-5, rtol=1e-5)
    # nnU-Net interpolates positions where these two differ, and finds them by this name.
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["patch_size"] == plan["recommended_downstream_patchsize"]
    assert [key for key in content["network_weights"] if key.startswith(plan["key_to_lpe"])] == ["eva.pos_embed"]
    assert plan["keys_to_in_proj"][0] + ".weight" in content["network_weights"]
    assert "architecture_kwargs" not in plan


@pytest.mark.parametrize("axes", ["XYZ", "ZYX"])
def test_a_primus_for_nnunet_is_read_back_as_it_was(make, tmp_path, axes):
    run = make("encoder", backbone={**PRIMUS, "position_grid": [2, 2, 2]})
    exported(run, tmp_path / "out", axes=axes, patch_size=(16, 16, 16))
    ours, again = mim3d.load_encoder(run), mim3d.load_encoder(tmp_path / "out" / "checkpoint_final.pth")
    assert again.recipe == ours.recipe
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in ours.state_dict().items())
    text = (tmp_path / "out" / "README.md").read_text()
    assert "-tr PretrainedTrainer_Primusx" in text and "crops of\n16 x 16 x 16 voxels" in text
    assert "plan_like_dynamic" not in text


@pytest.mark.parametrize("size", ["S", "B", "M", "L"])
def test_sizes_that_nnunet_names_go_by_their_names(size):
    recipe = create_recipe(f"primus_{size.lower()}")
    entries = primus_entries(recipe)["architecture_plans"]
    assert (entries["arch_class_name"], entries["arch_kwargs"]) == (f"Primus{size}", None)
    other = replace(recipe, token_edge=16)
    assert primus_entries(other)["architecture_plans"]["arch_kwargs"]["patch_embed_size"] == [16, 16, 16]
    assert not unlike_primus(recipe) and not unlike_primus(other)


def test_the_encoder_of_a_segmenter_of_the_form_of_primus_goes_alone(make, tmp_path):
    run = make("segmenter", task={"patch_size": [16, 16, 16]}, backbone=PRIMUS)
    content = exported(run, tmp_path / "out")
    assert {key.partition(".")[0] for key in content["network_weights"]} == {"eva", "down_projection"}
    assert content["nnssl_adaptation_plan"]["recommended_downstream_patchsize"] == [16, 16, 16]


def write_data_set(root: Path) -> None:
    """Five scans with a bright ball, in nnU-Net's form."""
    folder = root / "raw" / "Dataset001_Balls"
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    places = np.indices((36, 40, 32))
    for case in range(5):
        centre = rng.integers(12, 20, (3, 1, 1, 1))
        ball = ((places - centre) ** 2).sum(0) < 64
        image = rng.normal(size=ball.shape) + 3 * ball
        affine = np.diag([1.0, 1.0, 1.5, 1.0])
        nibabel.save(nibabel.Nifti1Image(image.astype("f4"), affine), folder / "imagesTr" / f"case{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(ball.astype("u1"), affine), folder / "labelsTr" / f"case{case}.nii.gz")
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "ball": 1},
        "numTraining": 5,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "NibabelIOWithReorient",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["X", "S"])
@pytest.mark.parametrize("axes", ["XYZ", "ZYX"])
def test_primus_of_its_authors_package_gives_our_features(make, tmp_path, axes, size):
    """Out of mim3d and back again, and the plain network of the other tests beside it."""
    primus = pytest.importorskip("dynamic_network_architectures.architectures.primus", exc_type=ImportError)
    backbone = {**PRIMUS, "layer_scale": 0.2} if size == "X" else {"name": "primus_s", "position_grid": [2, 3, 4]}
    run = make("encoder", backbone=backbone, spacing_mm=[1.0, 1.0, 1.5], intensity=ZSCORE)
    content = exported(run, tmp_path / "out", axes=axes, patch_size=(16, 24, 32))
    plan, state = content["nnssl_adaptation_plan"], content["network_weights"]
    architecture, shape = plan["architecture_plans"], plan["recommended_downstream_patchsize"]
    if size == "S":
        network = getattr(primus, architecture["arch_class_name"])(1, 2, (8, 8, 8), tuple(shape))
    else:
        given = architecture["arch_kwargs"]
        named = {name.removeprefix("encoder_"): value for name, value in given.items() if name != "patch_embed_size"}
        network = primus.Primus(1, patch_embed_size=(8, 8, 8), num_classes=2, input_shape=tuple(shape), **named)
    network.eval()
    for part in (network.key_to_encoder, network.key_to_stem):
        inside = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(part)}
        network.get_submodule(part).load_state_dict(inside)
    array = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(1))
    image = array if axes == "XYZ" else array.transpose(2, 4)
    seen = []
    network.eva.register_forward_hook(lambda *given: seen.append(given[-1][0]))
    again = tmp_path / "again.pth"
    torch.save({"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan}, again)
    with torch.no_grad():
        network(array)
        theirs = seen[0].mT.unflatten(2, [edge // 8 for edge in shape])
        ours = mim3d.load_encoder(run).feature_maps(image)[0]
        torch.testing.assert_close(theirs, ours if axes == "XYZ" else ours.transpose(2, 4), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mim3d.load_encoder(again)(array)[0], theirs, atol=1e-5, rtol=1e-5)
        if size == "X":
            torch.testing.assert_close(plain_primus(content).features(array), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "trainer"),
    [
        ("preprocess_like_nnssl", "PretrainedTrainer"),
        ("plan_like_dynamic", "DynamicPretrainedTrainer"),
        ("preprocess_like_nnssl", "PretrainedTrainer_Primusx"),
    ],
)
def test_nnunet_trains_from_our_weights(make, tmp_path, command, trainer):
    if importlib.util.find_spec("nnunetv2") is None:
        pytest.skip("nnU-Net is not installed (nnunetv2)")
    if importlib.util.find_spec("nnunetv2.experiment_planning.like_nnssl") is None:
        pytest.skip("this nnU-Net has no commands for pre-trained weights (release 2.8.1 and before)")
    # The stages that nnU-Net plans for these scans.
    backbone = {"name": "resenc", "widths": [32, 64, 128], "depths": [1, 3, 4]}
    if trainer == "PretrainedTrainer_Primusx":
        pytest.importorskip("dynamic_network_architectures.architectures.primus", exc_type=ImportError)
        backbone = PRIMUS
    run = make("encoder", backbone=backbone, spacing_mm=[1.0, 1.0, 1.5], intensity=ZSCORE)
    content = exported(run, tmp_path / "out", patch_size=(32, 32, 32))
    write_data_set(tmp_path)
    folders = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    quick = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    trial = Path(__file__).with_name("nnunet_trial.py")
    done = subprocess.run(
        [sys.executable, str(trial), str(tmp_path / "out" / "checkpoint_final.pth"), command, trainer],
        cwd=tmp_path,
        env={**os.environ, **folders, **quick},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    if backbone is PRIMUS:
        ours = content["network_weights"]
    else:
        ours = {f"encoder.{key}": value for key, value in mim3d.load_encoder(run).state_dict().items()}
    assert all(torch.equal(value, start[key]) for key, value in ours.items()), done.stdout[-3000:]
    assert int(done.stdout.split("TENSORS THAT LEARNED")[1].split()[0]) >= len(ours)
    assert trainer != "PretrainedTrainer" or "WHOLE True" in done.stdout
