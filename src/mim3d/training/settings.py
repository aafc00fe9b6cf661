"""What the training loop is told and what it asks of others: settings, data source, run folder, result."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mim3d.core.errors import ConfigError
from mim3d.objective import Batch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, how often and on what to train; every count is in optimiser steps.

    Attributes:
        max_steps: steps of the whole run; the learning rate's schedule ends there.
        max_time_s: seconds this session may take; then it stops with a checkpoint and can be resumed. It
            shortens the session, never the schedule.
        started_at: when the session began, on the monotonic clock; None where it begins with training.
        accumulation: micro-batches whose gradients are averaged into one step.
        log_every: steps between two lines of metrics, and between two looks at whether the loss is finite.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: newest checkpoints kept on disk; the best weights are kept besides.
        validate_every: steps between two validations; None validates after the last step only.
        max_bad_steps: steps of the whole run that may go wrong: one whose loss or gradient is not finite is skipped,
            one that runs out of memory is taken once more. More of them end the run; 0 ends it at the first.
        rank_timeout_s: seconds without progress in a step after which processes that wait for a hung one are ended;
            after a sixth of them the first process says which.
        patience: validations without a better one after which training ends; None goes on to the last step.
        pictures_every: steps between two sets of pictures; None makes none.
        seed: of dropout and everything else drawn on the way.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        tf32: whether a GPU may round the factors of float32 products to 10 bits (TF32), which is several times as fast.
        compile: whether the blocks of the network go through ``torch.compile``.
        devices: processes (one per device) on each node.
        num_nodes: machines.
        strategy: how several processes keep their weights the same: ``ddp`` (each has all of them), or ``auto``, which
            means the same.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
    Raises:
        ConfigError: for a value that cannot work.
    """

    max_steps: int
    max_time_s: float | None = None
    started_at: float | None = None
    accumulation: int = 1
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    validate_every: int | None = None
    patience: int | None = None
    max_bad_steps: int = 3
    rank_timeout_s: float = 1800.0
    pictures_every: int | None = None
    seed: int = 0
    precision: str = "32-true"
    tf32: bool = False
    compile: bool = False
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    accelerator: str = "auto"

    def __post_init__(self) -> None:
        names = "max_steps accumulation log_every checkpoint_every keep_checkpoints devices num_nodes"
        for name in (*names.split(), "validate_every", "patience", "pictures_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.max_time_s is not None and self.max_time_s <= 0:
            raise ConfigError(f"max_time_s is {self.max_time_s}; it must be more than zero seconds.")
        if self.max_bad_steps < 0:
            raise ConfigError(f"max_bad_steps is {self.max_bad_steps}; it must be 0 or more.")
        if self.rank_timeout_s <= 0:
            raise ConfigError(f"rank_timeout_s is {self.rank_timeout_s}; it must be more than zero seconds.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be zero or more.")
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is '{self.precision}'; use one of {', '.join(PRECISIONS)}.")
        if self.strategy == "fsdp":
            raise ConfigError(
                "strategy is 'fsdp', which was removed; use ddp, and where memory is short --backbone.recompute true."
            )
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy is '{self.strategy}'; use one of {', '.join(STRATEGIES)}.")
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
        finished: whether nothing is left to train: all steps are done, or patience ran out.
        best: step and values of the best validation, or None without one.
        reason: why it ended, for people.
    """

    step: int
    finished: bool
    best: dict[str, float] | None
    reason: str
