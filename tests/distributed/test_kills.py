"""A run that is killed again and again ends as one that nothing happened to, bit for bit."""

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.core.run_folder import read_run
from mim3d.core.settings import write_yaml
from mim3d.training.checkpoint import read_checkpoint
from tests.commands.conftest import BACKBONE
from tests.commands.test_pretrain import METHOD as WIDE_METHOD
from tests.training import toy_training
from tests.training.toy_training import comparable, toy_run

METHOD = {**WIDE_METHOD, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "alignment_dim": 16}


def newest_step(out: Path) -> int:
    """Step of the newest checkpoint; 0 without one."""
    return max((int(path.stem[-8:]) for path in out.glob("checkpoints/step_*.pt")), default=0)


class Killer:
    """Starts a command over and over, and kills it.

    Args:
        command: that makes a run or goes on with it.
        out: the run's folder.
        seed: of the moments.
    """

    def __init__(self, command: Sequence[str], out: Path, seed: int) -> None:
        self._command = command
        self._out = out
        self._random = random.Random(seed)
        self.num_kills = 0

    def kill_after_step(self, step: int) -> None:
        """At a random moment soon after the checkpoint of a step, which may be in the middle of the next one."""
        self._kill(lambda: newest_step(self._out) >= step, self._random.uniform(0, 0.3))

    def kill_within(self, seconds: float) -> None:
        """At a random moment after the start."""
        self._kill(lambda: True, self._random.uniform(0, seconds))

    def finish(self) -> None:
        """Let it end by itself."""
        done = subprocess.run(self._command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr

    def _kill(self, condition: Any, delay_s: float) -> None:
        process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not condition():
                # Not refused, and not finished either.
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.002)
            time.sleep(delay_s)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == -9
        self.num_kills += 1


def test_killed_twice_and_resumed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 40, "log_every": 3, "checkpoint_every": 4, "validate_every": 6}
    _, whole, reference = toy_run(tmp_path / "whole", **settings)
    out = tmp_path / "run"
    script = [sys.executable, toy_training.__file__, str(out), json.dumps({**settings, "wait_s": 0.04})]
    killer = Killer(script, out, seed=0)
    for step in (4, 20):
        killer.kill_after_step(step)
    result, objective, run = toy_run(out, **settings)
    assert result.finished
    assert 0 < len(objective.seen) < 4 * 24
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)
    weights = objective.state_dict()
    assert [name for name, value in whole.state_dict().items() if not torch.equal(weights[name], value)] == []


@pytest.mark.slow
def test_a_pre_training_killed_at_twenty_moments_equals_one_that_was_not(tmp_path: Path) -> None:
    data, config = tmp_path / "data", tmp_path / "pretrain.yaml"
    mim3d = [sys.executable, "-m", "mim3d"]
    subprocess.run([*mim3d, "phantom", str(data), "--num_cases", "4", "--size", "40", "40", "32"], check=True)
    loop = {
        "precision": "32-true",
        "max_steps": 150,
        "checkpoint_every": 2,
        "log_every": 3,
        "pictures_every": 7,
        "num_workers": 2,
    }
    settings = {"method": METHOD, "backbone": BACKBONE, "optim": {"learning_rate": 1e-3}, "accelerator": "cpu", **loop}
    write_yaml(config, {"command": "pretrain", "data": str(data), **settings})
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    commands = {
        name: [*mim3d, "pretrain", "--config", str(config), "--out", str(out), "--resume", "true"]
        for name, out in runs.items()
    }
    start = time.monotonic()
    Killer(commands["whole"], runs["whole"], seed=0).finish()
    starting_s = time.monotonic() - start - read_run(runs["whole"]).metrics[-1]["time_s"]

    killer = Killer(commands["killed"], runs["killed"], seed=1)
    moments = random.Random(2)
    targets = iter(sorted(moments.sample(range(2, 48), 14)))
    for early in moments.sample([True] * 6 + [False] * 14, 20):
        if early:
            killer.kill_within(starting_s)
        else:
            killer.kill_after_step(next(targets))
    assert killer.num_kills == 20
    assert newest_step(runs["killed"]) < 150
    killer.finish()

    records = {name: read_run(out) for name, out in runs.items()}
    assert comparable(records["killed"].metrics) == comparable(records["whole"].metrics)
    assert list(records["killed"].pictures) == list(records["whole"].pictures)
    checkpoints = {name: read_checkpoint(out / "checkpoints" / "step_00000150.pt") for name, out in runs.items()}
    for part in ("objective", "average"):
        one, other = (checkpoints[name][part] for name in runs)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
    exported = {name: sorted((out / "encoder").glob("*.safetensors")) for name, out in runs.items()}
    assert [path.read_bytes() for path in exported["killed"]] == [path.read_bytes() for path in exported["whole"]] != []
