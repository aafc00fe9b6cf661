"""What goes into the training loop and what comes out of it: settings, the source of batches, the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mim3d.core.errors import ConfigError
from mim3d.objective import Batch

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How long, how often and on what to train; every count is in optimiser steps.

    Attributes:
        max_steps: Steps of the whole run. The learning rate's schedule ends there.
        max_time_s: Seconds that this session may take. Then it stops with a checkpoint and can be resumed. It shortens
            the session, never the schedule.
        started_at: When the session began, on the monotonic clock. None where it begins with training.
        accumulation: Micro-batches whose gradients are averaged into one step.
        log_every: Steps between two lines of metrics, and between two looks at whether the loss is finite.
        checkpoint_every: Steps between two checkpoints.
        keep_checkpoints: Newest checkpoints that are kept on disk. The best weights are kept besides.
        validate_every: Steps between two validations. None validates after the last step only.
        patience: Validations without a better one after which training ends. None goes on to the last step.
        max_bad_steps: Steps of the whole run that may go wrong: one whose loss or gradient is not finite is skipped,
            one that runs out of memory is taken once more. More of them end the run; 0 ends it at the first.
        rank_timeout_s: Seconds without progress in a step after which processes that wait for a hung one are ended.
            After a sixth of them the first process says which one hangs.
        pictures_every: Steps between two sets of pictures. None makes none.
        seed: Seed of dropout and of everything else drawn in training.
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        tf32: Whether a GPU may round the factors of float32 products to 10 bits (TF32), several times as fast.
        compile: Whether the blocks of the network go through ``torch.compile``.
        devices: Processes, one per device, on each machine.
        num_nodes: Machines.
        strategy: How several processes keep their weights the same: ``ddp``, where each has all of them, or ``auto``,
            which means the same.
        accelerator: ``auto``, ``cpu``, ``cuda`` or ``mps``.
    Raises:
        ConfigError: A value cannot work.
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
        """Number of processes."""
        return self.devices * self.num_nodes


class BatchSource(Protocol):
    """The source of micro-batches."""

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


@dataclass(frozen=True)
class TrainResult:
    """How training ended.

    Attributes:
        step: Optimiser steps done in all, earlier sessions included.
        finished: Whether nothing is left to train: all steps are done, or patience ran out.
        best: Step and scores of the best validation. None without one.
        reason: Why training ended, for people.
    """

    step: int
    finished: bool
    best: dict[str, float] | None
    reason: str
