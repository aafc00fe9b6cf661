"""Runs that do not fit into memory: refused before anything begins, with settings that fit."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mim3d.backbones import Hybrid, create_recipe
from mim3d.cli import COMMANDS, main
from mim3d.cli.arguments import command_arguments, split_line
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import write_yaml
from mim3d.loading.loader import Loader
from mim3d.methods import create_method
from mim3d.methods.mim.method import MiM
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.scans.intensity import Intensity
from mim3d.training import memory as engine_memory
from mim3d.training.schedule import Optimisation
from mim3d.workflows.shared import memory
from mim3d.workflows.shared.memory import (
    finetuning_variants,
    pretraining_sample,
    pretraining_variants,
    require_memory,
)
from mim3d.workflows.shared.training import TrainingSettings
from tests.commands.conftest import BACKBONE, DECODER, TASK

LEVELS = [
    {"name": "coarse", "footprint": [16, 16, 16], "size": [16, 16, 16], "mask_ratio": 0.5, "num_children": 2},
    {"name": "middle", "footprint": [8, 8, 8], "size": [16, 16, 16], "mask_ratio": 0.5},
]
#: Less a network than its activations: a decoder of full size would outweigh them.
PRETRAIN = {
    "command": "pretrain",
    "method": {"name": "MiM", "levels": LEVELS, **DECODER},
    "backbone": BACKBONE,
}
FINETUNE = {"command": "finetune", "task": TASK, "backbone": BACKBONE, "num_folds": 3}


@pytest.fixture
def tensors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The need of the tensors alone: beside the program, that of small networks would not show."""
    monkeypatch.setattr(engine_memory, "resident_memory_bytes", lambda: 0)
    monkeypatch.setattr(engine_memory, "SCRATCH_BYTES", {"cpu": 0})


class Words:
    """A command line on a data set, with settings of a file."""

    def __init__(self, folder: Path, data: Path, settings: dict) -> None:
        self.folder = folder
        write_yaml(folder / "settings.yaml", {"max_steps": 1, "num_workers": 0, "log_every": 1, **settings})
        optim = ["--optim.learning_rate", "1e-3"]
        self.words = [settings["command"], "--config", str(folder / "settings.yaml"), "--data", str(data), *optim]

    def run(self, name: str, *more: str) -> int:
        return main([*self.words, "--out", str(self.folder / name), *more])

    def derived(self, name: str) -> dict:
        return json.loads((self.folder / name / "manifest.json").read_text())["derived"]


def offered(said: str) -> list[str]:
    match = re.search(r"; use (--.*), which needs about", said)
    return shlex.split(match[1]) if match else []


@pytest.mark.parametrize("settings", [PRETRAIN, FINETUNE], ids=["pretrain", "finetune"])
def test_what_does_not_fit_is_refused_with_flags_that_fit_and_train(
    ball_set, tmp_path, capsys, tensors_alone, settings
):
    words = Words(tmp_path, ball_set, {**settings, "batch_size": 4, "accumulation": 3})
    assert words.run("whole", "--verbose", "true") == 0
    assert re.search(r"memory: about \d+ MiB \(.*activations \d+ MiB.*\), .* available", capsys.readouterr().out)
    need = sum(words.derived("whole")["memory_need_bytes"].values()) / 2**30
    seen = []
    for share in (0.7, 0.5):
        limit = ["--memory_limit", str(share * need)]
        name = f"share_{share}"
        assert words.run(name, *limit) == 2
        said = capsys.readouterr().err
        assert "are allowed by memory_limit" in said
        assert not (tmp_path / name / "metrics.jsonl").exists() or not read_run(tmp_path / name).metrics
        flags = offered(said)
        if flags:
            assert words.run(name, *limit, *flags) == 0
            assert words.derived(name)["effective_batch"] == 12
            assert sum(words.derived(name)["memory_need_bytes"].values()) <= share * need * 2**30
            seen.append(flags)
    assert any("--batch_size" in flags for flags in seen)


def test_pre_training_is_refused_before_a_run_folder_or_a_cache_is_made(ball_set, tmp_path, capsys):
    assert Words(tmp_path, ball_set, PRETRAIN).run("run", "--memory_limit", "0.001") == 2
    said = capsys.readouterr().err
    assert re.search(
        r"needs about .*even --backbone.recompute true .*needs about .*a smaller backbone or smaller", said
    )
    assert not (tmp_path / "run").exists()


def test_without_a_check_nothing_is_said_and_what_is_learned_is_the_same(ball_set, tmp_path, capsys):
    words = Words(tmp_path, ball_set, PRETRAIN)
    assert words.run("unchecked", "--memory_limit", "0") == 0
    assert "memory:" not in capsys.readouterr().out
    assert words.run("checked") == 0
    losses = [read_run(tmp_path / name).metrics[0]["loss"] for name in ("unchecked", "checked")]
    assert losses[0] == losses[1]
    assert words.derived("checked")["peak_memory_bytes"] > 0
    # The limit may be another one when a run goes on; that settings stay is said.
    assert words.run("checked", "--memory_limit", "50", "--resume", "true") == 0
    assert words.run("checked", "--memory_limit", "0.001", "--resume", "true") == 2


