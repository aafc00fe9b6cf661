"""Every number that follows from the settings, with its derivation: printed before the first step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mim3d.engine.optim import decay_groups, num_values
from mim3d.engine.settings import BatchSource, LoopSettings
from mim3d.optimisation import Optimisation, Schedule, make_schedule


@dataclass(frozen=True)
class Plan:
    """The numbers of one run.

    Attributes:
        effective_batch: samples per optimiser step over all processes and micro-batches.
        schedule: learning rate and the like.
        derived: what goes into the manifest.
        derivations: one line each, for people.
    """

    effective_batch: int
    schedule: Schedule
    derived: Mapping[str, Any]
    derivations: tuple[str, ...]


def effective_batch(batch_size: int, loop: LoopSettings) -> int:
    """Samples per optimiser step: micro-batch x accumulation x processes."""
    return batch_size * loop.accumulation * loop.world_size


def steps_for_epochs(epochs: float, source: BatchSource, *, accumulation: int, devices: int, num_nodes: int) -> int:
    """Optimiser steps that show at least ``epochs`` passes over the data; at least one."""
    per_step = source.batch_size * accumulation * devices * num_nodes
    # Rounded first, lest 0.1 x 30 = 3.0000000000000004 samples take a step more.
    return max(1, math.ceil(round(epochs * source.samples_per_epoch / per_step, 9)))


def make_plan(objective: nn.Module, source: BatchSource, loop: LoopSettings, optim: Optimisation, device: str) -> Plan:
    """Derive the numbers of a run.

    Raises:
        ConfigError: when no learning rate follows from the settings.
    """
    batch = effective_batch(source.batch_size, loop)
    schedule = make_schedule(optim, effective_batch=batch, max_steps=loop.max_steps)
    steps_per_epoch = source.samples_per_epoch / batch
    decayed, plain = decay_groups(objective)
    trained = num_values(decayed.values()) + num_values(plain.values())
    total = num_values(objective.parameters())
    derived = {
        "effective_batch": batch,
        "learning_rate": schedule.learning_rate,
        "warmup_steps": schedule.warmup_steps,
        "weight_decay": schedule.weight_decay,
        "max_steps": loop.max_steps,
        "steps_per_epoch": round(steps_per_epoch, 4),
        "epochs": round(loop.max_steps / steps_per_epoch, 4),
        "num_parameters": total,
        "num_trained_parameters": trained,
        "precision": loop.precision,
        "device": device,
        "world_size": loop.world_size,
    }
    derivations = (
        f"effective batch {batch} = {source.batch_size} samples x {loop.accumulation} micro-batches "
        f"x {loop.world_size} processes",
        schedule.derivations[0],
        f"steps per epoch {steps_per_epoch:g} = {source.samples_per_epoch} samples / {batch}; "
        f"{loop.max_steps} steps = {loop.max_steps / steps_per_epoch:.4g} epochs",
        *schedule.derivations[1:],
        f"weight decay acts on {len(decayed)} tensors, not on {len(plain)} (biases, norms, tokens and so on)",
        f"{trained:,} of {total:,} parameters are trained, on {device} in {loop.precision}",
    )
    return Plan(batch, schedule, {**derived, "derivations": list(derivations)}, derivations)
