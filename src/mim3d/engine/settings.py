"""What the training loop is told and what it asks of others: settings, data source, run folder, result."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mim3d.errors import ConfigError
from mim3d.objective import Batch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, how often and on what to train; every count is in optimiser steps.

    Attributes:
        max_steps: steps of the whole run; the learning rate's schedule ends there.
        max_time_s: seconds this session may train; then it stops with a checkpoint and can be resumed. It
            shortens the session, never the schedule.
        accumulation: micro-batches whose gradients are averaged into one step.
        log_every: steps between two lines of metrics, and between two looks at whether the loss is finite.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: newest checkpoints kept on disk; the best weights are kept besides.
        validate_every: steps between two validations; None validates after the last step only.
        pictures_every: steps between two sets of pictures; None makes none.
        seed: of dropout and everything else drawn on the way.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        devices: processes (one per device) on each node.
        num_nodes: machines.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
    Raises:
        ConfigError: for a value that cannot work.
    """

    max_steps: int
    max_time_s: float | None = None
    accumulation: int = 1
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int | None = None
    pictures_every: int | None = None
    seed: int = 0
    precision: str = "32-true"
    devices: int = 1
    num_nodes: int = 1
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        names = "max_steps accumulation log_every checkpoint_every keep_checkpoints devices num_nodes"
        for name in (*names.split(), "validate_every", "pictures_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.max_time_s is not None and self.max_time_s <= 0:
            raise ConfigError(f"max_time_s is {self.max_time_s}; it must be more than zero seconds.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be zero or more.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is '{self.precision}'; use one of {', '.join(PRECISIONS)}.")
        if self.accelerator not in ACCELERATORS:
            raise ConfigError(f"accelerator is '{self.accelerator}'; use one of {', '.join(ACCELERATORS)}.")

    @property
    def world_size(self) -> int:
        """Processes that train together."""
        return self.devices * self.num_nodes


class BatchSource(Protocol):
    """Where micro-batches come from."""

    @property
    def batch_size(self) -> int:
        """Samples of one micro-batch of one process."""
        ...

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""
        ...

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Endless micro-batches of process ``rank``, from sample ``first_sample`` of the whole run on."""
        ...


class RunFolder(Protocol):
    """What the loop asks of the folder that a run leaves behind; only the first process's calls write."""

    @property
    def checkpoints_dir(self) -> Path:
        """Folder of the checkpoints."""
        ...

    @property
    def how_to_resume(self) -> str:
        """The command that goes on from the last checkpoint."""
        ...

    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the folder against a second training process."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics."""
        ...

    def cut_metrics(self, step: int) -> None:
        """Drop what was written after ``step``."""
        ...

    def save_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write volumes ``(X, Y, Z)`` by name."""
        ...

    def note(self, values: Mapping[str, Any]) -> None:
        """Add derived quantities to the manifest."""
        ...


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        step: optimiser steps done in all, earlier sessions included.
        finished: whether that is all of them.
        best: step and values of the best validation, or None without one.
        reason: why it ended, for people.
    """

    step: int
    finished: bool
    best: dict[str, float] | None
    reason: str
