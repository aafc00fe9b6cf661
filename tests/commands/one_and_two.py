"""The same fine-tuning by one process and by two with half its batch each, as command lines."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mim3d.core.run_folder import read_run


def trained_by_one_and_two(
    words: list[str], folder: Path, *, last_step: int
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """The losses of both runs, and their last checkpoints.

    Args:
        words: Flags of both, without batch, devices, cache and folder of the run.
        folder: Where both runs and their cache lie.
        last_step: The last step.
    """
    for name, batch, devices in (("one", "2", "1"), ("two", "1", "2")):
        own = ["--out", str(folder / name), "--batch_size", batch, "--devices", devices]
        command = [sys.executable, "-m", "mim3d", "finetune", *own, "--cache", str(folder / "cache"), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
    runs = [folder / name for name in ("one", "two")]
    losses = [[line["loss"] for line in read_run(run).metrics if "loss" in line] for run in runs]
    return losses, [torch.load(next(run.rglob(f"step_*{last_step}.pt")), weights_only=True) for run in runs]
