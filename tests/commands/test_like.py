"""Fine-tuning like another run: its recipe whole, so that two runs differ in their weights alone."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.cli import main
from mim3d.commands.finetune import finetune
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import recipe_differences, recipe_of
from mim3d.core.settings import to_named
from mim3d.training.schedule import Optimisation
from mim3d.weights import read_card, save_network
from tests.commands.conftest import BACKBONE, TASK
from tests.labelled import write_ball_set

OWN_WINDOW = {"kind": "window", "window": [0.0, 900.0]}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder that learned at voxels and intensities of its own."""
    folder = tmp_path_factory.mktemp("weights") / "pre"
    folder.mkdir()
    recipe = create_recipe(BACKBONE)
    card = {"backbone": to_named(recipe, BACKBONES), "spacing_mm": [1.5, 1.5, 1.5], "intensity": OWN_WINDOW}
    save_network(folder / "encoder", recipe.build(), card)
    return str(folder)


@pytest.fixture(scope="module")
def pretrained(ball_set: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from weights, whose voxel size and intensities are those of the encoder."""
    out = tmp_path_factory.mktemp("runs") / "pretrained"
    finetune(
        str(ball_set),
        str(out),
        task={**TASK, "positive_ratio": 0.7},
        weights=encoder,
        num_folds=3,
        fold=1,
        split_seed=2,
        max_steps=4,
        batch_size=2,
        seed=3,
        accumulation=2,
        optim=Optimisation(learning_rate=2e-3),
        num_workers=0,
        memory_limit=0,
    )
    return out


def manifest_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())


def test_a_scratch_run_like_one_with_weights_differs_in_the_weights_alone(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch = tmp_path / "scratch"
    assert main(["finetune", "--out", str(scratch), "--like", str(pretrained), "--memory_limit", "0"]) == 0
    told = capsys.readouterr().out.splitlines()
    one, other = manifest_of(pretrained), manifest_of(scratch)
    assert recipe_differences(one, other) == {}
    assert other["settings"]["weights"] is None
    assert (other["settings"]["spacing_mm"], other["settings"]["seed"]) == ([1.5, 1.5, 1.5], 3)
    assert (other["settings"]["schedule"], one["settings"]["schedule"]) == ("default", "sawtooth")
    assert f"recipe: that of {pretrained}, but for schedule default (there sawtooth)" in told
    assert other["inputs"]["data"] == one["inputs"]["data"]
    cards = [read_card(run, ("segmenter",)) for run in (pretrained, scratch)]
    assert cards[0]["intensity"] == cards[1]["intensity"] == OWN_WINDOW
    assert cards[0]["backbone"] == cards[1]["backbone"]
    assert (pretrained / "split.json").read_text() == (scratch / "split.json").read_text()


def test_flags_on_top_win_and_are_said(pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--like", str(pretrained), "--max_steps", "2", "--task.positive_ratio", "0.2", "--memory_limit", "0"]
    words += ["--optim.base_learning_rate", "1e-3", "--optim.reference_batch", "4"]
    assert main(["finetune", "--out", str(tmp_path / "run"), *words]) == 0
    told = capsys.readouterr().out
    for said in ("max_steps 2 (there 4)", "task.positive_ratio 0.2 (there 0.7)"):
        assert said in told
    settings = manifest_of(tmp_path / "run")["settings"]
    assert settings["task"]["patch_size"] == [16, 16, 16] and settings["task"]["positive_ratio"] == 0.2
    assert settings["optim"]["learning_rate"] is None and settings["optim"]["base_learning_rate"] == 1e-3
    differences = recipe_differences(manifest_of(pretrained), manifest_of(tmp_path / "run"))
    assert {"max_steps", "task.positive_ratio", "optim.learning_rate"} <= differences.keys()


def test_a_run_with_weights_like_a_scratch_run_keeps_its_voxels_intensities_and_schedule(
    ball_set: Path, encoder: str, tmp_path: Path
) -> None:
    shared = {"num_workers": 0, "memory_limit": 0}
    scratch = tmp_path / "scratch"
    finetune(
        str(ball_set), str(scratch), task=TASK, backbone=BACKBONE, num_folds=3, max_steps=2, batch_size=1, **shared
    )
    with pytest.warns(UserWarning, match="the encoder learned at spacing_mm 1.5 1.5 1.5, but"):
        finetune(str(ball_set), str(tmp_path / "run"), like=str(scratch), weights=encoder, **shared)
    one, other = manifest_of(scratch), manifest_of(tmp_path / "run")
    assert [row["kind"] for row in other["warnings"]].count("unlike weights") == 2  # voxel size and intensities
    assert recipe_differences(one, other) == {}
    assert one["settings"]["spacing_mm"] == other["settings"]["spacing_mm"]
    assert one["settings"]["schedule"] == other["settings"]["schedule"] == "default"
    assert one["derived"]["intensity"] == other["derived"]["intensity"]


def test_it_goes_on_when_the_other_run_is_gone(pretrained: Path, tmp_path: Path) -> None:
    other, run = tmp_path / "other", tmp_path / "run"
    shutil.copytree(pretrained, other)
    words = ["finetune", "--out", str(run), "--memory_limit", "0"]
    assert main([*words, "--like", str(other), "--max_steps", "2", "--checkpoint_every", "1"]) == 0
    shutil.rmtree(other)
    weights = torch.load(run / "checkpoints" / "step_00000002.pt", weights_only=True)["objective"]
    (run / "checkpoints" / "step_00000002.pt").unlink()
    assert main([*words, "--resume", "true"]) == 0
    again = torch.load(run / "checkpoints" / "step_00000002.pt", weights_only=True)["objective"]
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_another_data_set_is_refused_by_ids_and_by_content(pretrained: Path, ball_set: Path, tmp_path: Path) -> None:
    other = write_ball_set(tmp_path / "other", num_cases=3)
    with pytest.raises(DataError, match="learned from another data set than"):
        finetune(str(other), str(tmp_path / "run"), like=str(pretrained), memory_limit=0)
    assert not (tmp_path / "run").exists()
    changed = tmp_path / "changed"
    shutil.copytree(ball_set, changed)
    scan = next((changed / "imagesTr").iterdir())
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine), scan)
    with pytest.raises(DataError, match="learned from other scans or labels than"):
        finetune(str(changed), str(tmp_path / "run"), like=str(pretrained), memory_limit=0)


def test_what_is_no_finished_plan_of_fine_tuning_is_refused_in_one_sentence(
    pretrained: Path, ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, pretraining, broken = tmp_path / "begun", tmp_path / "pretraining", tmp_path / "broken"
    later = tmp_path / "later"
    settings = {**manifest_of(pretrained)["settings"], "inventd": 1}
    made = [(begun, {"inputs": {}}), (pretraining, {"command": "pretrain"}), (broken, {"inputs": 1})]
    for folder, changes in (*made, (later, {"settings": settings})):
        folder.mkdir()
        shutil.copy(pretrained / "split.json", folder)
        (folder / "manifest.json").write_text(json.dumps({**manifest_of(pretrained), **changes}))
    for like, words in (
        (begun, "stopped before its plan was finished; go on with it first"),
        (pretraining, "a run of mim3d pretrain; give the --out of a mim3d finetune; its encoder goes with --weights"),
        (broken, "is no manifest of a run"),
        (later, "inventd"),
        (ball_set, "which is no run of fine-tuning; give the --out of a mim3d finetune"),
        (tmp_path / "absent", "which is no run of fine-tuning"),
    ):
        assert main(["finetune", "--out", str(tmp_path / "run"), "--like", str(like)]) != 0
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said
        with pytest.raises(ConfigError, match=words):
            finetune(str(ball_set), str(tmp_path / "run"), like=str(like))
    assert not (tmp_path / "run").exists()


def test_a_recipe_has_the_samples_of_a_step_however_many_devices_shared_them(pretrained: Path) -> None:
    manifest = manifest_of(pretrained)
    settings = {**manifest["settings"], "devices": 2, "accumulation": 1}
    assert recipe_of({**manifest, "settings": settings})["accumulation"] == 2
    assert recipe_differences(manifest, {**manifest, "settings": settings}) == {}
