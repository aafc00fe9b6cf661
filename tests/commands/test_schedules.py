"""Schedules of fine-tuning as a command: planned from the weights, refused where they cannot work, resumed alike."""

import json
import subprocess
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
from mim3d.weights import load_encoder, save_network
from tests.commands.conftest import BACKBONE, TASK
from tests.commands.one_and_two import trained_by_one_and_two

SETTINGS = {
    "task": TASK,
    "backbone": BACKBONE,
    "num_folds": 3,
    "max_steps": 20,
    "num_workers": 0,
    "batch_size": 1,
    "pictures_every": None,
    "memory_limit": 0,
    "log_every": 1,
}
ZSCORE = {"kind": "zscore", "window": None}


def tune(data: Path, out: Path, **changes: object) -> Path:
    return Path(finetune(str(data), str(out), **{**SETTINGS, **changes}))


def settings_of(run: Path) -> dict:
    return json.loads((run / "manifest.json").read_text())["settings"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An encoder export such as pre-training leaves."""
    folder = tmp_path_factory.mktemp("weights") / "pre"
    folder.mkdir()
    torch.manual_seed(1)
    recipe = create_recipe(BACKBONE)
    card = {"backbone": to_named(recipe, BACKBONES), "spacing_mm": None, "intensity": ZSCORE}
    save_network(folder / "encoder", recipe.build(), card)
    return str(folder)


@pytest.fixture(scope="module")
def sawtooth_run(ball_set: Path, encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with weights and no word on its schedule, with all of its checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "sawtooth"
    return tune(ball_set, out, weights=encoder, checkpoint_every=1, keep_checkpoints=20, fold=None)


def test_sawtooth_is_planned_with_weights_and_freezes_the_encoder_for_a_tenth_of_the_steps(
    sawtooth_run: Path, encoder: str
) -> None:
    assert settings_of(sawtooth_run)["schedule"] == read_run(sawtooth_run).config["schedule"] == "sawtooth"
    derived = json.loads((sawtooth_run / "manifest.json").read_text())["derived"]
    assert (derived["frozen_steps"], derived["warmup_steps"]) == (2, 2)
    first = load_encoder(encoder).state_dict()
    states = {
        step: torch.load(sawtooth_run / "checkpoints" / f"step_{step:08d}.pt", weights_only=True)["objective"]
        for step in (1, 2, 3)
    }
    unchanged = {
        step: all(torch.equal(value, state[f"encoder.{name}"]) for name, value in first.items())
        for step, state in states.items()
    }
    assert unchanged == {1: True, 2: True, 3: False}
    decoder = [name for name in states[1] if name.startswith("decoder.")]
    assert not any(torch.equal(states[1][name], states[2][name]) for name in decoder)


def test_from_scratch_everything_learns_from_the_first_step_as_before(ball_set: Path, tmp_path: Path) -> None:
    run = tune(ball_set, tmp_path / "run", max_steps=2)
    assert settings_of(run)["schedule"] == "default"
    derived = json.loads((run / "manifest.json").read_text())["derived"]
    assert "frozen_steps" not in derived


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_run_that_stops_in_any_stage_ends_with_the_same_bits(
    ball_set: Path, encoder: str, sawtooth_run: Path, tmp_path: Path, stop: int
) -> None:
    part = tmp_path / "part"
    subprocess.run(["cp", "-r", str(sawtooth_run), str(part)], check=True)
    for file in part.glob("checkpoints/*.pt"):
        if int(file.stem[-8:]) > stop:
            file.unlink()
    tune(ball_set, part, weights=encoder, checkpoint_every=1, keep_checkpoints=20, fold=None, resume=True)
    exported = [load_trained(run).module.state_dict() for run in (sawtooth_run, part)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


def test_a_run_from_before_there_were_schedules_goes_on_without_one(
    ball_set: Path, encoder: str, tmp_path: Path
) -> None:
    run = tune(ball_set, tmp_path / "run", weights=encoder, schedule="default", max_steps=4, checkpoint_every=2)
    weights = load_trained(run).module.state_dict()
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["settings"]["schedule"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    config = (run / "config.yaml").read_text().replace("schedule: default\n", "")
    (run / "config.yaml").write_text(config)
    for name in ("step_00000004.pt", "best_00000003.pt", "best_00000004.pt"):
        (run / "checkpoints" / name).unlink(missing_ok=True)
    assert main(["finetune", "--out", str(run), "--resume", "true"]) == 0
    assert all(torch.equal(value, weights[name]) for name, value in load_trained(run).module.state_dict().items())


def test_frozen_is_freeze_encoder_and_freeze_encoder_is_frozen(ball_set: Path, encoder: str, tmp_path: Path) -> None:
    one = tune(ball_set, tmp_path / "one", weights=encoder, schedule="frozen", max_steps=2)
    other = tune(ball_set, tmp_path / "other", weights=encoder, task={**TASK, "freeze_encoder": True}, max_steps=2)
    assert settings_of(one)["schedule"] == settings_of(other)["schedule"] == "frozen"
    assert settings_of(one)["task"] == settings_of(other)["task"]
    exported = [load_trained(run).module.state_dict() for run in (one, other)]
    assert all(torch.equal(value, exported[1][name]) for name, value in exported[0].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"schedule": "sawtooth"},
            "schedule is sawtooth, which spares a pre-trained encoder, but there are no weights",
        ),
        ({"schedule": "warmup"}, "schedule is warmup, .* no weights"),
        ({"schedule": "frozen"}, "schedule is frozen, .* no weights"),
        ({"schedule": "frozn"}, "schedule is 'frozn'"),
        (
            {"schedule": "default", "weights": True, "task": {**TASK, "freeze_encoder": True}},
            "schedule is default, but freeze_encoder keeps the encoder from learning",
        ),
        (
            {"schedule": "sawtooth", "weights": True, "task": {**TASK, "unfreeze_ratio": 0.5}},
            "schedule is sawtooth and unfreeze_ratio is 0.5",
        ),
        (
            {"schedule": "frozen", "weights": True, "task": {**TASK, "unfreeze_ratio": 0.5}},
            "schedule is frozen and unfreeze_ratio is 0.5",
        ),
    ],
)
@pytest.mark.parametrize("fold", [0, "all"])
def test_what_cannot_work_is_refused_before_anything_is_written(
    ball_set: Path, encoder: str, tmp_path: Path, changes: dict[str, object], words: str, fold: object
) -> None:
    given = {**changes, "fold": fold, **({"weights": encoder} if "weights" in changes else {})}
    with pytest.raises(ConfigError, match=words):
        tune(ball_set, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_staged_unfreezing_with_weights_is_a_schedule_of_its_own(ball_set: Path, encoder: str, tmp_path: Path) -> None:
    run = tune(ball_set, tmp_path / "run", weights=encoder, task={**TASK, "unfreeze_ratio": 0.5}, max_steps=2)
    assert settings_of(run)["schedule"] == "default"


def test_the_schedule_is_said_in_one_line(
    ball_set: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(ball_set, tmp_path / "run", weights=encoder, max_steps=10)
    told = capsys.readouterr()
    lines = [line for line in (told.out + told.err).splitlines() if line.startswith("schedule")]
    assert lines == [
        "schedule: sawtooth (what is built on the encoder learns alone at first, then everything warms up and learns)"
    ]
    assert "after 1 step with the encoder frozen and 1 step of warm-up" in told.out + told.err


def test_a_longer_warm_up_gives_way_to_one_that_is_asked_for(ball_set: Path, encoder: str, tmp_path: Path) -> None:
    for name, optim, expected in (("schedule", Optimisation(), 1), ("asked", Optimisation(warmup_steps=5), 5)):
        run = tune(ball_set, tmp_path / name, weights=encoder, schedule="warmup", fold=None, max_steps=10, optim=optim)
        assert json.loads((run / "manifest.json").read_text())["derived"]["warmup_steps"] == expected


@pytest.mark.slow
def test_two_processes_follow_the_schedule_as_one_with_both_batches(
    ball_set: Path, encoder: str, tmp_path: Path
) -> None:
    task = "--task.patch_size 16 16 16 --task.feature_dim 8 --task.batch_dice false --schedule sawtooth"
    limits = "--max_steps 20 --num_folds 3 --num_workers 0 --log_every 1 --accelerator cpu --memory_limit 0"
    shared = f"{task} {limits} --weights {encoder}".split()
    losses, (one, two) = trained_by_one_and_two([*shared, "--data", str(ball_set)], tmp_path, last_step=20)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    steps = [[float(moments["step"]) for moments in run["optimizer"]["state"].values()] for run in (one, two)]
    assert steps[0] == steps[1] and (min(steps[0]), max(steps[0])) == (18, 20)
