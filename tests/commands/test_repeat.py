"""A run's ``config.yaml`` repeats it: the command in a process of its own gives the same numbers to the bit."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

import mim3d
from mim3d.cli import main
from mim3d.core.run_folder import read_run
from tests.commands.conftest import BACKBONE, TASK
from tests.commands.test_pretrain import METHOD
from tests.training.toy_training import comparable

SHARED = {"backbone": BACKBONE, "num_workers": 0, "log_every": 1, "optim": {"learning_rate": 1e-3}, "pictures_every": 2}
PRETRAIN = {**SHARED, "method": METHOD, "max_steps": 4, "batch_size": 2}
FINETUNE = {**SHARED, "task": TASK, "max_steps": 3, "num_folds": 3, "validate_every": 2, "split_seed": 1}


@contextmanager
def one_thread() -> Iterator[None]:
    """As many threads as the other process has, since sums depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_a_new_process(*words: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "mim3d", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def weights(folder: Path) -> dict[str, Any]:
    """Shape, type and bytes of every tensor."""
    found = {}
    (file,) = folder.glob("*.safetensors")
    with safe_open(file, framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            array = tensors.get_tensor(name)
            found[name] = (array.shape, str(array.dtype), array.tobytes())
    return found


@pytest.mark.parametrize(
    ("command", "settings", "network"), [("pretrain", PRETRAIN, "encoder"), ("finetune", FINETUNE, "segmenter")]
)
def test_the_config_of_a_run_repeats_it_to_the_bit(ball_set, tmp_path, command, settings, network):
    asked, first, again = tmp_path / "asked.yaml", tmp_path / "first", tmp_path / "again"
    asked.write_text(yaml.safe_dump({**settings, "data": str(ball_set)}))
    with one_thread():
        assert main([command, "--config", str(asked), "--out", str(first), "--tracking.tensorboard", "true"]) == 0
    # A tracker changes nothing.
    off = ("--tracking.tensorboard", "false")
    in_a_new_process(command, "--config", str(first / "config.yaml"), "--out", str(again), *off)
    assert [bool(list(run.glob("tensorboard/events.*"))) for run in (first, again)] == [True, False]
    one, other = read_run(first), read_run(again)
    assert len(one.metrics) >= settings["max_steps"]
    assert comparable(one.metrics) == comparable(other.metrics)
    assert weights(first / network) == weights(again / network)
    assert list(one.pictures) == list(other.pictures)
    assert [path.read_bytes() for path in one.pictures.values()] == [
        path.read_bytes() for path in other.pictures.values()
    ]
    for name in ("inputs", "seeds", "code", "versions", "hardware"):
        assert one.manifest[name] == other.manifest[name]
    check_manifest(other.manifest, command, settings)


def check_manifest(manifest: dict[str, Any], command: str, settings: dict[str, Any]) -> None:
    """Everything that a reader needs to do it again."""
    words = shlex.split(manifest["command_line"])
    assert words[:3] == ["mim3d", command, "--config"]
    assert "--out" in words
    assert manifest["seeds"] == {"seed": 0, "split_seed": settings.get("split_seed", 0)} | (
        {"train_seed": 0} if command == "finetune" else {}
    )
    assert manifest["code"]["mim3d"] == mim3d.__version__
    assert {"python", "torch", "monai", "numpy", "lightning-fabric", "safetensors"} <= manifest["versions"].keys()
    hardware = manifest["hardware"]
    assert hardware["cpu"]
    assert hardware["num_threads"] == 1
    assert hardware["memory_bytes"] > 2**28
    assert re.fullmatch(r"[0-9a-f]{8,}", manifest["inputs"]["data"])
    derived = manifest["derived"]
    assert derived["samples"] == settings["max_steps"] * derived["effective_batch"]
    assert derived["voxels_per_step"] > 0
    hidden, visible = derived["tokens_per_step"]["hidden"], derived["tokens_per_step"]["visible"]
    assert visible > 0
    assert (hidden > 0) == (command == "pretrain")
    told = "\n".join(derived["derivations"])
    for what in (
        "effective batch",
        "learning rate",
        "steps per epoch",
        "samples seen",
        "tokens per step",
        "voxels read",
    ):
        assert what in told
    assert json.dumps(manifest)
