"""The budget of a comparison in steps, and the time that cells will take: from those that are finished, or measured."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.core.errors import ConfigError
from mim3d.core.files import load_json, write_json
from mim3d.core.progress import say
from mim3d.core.run_folder import read_run
from mim3d.core.settings import to_mapping, to_named
from mim3d.workflows.compare.arm_cells import finetuning_of, pretraining_of
from mim3d.workflows.compare.arms import Arm
from mim3d.workflows.compare.cells import Cell, Kind, left_of, read_result, samples_per_step
from mim3d.workflows.compare.plan import ComparisonPlan, quietly
from mim3d.workflows.finetune.run import finetune_once
from mim3d.workflows.pretrain import PretrainSettings, run_pretraining

#: Steps that are measured, of which the first ones warm up and do not count.
MEASURED_STEPS = 8
WARM_UP_STEPS = 3


def steps_of(plan: ComparisonPlan) -> dict[str, int]:
    """Steps of each kind and arm, by ``KIND ARM``; minutes are turned into steps, once, and recorded.

    Raises:
        ConfigError: No budget is given.
    """
    found: dict[str, int] = {}
    for arm in plan.arms:
        if arm.method is not None:
            found[f"pretrain {arm.name}"] = _steps(plan, "pretrain", arm, None)
        found[f"finetune {arm.name}"] = _steps(plan, "finetune", arm, plan.finetune.max_steps)
    return found


def _steps(plan: ComparisonPlan, kind: Kind, arm: Arm, planned: int | None) -> int:
    given = plan.settings
    steps, minutes = getattr(given, f"{kind}_steps"), getattr(given, f"{kind}_minutes")
    recipe = getattr(given, kind) or {}
    if steps is not None:
        return int(steps)
    if minutes is not None:
        return max(1, int(60 * minutes / seconds_per_step(plan, kind, arm)))
    if recipe.get("max_steps") is not None:
        return int(recipe["max_steps"])
    if planned is None or recipe.get("max_epochs") is not None:
        what = "fine-tuning" if kind == "finetune" else "pre-training"
        raise ConfigError(
            f"The budget of {what} is open; give --{kind}_steps, or --{kind}_minutes for each run on this machine."
        )
    return planned


def seconds_per_step(plan: ComparisonPlan, kind: Kind, arm: Arm) -> float:
    """Seconds of a step of an arm on this machine, measured on a few steps once and recorded in OUT/measured.

    Fine-tuning is measured from scratch: arms on one network have the same steps, whatever they begin with.
    """
    split = plan.folds[0].labelled(plan.amounts[-1], plan.settings.seeds[0])
    if kind == "pretrain":
        settings: Any = pretraining_of(plan, arm, 0)
    else:
        scratch = replace(arm, method=None, weights=None, backbone=to_named(arm.recipe(), BACKBONES))
        settings = finetuning_of(plan, scratch, 0)
    values = {name: value for name, value in to_mapping(settings).items() if name not in ("out", "data")}
    key = hashlib.sha256(json.dumps([kind, values, plan.cache.digest], sort_keys=True).encode()).hexdigest()[:10]
    path = plan.out / "measured" / f"{kind}_{key}.json"
    if path.is_file():
        return float(load_json(path)["seconds_per_step"])
    say(f"measuring {MEASURED_STEPS} steps: {kind} {arm.name}")
    folder = plan.out / "measured" / f"{kind}_{key}_{os.getpid()}"  # Another process may measure the same.
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    learned = folder.with_suffix(".train_list.txt")
    if kind == "finetune":
        learned.write_text("".join(f"{case.id}\n" for case in split.train), encoding="utf-8")
        settings = replace(settings, train_list=str(learned), fold=None, patience=None)
    settings = replace(settings, out=str(folder), max_steps=MEASURED_STEPS, log_every=1, resume=False)
    with quietly():
        if isinstance(settings, PretrainSettings):
            run_pretraining(settings)
        else:
            finetune_once(settings)
    seconds = measured(folder)
    write_json(path, {"seconds_per_step": seconds, "steps": MEASURED_STEPS, "kind": kind, "arm": arm.name})
    learned.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    return seconds


def measured(folder: Path) -> float:
    """Seconds of a step in a run that logged every step: the median without the first ones, and without pauses."""
    run = read_run(folder)
    rates = [line["samples_per_s"] for line in run.metrics[WARM_UP_STEPS:] if line.get("samples_per_s")]
    return samples_per_step(run) / median(rates) if rates else 1.0


def say_cells(plan: ComparisonPlan) -> None:
    """Print every cell, what has become of it, and the time that those which are left will take."""
    times = [expected_s(plan, cell) for cell in plan.cells]
    left_s = 0.0
    left = {cell.id for cell in left_of(plan.out, plan.cells)}
    for cell, (seconds, basis) in zip(plan.cells, times, strict=True):
        if cell.id not in left:
            say(f"{cell.id}: done")
            continue
        result = read_result(plan.out, cell)
        state = "missed" if result is not None and result["status"] != "done" else "to do"
        left_s += seconds
        say(f"{cell.id}: {state}, about {in_time(seconds)} ({basis})")
    say(f"{len(plan.cells)} cells, about {in_time(left_s)} of work left, one after the other")


def expected_s(plan: ComparisonPlan, cell: Cell) -> tuple[float, str]:
    """Seconds that a cell will take, and what that follows from."""
    alike = [
        result["total_s"]
        for other in plan.cells
        if (other.kind, other.arm) == (cell.kind, cell.arm)
        and (result := read_result(plan.out, other)) is not None
        and result["status"] == "done"
        and result.get("total_s")
    ]
    if alike:
        return median(alike), f"as {len(alike)} finished of the same arm"
    if cell.kind == "probe":
        return 60.0, "a guess"
    arm = next(arm for arm in plan.arms if arm.name == cell.arm)
    seconds = seconds_per_step(plan, cell.kind, arm) * (cell.settings.max_steps or 0)  # type: ignore[union-attr]
    return seconds, f"training alone, measured on {MEASURED_STEPS} steps"


def in_time(seconds: float) -> str:
    """A time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
