"""Checkpoints that survive a kill at any moment: written beside, flushed, renamed; checked before use."""

import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mim3d.core.errors import CheckpointError, ConfigError, Mim3dError, first_line
from mim3d.core.files import atomic_file, remove_partial, require_regular

_FORMAT = "mim3d training checkpoint 2"
_STEP_FILE = re.compile(r"step_(\d{8})\.pt")
_BEST_FILE = re.compile(r"best_(\d{8})\.pt")


class Checkpoints:
    """The checkpoints of one run: the newest of them, and the best weights that each of those knows of.

    A best step never lies after the checkpoint that records it, so which best file belongs to a checkpoint follows from
    the names alone: the last one not after it.

    Args:
        folder: Folder of the checkpoints.
        keep: How many of the newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep

    def newest(self) -> Path | None:
        """Find the newest undamaged checkpoint. Damaged ones are set aside with a warning each.

        Returns:
            Path of the checkpoint. None when there is none at all.
        Raises:
            CheckpointError: Every checkpoint is damaged.
        """
        steps = _files(self.folder, _STEP_FILE)
        for step in sorted(steps, reverse=True):
            try:
                require_regular(steps[step])
                # torch.load alone does not notice a changed byte.
                with zipfile.ZipFile(steps[step]) as archive:
                    broken = archive.testzip()
                if broken is None:
                    read_checkpoint(steps[step])
                    return steps[step]
                reason = f"the checksum of {broken} is wrong"
            except (CheckpointError, OSError, zipfile.BadZipFile) as error:
                reason = first_line(error)
            aside = steps[step].with_suffix(".pt.damaged")
            os.replace(steps[step], aside)
            warnings.warn(
                f"{steps[step]} is damaged ({reason}); renamed to {aside.name}, the one before is used.",
                stacklevel=2,
            )
        if steps:
            raise CheckpointError(
                f"None of the {len(steps)} checkpoints in {self.folder} can be read; start a new run."
            )
        return None

    def last_step(self) -> int | None:
        """Step of the newest checkpoint, damaged or not. None when there is none."""
        return max(_files(self.folder, _STEP_FILE), default=None)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of ``step``, then drop what is no longer needed.

        Raises:
            Mim3dError: The checkpoint cannot be written. The ones before are untouched.
        """
        path = self.folder / f"step_{step:08d}.pt"
        _write(path, {"step": step, **state})
        self._prune()
        return path

    def save_best(self, step: int, objective: nn.Module, values: Mapping[str, float]) -> None:
        """Write the weights of the best step so far."""
        content = {"step": step, "values": dict(values), "objective": objective.state_dict()}
        _write(self.folder / f"best_{step:08d}.pt", content)

    def drop_after(self, step: int) -> None:
        """Drop what an interrupted session wrote after ``step``."""
        for pattern in (_STEP_FILE, _BEST_FILE):
            for later, path in _files(self.folder, pattern).items():
                if later > step:
                    path.unlink()
        remove_partial(self.folder)
        # A session that was killed right after it had written one left those before it.
        self._prune()

    def require_space(self, module: nn.Module, *, averaged: bool = False) -> None:
        """Check that the disk can hold the checkpoints of a run that trains ``module``.

        Args:
            module: What is trained.
            averaged: Whether an average of its weights is stored beside them.
        Raises:
            ConfigError: There is too little space. The message says how much is needed and how much there is.
        """
        weights = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
        trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        moments = (12 if averaged else 8) * trained
        existing = sum(path.stat().st_size for path in self.folder.glob("*.pt"))
        needed = (self._keep + 1) * (weights + moments) + 2 * weights - existing
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise ConfigError(
                f"{self.folder} has {free / 1e9:.2f} GB of free space, but the checkpoints of this run need "
                f"{needed / 1e9:.2f} GB; free some, or set keep_checkpoints below {self._keep}."
            )

    def _prune(self) -> None:
        steps = _files(self.folder, _STEP_FILE)
        best = _files(self.folder, _BEST_FILE)
        kept = sorted(steps)[-self._keep :]
        needed = {max((b for b in best if b <= step), default=None) for step in kept}
        for step in steps.keys() - set(kept):
            steps[step].unlink()
        for step in best.keys() - needed:
            best[step].unlink()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read the state in a checkpoint file to the CPU. Nothing in the file can run code.

    Raises:
        CheckpointError: The file cannot be read or holds something else.
    """
    try:
        require_regular(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # On bytes that are no pickle it depends on the bytes what torch raises.
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {first_line(error)}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no training checkpoint of this version of mim3d.")
    return content


def restore_weights(objective: nn.Module, content: Mapping[str, Any], path: Path) -> None:
    """Put the weights of a checkpoint into ``objective``, every one of them.

    Raises:
        CheckpointError: A tensor, which the message names, does not fit.
    """
    saved, wanted = content["objective"], objective.state_dict()
    for name in [*wanted, *saved]:
        have = tuple(saved[name].shape) if name in saved else "missing"
        want = tuple(wanted[name].shape) if name in wanted else "unknown"
        if have != want:
            raise CheckpointError(
                f"{path} does not fit the network: {name} is {have} in the file and {want} in the network; "
                "resume with the settings the run was started with."
            )
    objective.load_state_dict(saved, strict=True)


def load_best(folder: Path, objective: nn.Module) -> dict[str, Any] | None:
    """Put the best validated weights of a run into ``objective``.

    Args:
        folder: The run's ``checkpoints`` folder.
        objective: The objective that was trained.
    Returns:
        ``{"step": ..., "values": {...}}`` of that validation. None, with ``objective`` unchanged, if there is none.
    Raises:
        CheckpointError: The file cannot be read or does not fit.
    """
    best = _files(folder, _BEST_FILE)
    if not best:
        return None
    path = best[max(best)]
    content = read_checkpoint(path)
    restore_weights(objective, content, path)
    return {"step": content["step"], "values": content["values"]}


def _files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return {int(match[1]): path for match, path in matches if match}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with atomic_file(path, durable=True, remedy=None) as part, open(part, "wb") as file:
            torch.save({"format": _FORMAT, **content}, file)
    except (OSError, RuntimeError) as error:
        raise Mim3dError(
            f"The checkpoint {path} could not be written ({first_line(error)}); earlier ones are "
            "untouched. Free some space, or repair the disk, and resume."
        ) from error
