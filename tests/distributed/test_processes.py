"""Several processes train one network: the same as one process with their batches together."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.core.run_folder import read_run
from mim3d.training.checkpoint import read_checkpoint
from tests.training import toy_training
from tests.training.toy_training import comparable, toy_run

SETTINGS: dict[str, Any] = {"dropout": 0.0, "max_steps": 12, "log_every": 4, "checkpoint_every": 4, "validate_every": 6}


def start(out: Path, **settings: Any) -> subprocess.Popen[str]:
    command = [sys.executable, toy_training.__file__, str(out), json.dumps({**SETTINGS, "devices": 2, **settings})]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_equal_one_with_both_batches(tmp_path: Path) -> None:
    _, whole, reference = toy_run(tmp_path / "one", **SETTINGS, batch_size=4, accumulation=2)
    process = start(tmp_path / "two", batch_size=2, accumulation=2)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "12 steps of 8 samples (2 samples x 2 micro-batches x 2 processes)" in errors
    result = json.loads(output.splitlines()[-1])
    assert (result["step"], result["finished"]) == (12, True)
    # Micro-batches are dealt out in turn: the first process has every other pair of samples.
    assert result["seen"] == [float(sample) for sample in range(96) if sample % 4 < 2]
    weights = torch.load(tmp_path / "two" / "final.pt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    lines = [read_run(run).metrics for run in (tmp_path / "two", reference.path)]
    for one, other in zip(*map(comparable, lines), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_they_resume_to_the_same_bits(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "dropout": 0.5}
    whole = start(tmp_path / "whole", **settings)
    errors = whole.communicate(timeout=120)[1]
    assert whole.returncode == 0, errors
    process = start(tmp_path / "parts", **settings, wait_s=0.2)
    while not (tmp_path / "parts" / "checkpoints" / "step_00000004.pt").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert 4 <= json.loads(output.splitlines()[-1])["step"] < 12
    assert "SIGTERM asked to stop" in errors
    process = start(tmp_path / "parts", **settings)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors
    one, other = (read_checkpoint(tmp_path / name / "checkpoints" / "step_00000012.pt") for name in ("whole", "parts"))
    for name, value in one["objective"].items():
        assert torch.equal(other["objective"][name], value)
    metrics = [comparable(read_run(tmp_path / name).metrics) for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_both(tmp_path: Path) -> None:
    # Sample 34 goes to the second process.
    process = start(tmp_path / "run", batch_size=2, bad_sample=34.0, max_bad_steps=0)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    assert "At step 9, loss/penalty became infinite or not a number" in errors
    assert "the checkpoint of step 8 is kept" in errors
