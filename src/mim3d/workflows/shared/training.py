"""The settings that pre-training and fine-tuning share, and the processes that one command runs in."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

from mim3d.caching.scan import CachedScan
from mim3d.core.errors import BothSetError, ConfigError
from mim3d.core.progress import say
from mim3d.core.resources import num_cores
from mim3d.core.run_folder import MANIFEST_NAME, read_manifest
from mim3d.core.settings import parse_duration, to_mapping
from mim3d.datasets.patients import UserStatements
from mim3d.distributed.processes import Processes, choose_processes, join_processes
from mim3d.distributed.stopping import requeued_when_stopped
from mim3d.loading.loader import Loader
from mim3d.loading.samples import Augment, Sampler
from mim3d.scans.intensity import Intensity
from mim3d.tracking import Tracking
from mim3d.training.plan import steps_for_epochs
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopOptions, LoopSettings


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(LoopOptions):
    """How long, how often and on what to train: the settings that pre-training and fine-tuning share.

    Attributes:
        max_steps: Optimiser steps.
        max_epochs: Passes over the training scans, instead of max_steps.
        max_time: Longest time of this session, HH:MM or HH:MM:SS; the run can be resumed.
        batch_size: Samples per micro-batch and device.
        optim: Optimiser; what is not given is the method's or task's own.
        devices: Processes, one per device, on each node; as torchrun or srun started them, or 1, if not given.
        num_nodes: Machines; as torchrun or srun started the processes, or 1, if not given.
        num_workers: Reading processes; none on a CPU and most cores beside a GPU if not given.
        read_timeout: Minutes that a reading process may take over a batch before the run stops; 0 waits for ever.
        memory_limit: GiB that training may use (on a GPU: of each); what is free if not given, 0 for no check.
        tracking: TensorBoard, Weights & Biases or MLflow beside metrics.jsonl.
        strict: Refuse scans that cannot be used or were learned from, instead of warning.
        modality: What made the scans, such as CT or MR, where neither the data set nor a header says it; one for each
            channel separated by ";".
        patient_pattern: Regular expression that finds the patient in the name of a case, such as "STS_[0-9]+".
        resume: Go on with the run in OUT, or start it.
    Raises:
        ConfigError: For a value that cannot work.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_time: str | None = None
    batch_size: int | None = None
    optim: Optimisation = Optimisation()
    devices: int | None = None
    num_nodes: int | None = None
    num_workers: int | None = None
    read_timeout: float = 10.0
    memory_limit: float | None = None
    pictures_every: int | None = 500
    tracking: Tracking = Tracking()
    strict: bool | None = None
    modality: str | None = None
    patient_pattern: str | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_epochs is not None:
            raise BothSetError(f"max_steps ({self.max_steps})", f"max_epochs ({self.max_epochs})")
        for name in ("batch_size", "max_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.num_workers is not None and self.num_workers < 0:
            raise ConfigError(f"num_workers is {self.num_workers}; it must be 0 or more.")
        if self.read_timeout < 0:
            raise ConfigError(f"read_timeout is {self.read_timeout} min; it must be above 0, or 0 to wait for ever.")
        if self.memory_limit is not None and not 0 <= self.memory_limit < math.inf:
            raise ConfigError(f"memory_limit is {self.memory_limit} GiB; it must be above 0, or 0 for no check.")
        self.tracking.require_packages()
        self.loop(self.max_steps or 1)

    def on_processes(self) -> Self:
        """These settings with ``devices`` and ``num_nodes`` as given, else as torchrun or srun says, else 1.

        Raises:
            ConfigError: When what is given contradicts the launcher.
        """
        devices, num_nodes = choose_processes(self.devices, self.num_nodes)
        return replace(self, devices=devices, num_nodes=num_nodes)

    @property
    def declared(self) -> UserStatements:
        """What the user says of the data set, as arguments of ``read_cases``."""
        return {"modality": self.modality, "patient_pattern": self.patient_pattern}

    def on_machine(self, processes: Processes, out: str) -> tuple[Self, dict[str, Any]]:
        """These settings in a precision of this machine, before data are read or a cache is built.

        What ``auto`` comes to is printed. A run that goes on keeps the precision that it began with, and all processes
        take that of the first.

        Args:
            processes: The processes of the command.
            out: Folder of the run.
        Returns:
            The settings, and what to note in the manifest of how their precision was chosen.
        Raises:
            ConfigError: For a device, a compiler or a precision that does not work here.
        """
        from mim3d.training.launch import check_machine
        from mim3d.training.precision import choose_precision, require_precision

        check_machine(self.loop(1))
        # Processes that Fabric starts find the run that the first one has made.
        begun_in = precision_of(out) if self.resume or not processes.is_first else None
        if self.precision != "auto":
            if begun_in is None:
                require_precision(self.precision, self.accelerator)
            return self, {}
        noted: dict[str, Any] = {}
        if not processes.is_first:
            precision = processes.wait_for("precision") or begun_in or self.precision
        elif begun_in is not None:
            precision = begun_in
        else:
            choice = choose_precision(self.accelerator)
            precision, noted = choice.precision, {"precision_choice": to_mapping(choice)}
            say(f"precision: {precision} (auto; {choice.reason})")
        if processes.is_first:
            processes.announce("precision", precision)
        return replace(self, precision=precision), noted

    def loop(self, max_steps: int, **changes: Any) -> LoopSettings:
        """The loop's settings for a run of ``max_steps``, with ``changes`` to them."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(LoopSettings)}
        values = {name: getattr(self, name) for name in shared - {"max_steps"}}
        values |= {"devices": self.devices or 1, "num_nodes": self.num_nodes or 1}
        seconds = None if self.max_time is None else parse_duration(self.max_time)
        return LoopSettings(**{**values, "max_steps": max_steps, "max_time_s": seconds, **changes})

    def num_steps(self, loader: Loader, default_epochs: int) -> int:
        """Optimiser steps of the run: as given, or from passes over the data."""
        if self.max_steps is not None:
            return self.max_steps
        return steps_for_epochs(
            self.max_epochs or default_epochs,
            loader,
            accumulation=self.accumulation,
            devices=self.devices or 1,
            num_nodes=self.num_nodes or 1,
        )

    def loader(
        self,
        scans: Sequence[CachedScan],
        sampler: Sampler,
        intensity: Intensity,
        augment: Augment | None = None,
        on_damage: Callable[[str, str], None] | None = None,
    ) -> Loader:
        """The source of batches. Unless they are given, no processes read beside a CPU, whose cores train."""
        num_workers = self.num_workers
        if num_workers is None:
            import torch

            on_gpu = torch.cuda.is_available() and self.accelerator != "cpu"
            num_workers = min(8, max(1, num_cores() - 1)) if on_gpu else 0
        return Loader(
            scans,
            sampler,
            intensity,
            batch_size=self.batch_size or 1,
            seed=self.seed,
            num_workers=num_workers,
            augment=augment,
            strict=bool(self.strict),
            timeout_s=60 * self.read_timeout or None,
            on_damage=on_damage,
        )


def precision_of(out: str | Path) -> str | None:
    """The precision of the run in a folder; None where there is no run."""
    manifest = Path(out) / MANIFEST_NAME
    return read_manifest(manifest)["settings"].get("precision") if manifest.is_file() else None


@contextmanager
def joined_processes(settings: TrainingSettings) -> Iterator[Processes]:
    """Join the processes that run this command; all but the first print nothing but their errors.

    In a batch job of SLURM, a job that is stopped before or after training is put into the queue again.

    Args:
        settings: With the numbers of processes filled in.
    Raises:
        Mim3dError: When the first process cannot be reached.
    """
    with (
        join_processes(settings.devices or 1, settings.num_nodes or 1) as processes,
        requeued_when_stopped(asks=processes.is_first),
    ):
        if processes.is_first:
            yield processes
            return
        with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield processes