def test_a_limit_below_nothing_is_refused(ball_set, tmp_path, capsys):
    assert Words(tmp_path, ball_set, PRETRAIN).run("run", "--memory_limit", "-1") == 2
    assert "memory_limit is -1.0 GiB" in capsys.readouterr().err


class Curious(Objective):
    """Looks at a value in its step, as a user's own method may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        loss = self.layer(batch["x"]).square().mean()
        return StepOutput(loss if loss.detach().item() > 0 else 2 * loss)


class Plain(Curious):
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        return StepOutput(self.layer(batch["x"]).square().mean())


def training(**settings: object) -> TrainingSettings:
    known = {"max_steps": 1, "max_epochs": None, "max_time": None, "batch_size": 1, "accumulation": 1, "seed": 0}
    known |= {"precision": "32-true", "devices": 1, "num_nodes": 1, "accelerator": "cpu", "num_workers": 0}
    return TrainingSettings(**{**known, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1, **settings})


SAMPLE = {"x": ((3, 4), torch.float32)}
OPTIM = Optimisation(learning_rate=1e-3)


def test_a_method_that_looks_at_values_trains_all_the_same(capsys):
    assert require_memory(training(), {"": Curious}, SAMPLE, OPTIM, smaller="") == {}
    assert "memory: not known beforehand (DataDependentOutputException" in capsys.readouterr().out


def test_unknown_memory_refuses_nothing(capsys, monkeypatch):
    monkeypatch.setattr(memory, "usable_bytes", lambda loop, limit: None)
    assert require_memory(training(), {"": Plain}, SAMPLE, OPTIM, smaller="")["memory_need_bytes"]
    assert "available" not in capsys.readouterr().out


def test_a_validation_that_does_not_fit_is_refused_before_training():
    with pytest.raises(ConfigError, match=r"Validating needs about .* besides the network, .* \(--fold null\)"):
        require_memory(training(), {"": Plain}, SAMPLE, OPTIM, smaller="", validation_bytes=2**50)


def test_the_need_is_that_of_every_process_on_a_cpu(capsys):
    with pytest.raises(ConfigError, match=r"in each of 2 processes of memory, but 1 MiB are allowed"):
        require_memory(training(devices=2, memory_limit=2**-9), {"": Plain}, SAMPLE, OPTIM, smaller="")
    assert "in each of 2 processes" in capsys.readouterr().out


def test_variants_that_are_taken_already_are_not_offered():
    method, recipe = MiM(), create_recipe("hybrid_nano")
    flags = list(pretraining_variants(method, recipe))
    both = "--backbone.recompute true --method.chunk_size 1"
    assert flags == ["", "--backbone.recompute true", both]
    sparing = replace(recipe, recompute=True)
    assert list(pretraining_variants(method, sparing)) == ["", "--method.chunk_size 1"]
    assert list(pretraining_variants(replace(method, chunk_size=1), sparing)) == [""]
    assert list(finetuning_variants(lambda recipe: Plain(), sparing)) == [""]


@pytest.mark.parametrize(
    "recipe",
    [
        create_recipe("hybrid_base"),
        create_recipe({"name": "hybrid_nano", "in_channels": 2}),
        Hybrid(widths=(32, 96), depths=(2, 6), num_heads=4, mlp_ratio=2.5),
    ],
    ids=["ready", "changed", "own"],
)
def test_offered_flags_of_fine_tuning_name_the_same_backbone(recipe):
    words = shlex.split(list(finetuning_variants(lambda recipe: Plain(), recipe))[1])
    signature = COMMANDS["finetune"].signature("finetune")
    arguments = command_arguments(split_line([*words, "--data", "x", "--out", "y"], signature), signature)
    assert create_recipe(arguments["backbone"]) == replace(recipe, recompute=True)


def test_a_sample_has_the_shapes_that_were_foreseen_from_headers(ball_set, tmp_path):
    from mim3d.caching.build import build_cache
    from mim3d.caching.preprocessing import Preprocessing
    from mim3d.datasets.cases import read_cases

    scans = build_cache(read_cases(ball_set), tmp_path / "cache", Preprocessing(), num_workers=1)
    recipe = create_recipe(PRETRAIN["backbone"])
    method = create_method(PRETRAIN["method"]).planned(recipe, [scans[0].shape])
    loader = Loader(scans, method.sampler(recipe), Intensity(kind="zscore", window=None), batch_size=1, seed=0)
    read = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in loader.dataset[0].items()}
    assert pretraining_sample(method, recipe, scans[0].shape) == read
