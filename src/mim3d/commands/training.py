"""What the arguments of pre-training and fine-tuning have in common, and what becomes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from mim3d.config import parse_duration
from mim3d.data.cache import CachedScan
from mim3d.data.loading import Augment, Loader, Sampler
from mim3d.data.transforms import Intensity
from mim3d.engine.plan import steps_for_epochs
from mim3d.engine.settings import LoopSettings
from mim3d.errors import ConfigError
from mim3d.resources import num_cores


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how often and on what to train, as the commands take it; their docstrings describe each argument."""

    max_steps: int | None
    max_epochs: int | None
    max_time: str | None
    batch_size: int
    accumulation: int
    precision: str
    devices: int
    num_nodes: int
    accelerator: str
    num_workers: int | None
    log_every: int
    checkpoint_every: int
    keep_checkpoints: int
    seed: int
    memory_limit: float | None = None
    strict: bool | None = None
    resume: bool = False
    pictures_every: int | None = None
    validate_every: int | None = None

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
        if self.memory_limit is not None and self.memory_limit < 0:
            raise ConfigError(f"memory_limit is {self.memory_limit} GiB; it must be above 0, or 0 for no check.")
        self.loop(self.max_steps or 1)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of a command; those it does not know are left out.

        Raises:
            ConfigError: for a value that cannot work.
        """
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

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
        )

    def _reading_processes(self) -> int:
        """As given; else none on a CPU, whose cores train, and most cores beside a GPU."""
        if self.num_workers is not None:
            return self.num_workers
        import torch

        on_gpu = torch.cuda.is_available() and self.accelerator != "cpu"
        return min(8, max(1, num_cores() - 1)) if on_gpu else 0
