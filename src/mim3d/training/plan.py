"""Every number that follows from the settings, with its derivation; what matters most is printed first."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mim3d.core.names import number_of
from mim3d.objective import Objective
from mim3d.training.optim import decay_groups, layer_lines
from mim3d.training.schedule import Optimisation, Schedule, make_schedule
from mim3d.training.settings import BatchSource, LoopSettings


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of one run.

    Attributes:
        effective_batch: Samples per optimiser step over all processes and micro-batches.
        schedule: Learning rate and the other numbers of the optimiser.
        derived: Numbers for the manifest.
        summary: What will be done, in two lines for people.
        derivations: One line for each number, for people who want to follow it.
    """

    effective_batch: int
    schedule: Schedule
    derived: Mapping[str, Any]
    summary: tuple[str, ...]
    derivations: tuple[str, ...]


def effective_batch(batch_size: int, loop: LoopSettings) -> int:
    """Samples per optimiser step: micro-batch x accumulation x processes."""
    return batch_size * loop.accumulation * loop.world_size


def steps_for_epochs(epochs: float, source: BatchSource, *, accumulation: int, devices: int, num_nodes: int) -> int:
    """Number of optimiser steps, at least one, that show at least ``epochs`` passes over the data."""
    per_step = source.batch_size * accumulation * devices * num_nodes
    # Rounded first, lest 0.1 x 30 = 3.0000000000000004 samples take a step more.
    return max(1, math.ceil(round(epochs * source.samples_per_epoch / per_step, 9)))


def make_plan(
    objective: Objective, source: BatchSource, loop: LoopSettings, optim: Optimisation, device: str
) -> TrainingPlan:
    """Derive the numbers of a run.

    Args:
        objective: What is trained.
        source: Where micro-batches come from.
        loop: Settings of the loop.
        optim: Settings of the optimiser, already filled from the defaults of the method or task.
        device: Name of the device, for people.
    Raises:
        ConfigError: No learning rate follows from the settings.
    """
    batch = effective_batch(source.batch_size, loop)
    schedule = make_schedule(optim, effective_batch=batch, max_steps=loop.max_steps, frozen_ratio=loop.frozen_ratio)
    steps_per_epoch = source.samples_per_epoch / batch
    per_step, per_step_lines = _per_step(objective, source, batch)
    decayed, plain = decay_groups(objective)
    trained = sum(parameter.numel() for parameter in (decayed | plain).values())
    total = sum(parameter.numel() for parameter in objective.parameters())
    derived = {
        "effective_batch": batch,
        "learning_rate": schedule.learning_rate,
        "warmup_steps": schedule.warmup_steps,
        **({"frozen_steps": schedule.frozen_steps} if schedule.frozen_steps else {}),
        "weight_decay": schedule.weight_decay,
        "max_steps": loop.max_steps,
        "steps_per_epoch": round(steps_per_epoch, 4),
        "epochs": round(loop.max_steps / steps_per_epoch, 4),
        "samples": loop.max_steps * batch,
        **per_step,
        "num_parameters": total,
        "num_trained_parameters": trained,
        "precision": loop.precision,
        "device": device,
        "world_size": loop.world_size,
    }
    passes = loop.max_steps / steps_per_epoch
    derivations = (
        f"effective batch {batch} = {_split_of_a_step(source.batch_size, loop)}",
        schedule.derivations[0],
        f"steps per epoch {steps_per_epoch:.4g} = {number_of(source.samples_per_epoch, 'sample')} / {batch}; "
        f"{number_of(loop.max_steps, 'step')} = {passes:.4g} {'epoch' if passes == 1 else 'epochs'}",
        f"samples seen {loop.max_steps * batch:,} = {number_of(loop.max_steps, 'step')} x {batch}",
        *per_step_lines,
        *schedule.derivations[1:],
        *layer_lines(objective, schedule),
        f"weight decay acts on {number_of(len(decayed), 'tensor')}, not on {len(plain)} (biases, norms, tokens and so "
        "on)",
        f"{trained:,} of {total:,} parameters are trained, on {device} in {loop.precision}",
    )
    split = f" ({_split_of_a_step(source.batch_size, loop)})" if batch != source.batch_size else ""
    rate = f"{schedule.learning_rate:.3g}" + (f" ({schedule.rate_note})" if schedule.rate_note else "")
    stages = ((schedule.frozen_steps, "with the encoder frozen"), (schedule.warmup_steps, "of warm-up"))
    before = " and ".join(f"{number_of(count, 'step')} {stage}" for count, stage in stages if count)
    summary = (
        f"training: {number_of(loop.max_steps, 'step')} of {number_of(batch, 'sample')}{split}, {passes:.3g} "
        f"{'pass' if passes == 1 else 'passes'} over {number_of(source.samples_per_epoch, 'sample')}; learning rate "
        f"{rate}{f' after {before}' if before else ''}",
        f"computing: {number_of(total, 'parameter')}, {'all' if trained == total else f'{trained:,}'} trained, on "
        f"{device} in {loop.precision}",
    )
    return TrainingPlan(batch, schedule, {**derived, "derivations": list(derivations)}, summary, derivations)


def _split_of_a_step(batch_size: int, loop: LoopSettings) -> str:
    counts = ((batch_size, "sample"), (loop.accumulation, "micro-batch"), (loop.world_size, "process"))
    return " x ".join(number_of(count, noun) for count, noun in counts)


def _per_step(objective: Objective, source: BatchSource, batch: int) -> tuple[dict[str, Any], list[str]]:
    """Tokens and voxels of one optimiser step, where they were counted, and the lines that derive them."""
    derived: dict[str, Any] = {}
    lines = []
    if kinds := objective.tokens_per_sample:
        visible = batch * sum(kind.num_volumes * kind.visible for kind in kinds)
        hidden = batch * sum(kind.num_volumes * kind.hidden for kind in kinds)
        derived["tokens_per_step"] = {"visible": visible, "hidden": hidden}
        terms = [
            f"{kind.num_volumes} {kind.name} x ({kind.visible:,} visible"
            + (f" + {kind.hidden:,} hidden)" if kind.hidden else ")")
            for kind in kinds
        ]
        total = f"{visible + hidden:,} ({visible:,} visible, {hidden:,} hidden)"
        lines.append(f"tokens per step {total} = {number_of(batch, 'sample')} x ({' + '.join(terms)})")
    voxels: int | None = getattr(source, "voxels_per_sample", None)
    if voxels is not None:
        derived["voxels_per_step"] = batch * voxels
        samples = number_of(batch, "sample")
        lines.append(f"voxels read per step {batch * voxels:,} = {samples} x {voxels:,} (those of the first one)")
    return derived, lines
