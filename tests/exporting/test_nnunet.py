"""The checkpoint for nnU-Net: its network takes the tensors and computes the same, and nnU-Net trains from it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import mim3d
from mim3d.commands.export import export
from mim3d.core.errors import CheckpointError
from mim3d.tasks.trained import load_trained

ZSCORE = {"kind": "zscore", "window": None}


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
        ({"name": "vit", "token_edge": 4, "width": 24, "depth": 1, "num_heads": 2, "positions": "rotary"}, "Primus"),
    ],
)
def test_an_encoder_that_nnunet_has_no_network_for_is_refused(make, tmp_path, backbone, why):
    with pytest.raises(
        CheckpointError, match=rf"the backbone {backbone['name']}, but --format nnunet is for resenc.*{why}"
    ):
        export(str(make("encoder", backbone=backbone)), str(tmp_path / "out"), format="nnunet")
    assert not (tmp_path / "out").exists()


def test_the_checkpoint_is_read_back_as_weights(make, tmp_path):
    run = make("encoder", backbone=resenc())
    exported(run, tmp_path / "out", patch_size=(8, 8, 8))
    again = mim3d.load_encoder(tmp_path / "out" / "checkpoint_final.pth", resenc())
    ours = mim3d.load_encoder(run).state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in again.state_dict().items())


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
@pytest.mark.parametrize("command", ["preprocess_like_nnssl", "plan_like_dynamic"])
def test_nnunet_trains_from_our_weights(make, tmp_path, command):
    if importlib.util.find_spec("nnunetv2") is None:
        pytest.skip("nnU-Net is not installed (nnunetv2)")
    if importlib.util.find_spec("nnunetv2.experiment_planning.like_nnssl") is None:
        pytest.skip("this nnU-Net has no commands for pre-trained weights (release 2.8.1 and before)")
    # The stages that nnU-Net plans for these scans.
    backbone = {"name": "resenc", "widths": [32, 64, 128], "depths": [1, 3, 4]}
    run = make("encoder", backbone=backbone, spacing_mm=[1.0, 1.0, 1.5], intensity=ZSCORE)
    exported(run, tmp_path / "out", patch_size=(32, 32, 32))
    write_data_set(tmp_path)
    folders = {f"nnUNet_{name}": str(tmp_path / name) for name in ("raw", "preprocessed", "results")}
    quick = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    trial = Path(__file__).with_name("nnunet_trial.py")
    done = subprocess.run(
        [sys.executable, str(trial), str(tmp_path / "out" / "checkpoint_final.pth"), command],
        cwd=tmp_path,
        env={**os.environ, **folders, **quick},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    start = torch.load(tmp_path / "start.pt", weights_only=True)
    ours = mim3d.load_encoder(run).state_dict()
    assert all(torch.equal(value, start[key]) for key, value in ours.items()), done.stdout[-3000:]
    assert int(done.stdout.split("TENSORS THAT LEARNED")[1].split()[0]) >= len(ours)
    assert command != "preprocess_like_nnssl" or "WHOLE True" in done.stdout
