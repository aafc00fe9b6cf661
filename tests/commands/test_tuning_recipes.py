"""Recipes of fine-tuning as a command: each by its flag, and what cannot work refused."""

import json
from pathlib import Path

import pytest
import torch

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.cli import main
from mim3d.commands.finetune import finetune
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import to_named
from mim3d.tasks.trained import load_trained
from mim3d.training.schedule import Optimisation
from mim3d.weights import load_encoder, read_card, save_network
from tests.commands.conftest import BACKBONE, TASK
from tests.commands.one_and_two import trained_by_one_and_two

SETTINGS = {
    "task": TASK,
    "backbone": BACKBONE,
    "num_folds": 3,
    "max_steps": 2,
    "num_workers": 0,
    "batch_size": 2,
    "pictures_every": None,
    "memory_limit": 0,
}


def tune(data: Path, out: Path, **changes: object) -> Path:
    return Path(finetune(str(data), str(out), **{**SETTINGS, **changes}))


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """An encoder export such as pre-training leaves."""
    torch.manual_seed(1)
    recipe = create_recipe(BACKBONE)
    intensity = {"kind": "zscore", "window": None}
    card = {"backbone": to_named(recipe, BACKBONES), "spacing_mm": None, "intensity": intensity}
    (tmp_path / "pre").mkdir()
    save_network(tmp_path / "pre" / "encoder", recipe.build(), card)
    return str(tmp_path / "pre")


