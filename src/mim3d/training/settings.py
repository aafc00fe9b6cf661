"""What goes into the training loop and what comes out of it: settings, the source of batches, the result."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from mim3d.core.errors import ConfigError
from mim3d.objective import Batch

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
STRATEGIES = ("auto", "ddp")
ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """The settings of the training loop that are the user's own. Every count is in optimiser steps.

    Attributes:
        accumulation: Micro-batches whose gradients are averaged into one step.
        precision: 32-true, bf16-mixed or 16-mixed; auto is bf16-mixed where this device is good at it, else 32-true. A
            CPU is measured for a second.
        tf32: Let a GPU round the factors of float32 products to TF32: several times as fast, 10 bits instead of 23.
        compile: Compile the blocks of the network (torch.compile); a minute at the start.
        strategy: How several processes share the work: ddp (every process has all weights), or auto, which is ddp.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        log_every: Steps between two lines of metrics; 0 for one at the end.
        checkpoint_every: Steps between two checkpoints; 0 for one at the end.
        pictures_every: Steps between two sets of images in the run folder; 0 or null for none.
        keep_checkpoints: Newest checkpoints kept.
        max_bad_steps: Steps of the whole run that may go wrong: not finite, and skipped, or out of memory, and taken
            once more; a run with more of them stops.
        seed: Seed of weights, order, crops and masks; never of the folds.
        verbose: Print how every number of the run follows from the settings; its manifest.json has that in any case.
    """

    accumulation: int = 1
    precision: str = "auto"
    tf32: bool = False
    compile: bool = False
    strategy: str = "auto"
    accelerator: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 200
    pictures_every: int | None = None
    keep_checkpoints: int = 2
    max_bad_steps: int = 3
    seed: int = 0
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class LoopSettings(LoopOptions):
    """How long, how often and on what to train.

    Attributes:
        max_steps: Steps of the whole run. The learning rate's schedule ends there.
        frozen_ratio: Share of the steps, the first ones, in which the encoder is frozen and what is built on it learns.
        precision: What auto has come to on this device; see :func:`~mim3d.training.precision.choose_precision`.
        max_time_s: Seconds that this session may take. Then it stops with a checkpoint and can be resumed. It shortens
            the session, never the schedule.
        started_at: When the session began, on the monotonic clock. None where it begins with training.
        validate_every: Steps between two validations. None or 0 validates after the last step only.
        patience: Validations without a better one after which training ends. None or 0 goes on to the last step.
        rank_timeout_s: Seconds without progress in a step after which processes that wait for a hung one are ended.
            After a sixth of them the first process says which one hangs.
        devices: Processes, one per device, on each machine.
        num_nodes: Machines.
    Raises:
        ConfigError: A value cannot work.
    """

    max_steps: int
    precision: str = "32-true"
    frozen_ratio: float = 0.0
    max_time_s: float | None = None
    started_at: float | None = None
    validate_every: int | None = None
    patience: int | None = None
    rank_timeout_s: float = 1800.0
    devices: int = 1
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name in ("max_steps", "accumulation", "keep_checkpoints", "devices", "num_nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("log_every", "checkpoint_every", "validate_every", "patience", "pictures_every"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; it must be at least 1, or 0 to switch it off.")
        for name in ("max_time_s", "rank_timeout_s"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be more than zero seconds.")
        if self.max_bad_steps < 0:
            raise ConfigError(f"max_bad_steps is {self.max_bad_steps}; it must be 0 or more.")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; it must be zero or more.")
        if self.strategy == "fsdp":
            raise ConfigError(
                "strategy is 'fsdp', which was removed; use ddp, and where memory is short --backbone.recompute true."
            )
        for name, known in (("precision", PRECISIONS), ("strategy", STRATEGIES), ("accelerator", ACCELERATORS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is '{getattr(self, name)}'; use one of {', '.join(known)}.")

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


class BatchSource(Protocol):
    """The source of micro-batches."""

    @property
    def batch_size(self) -> int:
        """Samples of one micro-batch of one process."""

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the data."""

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Endless micro-batches of process ``rank``, from sample ``first_sample`` of the whole run on."""


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
