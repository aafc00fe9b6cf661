"""What the arguments of pre-training and fine-tuning have in common, and what becomes of them."""

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields
from typing import Any, Self

from mim3d.caching.cache import CachedScan
from mim3d.core.errors import ConfigError
from mim3d.core.resources import num_cores
from mim3d.core.settings import parse_duration
from mim3d.distributed.processes import Processes, choose_processes, join_processes
from mim3d.distributed.stopping import requeued_when_stopped
from mim3d.loading.loader import Augment, Loader, Sampler
from mim3d.scans.intensity import Intensity
from mim3d.tracking import Tracking
from mim3d.training.plan import steps_for_epochs
from mim3d.training.settings import LoopSettings


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how often and on what to train, as the commands take it; their docstrings describe each argument.

    Attributes:
        started_at: when the command read them, on the monotonic clock: preparing the data counts for ``max_time``.
    """

    max_steps: int | None
    max_epochs: int | None
    max_time: str | None
    batch_size: int
    accumulation: int
    precision: str
    tf32: bool = False
    compile: bool = False
    devices: int
    num_nodes: int
    strategy: str = "auto"
    accelerator: str
    num_workers: int | None
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    seed: int
    max_bad_steps: int = 3
    read_timeout: float = 10.0
    memory_limit: float | None = None
    strict: bool | None = None
    resume: bool = False
    tracking: Tracking = field(default_factory=Tracking)
    pictures_every: int | None = None
    validate_every: int | None = None
    patience: int | None = None
    started_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_epochs is not None:
            raise ConfigError(
                f"max_steps ({self.max_steps}) and max_epochs ({self.max_epochs}) are both set; give only one of them."
            )
        for name in ("batch_size", "max_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"num_workers is {self.num_workers}; it must be 0 or more.")
        if self.read_timeout < 0:
            raise ConfigError(f"read_timeout is {self.read_timeout} min; it must be above 0, or 0 to wait for ever.")
        if self.memory_limit is not None and self.memory_limit < 0:
            raise ConfigError(f"memory_limit is {self.memory_limit} GiB; it must be above 0, or 0 for no check.")
        self.tracking.require_packages()
        self.loop(self.max_steps or 1)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of a command; those it does not know are left out.

        Raises:
            ConfigError: for a value that cannot work.
        """
        known = {field.name: arguments[field.name] for field in fields(cls) if field.name in arguments}
        # Not given, and no launcher was asked: see with_processes.
        alone = {name: 1 for name in ("devices", "num_nodes") if known.get(name, 1) is None}
        return cls(**known | alone)

    def check_machine(self) -> None:
        """Refuse what this machine cannot train, before data are read or a cache is built.

        Raises:
            ConfigError: for a device, a compiler or a strategy that does not work here.
        """
        from mim3d.training.launch import check_machine

        check_machine(self.loop(1))

    def loop(self, max_steps: int) -> LoopSettings:
        """The loop's settings for a run of ``max_steps``."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(LoopSettings)} - {"max_steps"}
        values = {name: getattr(self, name) for name in shared}
        seconds = None if self.max_time is None else parse_duration(self.max_time)
        return LoopSettings(max_steps=max_steps, max_time_s=seconds, **values)

    def num_steps(self, loader: Loader, default_epochs: int) -> int:
        """Optimiser steps of the run: as given, or from passes over the data."""
        if self.max_steps is not None:
            return self.max_steps
        return steps_for_epochs(
            self.max_epochs or default_epochs,
            loader,
            accumulation=self.accumulation,
            devices=self.devices,
            num_nodes=self.num_nodes,
        )

    def loader(
        self,
        scans: Sequence[CachedScan],
        sampler: Sampler,
        intensity: Intensity,
        augment: Augment | None = None,
    ) -> Loader:
        """The source of batches."""
        return Loader(
            scans,
            sampler,
            intensity,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self._reading_processes(),
            augment=augment,
            strict=bool(self.strict),
            timeout_s=60 * self.read_timeout or None,
        )

    def _reading_processes(self) -> int:
        """As given; else none on a CPU, whose cores train, and most cores beside a GPU."""
        if self.num_workers is not None:
            return self.num_workers
        import torch

        on_gpu = torch.cuda.is_available() and self.accelerator != "cpu"
        return min(8, max(1, num_cores() - 1)) if on_gpu else 0


def with_processes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command with ``devices`` and ``num_nodes`` as given, else as torchrun or srun says, else 1.

    Raises:
        ConfigError: when what is given contradicts the launcher.
    """
    devices, num_nodes = choose_processes(arguments["devices"], arguments["num_nodes"])
    return {**arguments, "devices": devices, "num_nodes": num_nodes}


@contextmanager
def all_processes(arguments: Mapping[str, Any]) -> Iterator[Processes]:
    """Join the processes that run this command; all but the first say nothing but their errors.

    In a batch job of SLURM, one that is stopped before or after training asks for it again.

    Raises:
        Mim3dError: when the first process cannot be reached.
    """
    with (
        join_processes(arguments["devices"], arguments["num_nodes"]) as processes,
        requeued_when_stopped(asks=processes.is_first),
    ):
        if processes.is_first:
            yield processes
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield processes