def test_settings_without_a_name_change_the_backbone_of_the_weights(
    ball_set: Path, encoder: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    task = [word for key, value in TASK.items() if key != "name" for word in (f"--task.{key}", str(value))]
    words = ["finetune", "--data", str(ball_set), "--out", str(run), "--weights", encoder, *task]
    words += ["--backbone.drop_path", "0.3", "--num_folds", "3", "--max_steps", "2", "--batch_size", "2"]
    assert main([*words, "--num_workers", "0"]) == 0
    record = read_run(run)
    assert record.config["backbone"]["drop_path"] == 0.3
    assert record.config["backbone"]["widths"] == [8, 16]
    assert read_card(run, ("segmenter",))["backbone"]["drop_path"] == 0.3
    assert load_encoder(run).recipe.drop_path == 0.3
    assert not load_trained(run).module.encoder.training


def test_a_setting_that_the_weights_backbone_lacks_is_refused(ball_set: Path, encoder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone of the weights has no setting 'drop_pat'.*'drop_path'"):
        tune(ball_set, tmp_path / "run", weights=encoder, backbone={"drop_pat": 0.3})
    with pytest.raises(ConfigError, match="drop_path is 2"):
        tune(ball_set, tmp_path / "run", weights=encoder, backbone={"drop_path": 2})


def test_every_recipe_together_trains_stops_and_resumes_to_the_same_losses(
    ball_set: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        "weights": encoder,
        "backbone": {"drop_path": 0.3},
        "task": {**TASK, "unfreeze_ratio": 0.6},
        "optim": Optimisation(layer_decay=0.5, ema_decay=0.9, warmup_steps=3),
        "max_steps": 8,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    whole = tune(ball_set, tmp_path / "whole", **changes, verbose=True)
    told = capsys.readouterr()
    for line in (
        "until all learn after 60% of training",
        "layers learn at 0.125 (lowest) to 1 (highest) times the learning rate",
        "weights averaged over about 10 steps",
        "warm-up 3 steps",
    ):
        assert line in told.out + told.err
    parts = tune(ball_set, tmp_path / "parts", **changes)
    (parts / "checkpoints" / "step_00000008.pt").unlink()
    for line in ("best_00000005.pt", "best_00000006.pt", "best_00000007.pt", "best_00000008.pt"):
        (parts / "checkpoints" / line).unlink(missing_ok=True)
    tune(ball_set, parts, **changes, resume=True)
    losses = [[line["loss"] for line in read_run(run).metrics if "loss" in line] for run in (whole, parts)]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    exported = [load_trained(run).module.state_dict() for run in (whole, parts)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def test_what_is_exported_without_validation_is_the_average(ball_set: Path, tmp_path: Path) -> None:
    run = tune(ball_set, tmp_path / "run", fold=None, optim=Optimisation(ema_decay=0.9))
    saved = torch.load(run / "checkpoints" / "step_00000002.pt", weights_only=True)
    exported = load_trained(run).module.state_dict()
    assert all(torch.equal(exported[name], value) for name, value in saved["average"].items())
    assert not all(torch.equal(exported[name], value) for name, value in saved["objective"].items())


def test_patience_ends_a_run_which_then_counts_as_finished(
    ball_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"max_steps": 30, "validate_every": 1, "optim": Optimisation(learning_rate=0.0), "patience": 3}
    run = tune(ball_set, tmp_path / "run", **changes)
    assert max(line["step"] for line in read_run(run).metrics) == 4
    told = capsys.readouterr()
    assert "no better dice in 3 validations, after step 4" in told.err
    assert "go on with" not in told.out
    assert json.loads((run / "segmenter" / "card.json").read_text())["step"] == 1
    tune(ball_set, run, **changes, resume=True)
    assert max(line["step"] for line in read_run(run).metrics) == 4
    tune(ball_set, run, **{**changes, "patience": 5}, resume=True)
    assert max(line["step"] for line in read_run(run).metrics) == 6


def test_patience_without_held_out_cases_is_refused_before_anything_is_written(ball_set: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="patience is 2, but no case is held out"):
        tune(ball_set, tmp_path / "run", fold=None, patience=2)
    assert not (tmp_path / "run").exists()


def test_patience_that_outlasts_the_run_is_said(ball_set: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="patience 2 never ends this run, which validates 2 times"):
        tune(ball_set, tmp_path / "run", patience=2)


def test_unfreezing_an_encoder_without_weights_is_said(ball_set: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="unfreeze_ratio keeps an encoder as it was drawn at random"):
        tune(ball_set, tmp_path / "run", task={**TASK, "unfreeze_ratio": 0.5})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 2, "max_epochs": 2, "patience": 1}, "max_steps .2. and max_epochs .2. are both set"),
        ({"patience": -1}, "patience is -1; it must be at least 1"),
        ({"max_time": "soon", "patience": 1}, "Duration 'soon'"),
    ],
)
def test_limits_that_cannot_work_together_are_refused(
    ball_set: Path, tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        tune(ball_set, tmp_path / "run", **changes)


@pytest.mark.slow
def test_two_processes_follow_every_recipe_as_one_with_both_batches(ball_set: Path, tmp_path: Path) -> None:
    task = "--task.patch_size 16 16 16 --task.feature_dim 8 --task.batch_dice false --task.unfreeze_ratio 0.6"
    recipes = "--optim.layer_decay 0.5 --optim.ema_decay 0.9 --optim.warmup_steps 2 --patience 9"
    backbone = "--backbone hybrid --backbone.widths 8 16 --backbone.depths 1 1 --backbone.num_heads 2"
    limits = "--max_steps 6 --num_folds 3 --num_workers 0 --log_every 1 --accelerator cpu --memory_limit 0"
    shared = f"{task} {recipes} {backbone} {limits} --precision 32-true".split()
    losses, (one, two) = trained_by_one_and_two([*shared, "--data", str(ball_set)], tmp_path, last_step=6)
    assert one["average"].keys() == two["average"].keys()
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    steps = [[float(moments["step"]) for moments in run["optimizer"]["state"].values()] for run in (one, two)]
    # The stem began last.
    assert steps[0] == steps[1] and min(steps[0]) < max(steps[0]) == 6
    exported = [load_trained(tmp_path / name).module.state_dict() for name in ("one", "two")]
    assert all(torch.isfinite(value).all() for weights in exported for value in weights.values())
