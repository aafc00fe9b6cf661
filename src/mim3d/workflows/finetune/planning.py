"""The plan of a data set that nobody described: made before a run begins, said with its reasons, taken back edited."""

import functools
import hashlib
import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

from mim3d.backbones import BACKBONES, Backbone
from mim3d.caching.cache import Cache
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.resources import num_cores
from mim3d.core.run_folder import Run, is_first_process
from mim3d.core.settings import build_settings, read_yaml, to_mapping, to_named, write_yaml
from mim3d.core.types import Triple
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.splits import Split
from mim3d.planning.fingerprint import (
    DEFAULT_VOXEL_SCANS,
    DatasetFingerprint,
    cached_sources,
    file_sources,
    fingerprint_key,
    fingerprint_of,
)
from mim3d.planning.plan import (
    FILLED_SHARE,
    MIN_BATCH,
    FixedChoices,
    Plan,
    describe_intensity,
    plan_dataset,
    plan_spacing,
    shapes_at,
)
from mim3d.tasks import TASKS
from mim3d.tasks.augmentation import sided_labels
from mim3d.tasks.contract import CropTask, Task
from mim3d.training.memory import StepMemory, can_be_known, usable_bytes
from mim3d.workflows.finetune.schedules import optimisation
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.initialisation import Initialisation
from mim3d.workflows.shared.memory import ScanOutline

#: File of a run that holds its plan.
PLAN_NAME = "plan.yaml"

#: File of a run that holds what the plan follows from.
FINGERPRINT_NAME = "fingerprint.json"

#: Settings that are worth a look at the data where one of them is open; the spacing alone is not.
PLANNED = ("intensity", "patch_size", "batch_size", "max_steps")

#: Settings that the memory of a step depends on besides.
MEMORY_SETTINGS = ("precision", "memory_limit", "accumulation", "devices", "num_nodes")

#: How long the other processes of a run wait for the plan of the first one, seconds.
PATIENCE_S = 1800.0


@dataclass(frozen=True)
class PlannedRun:
    """What came of planning.

    Attributes:
        settings: Settings with what was open filled in: ``spacing_mm``, ``intensity``, ``task``, ``batch_size`` and
            ``max_steps``. An encoder's own intensities stay None there, since :class:`Initialisation` applies them.
        task: The task of those settings.
        plan: The plan; None where nothing was left to plan.
        fingerprint: What the plan follows from; None where it was not looked for.
    """

    settings: FinetuneSettings
    task: Task
    plan: Plan | None = None
    fingerprint: DatasetFingerprint | None = None


def plan_finetuning(
    source: CaseSet | Cache,
    split: Split,
    initial: Initialisation,
    settings: FinetuneSettings,
    task: Task,
) -> PlannedRun:
    """Fill in what the user left open, from the data, and print every choice with its reason.

    Whatever is given wins: the settings (a preset's among them), then the plan in the file ``plan``, then the card of
    the encoder, then the plan made here. Nothing is written: ``save_plan`` does that once there is a run. The headers
    of all cases are read and the voxels of some to train on; held-out labels are never looked at.

    Args:
        source: The data set or cache.
        split: The cases to train and validate on.
        initial: The encoder's settings and card.
        settings: Settings of fine-tuning; ``plan`` may name a file. The plan of a run that is resumed is taken from
            its folder ``out``.
        task: The task of those settings.

    Raises:
        ConfigError: A plan file with unknown keys or impossible values, or a patch that does not fit the encoder.
        DataError: No scan can be used.
    """
    if not isinstance(task, CropTask):
        return _planned(settings, task.checked(initial.recipe))
    if settings.plan is not None:
        plan = read_plan(settings.plan)
        say(f"plan: {settings.plan}")
        return _filled(settings, task, initial, plan, fixed_choices(source, task, settings))
    decided = fixed_choices(source, task, settings, initial)
    if all(name in decided.values for name in PLANNED):
        return _planned(settings, task.checked(initial.recipe))
    cases = [*split.train, *split.val]
    if isinstance(source, Cache):
        sources = cached_sources(source.subset(cases), task.ignore_label)
    else:
        sources = file_sources(cases, source.label_values, task.ignore_label)
    learned = tuple(case.id for case in split.train)
    # No voxel is looked at where no open setting follows from voxels.
    num_scans = 0 if {"intensity", "patch_size"} <= decided.values.keys() else DEFAULT_VOXEL_SCANS
    files_key = fingerprint_key(sources, learned, num_scans, settings.seed)
    # All that a plan depends on but the memory that happens to be free.
    content = {
        "fingerprint": files_key,
        "backbone": to_named(initial.recipe, BACKBONES),
        "task": to_mapping(task),
        "decided": to_mapping(decided),
        **{name: getattr(settings, name) for name in MEMORY_SETTINGS},
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    found = _plan_of_run(key, settings)
    if found is not None:
        say(f"plan: {Path(settings.out) / PLAN_NAME}")
        return _filled(settings, task, initial, found, decided)
    # The run has it where it looked at these very files before.
    fingerprint = DatasetFingerprint.load(Path(settings.out) / FINGERPRINT_NAME, files_key)
    if fingerprint is None:
        num_voxel_scans = min(num_scans, len(learned))
        voxels = f" and the voxels of {num_voxel_scans} to train on" if num_voxel_scans else ""
        say(f"planning from the headers of {number_of(len(sources), 'scan')}{voxels}")
        fingerprint = fingerprint_of(
            sources,
            source.labels,
            learned=learned,
            num_voxel_scans=num_scans,
            seed=settings.seed,
            num_workers=num_cores() if settings.num_workers is None else max(1, settings.num_workers),
        )
    plan = replace(_make_plan(fingerprint, source, split, initial, task, settings, decided), made_for=key)
    for line in describe_plan(plan) if settings.verbose else plan_in_short(plan):
        say(line)
    return replace(_filled(settings, task, initial, plan, decided), fingerprint=fingerprint)


def _make_plan(
    fingerprint: DatasetFingerprint,
    source: CaseSet | Cache,
    split: Split,
    initial: Initialisation,
    task: CropTask,
    settings: FinetuneSettings,
    decided: FixedChoices,
) -> Plan:
    """The plan for a data set and an encoder, within the memory that training may use."""
    spacing_mm = decided.values["spacing_mm"] if "spacing_mm" in decided.values else plan_spacing(fingerprint.scans)[0]
    held_out = {case.id for case in split.val}
    shapes = shapes_at([grid for grid in fingerprint.scans if grid.id in held_out], spacing_mm)
    labels = source.label_values
    if not labels:
        # As found in the scans looked into and named in the task.
        found = {facts.value: facts.name for facts in fingerprint.classes} or {1: "1"}
        labels = {0: "background", **{value: str(value) for value in task.named_values}, **found}
    plan = plan_dataset(
        fingerprint,
        multiple=initial.recipe.input_multiple,
        num_training=len(split.train),
        memory=training_memory(task, initial.recipe, labels, settings, shapes),
        micro_batches=settings.accumulation * (settings.devices or 1) * (settings.num_nodes or 1),
        fixed=decided,
    )
    # Also along which axes crops may be mirrored and turned, and why.
    spacing_mm = plan.spacing_mm
    if spacing_mm is None:
        x, y, z = (float(median(grid.spacing_mm[axis] for grid in fingerprint.scans)) for axis in range(3))
        spacing_mm = (x, y, z)
    structures = task.named_structures(labels)
    augmentation = task.augmentation.planned(structures, spacing_mm)
    sided = [f"{'XYZ'[axis]} ('{names[0]}')" for axis in range(3) if (names := sided_labels(structures, axis))]
    flips = f"labels name a side of {', '.join(sided)}" if sided else "no label names a side"
    turns = f"voxels of {' x '.join(f'{value:.4g}' for value in spacing_mm)} mm"
    if not all(augmentation.rotation_degrees or ()):
        turns += ": turned only where both axes are about as fine"
    return replace(
        plan,
        flip_axes=augmentation.flip_axes,
        rotation_degrees=augmentation.rotation_degrees,
        reasons={"flip_axes": flips, "rotation_degrees": turns, **plan.reasons},
    )


def read_plan(path: str | Path) -> Plan:
    """A plan from YAML, as ``save_plan`` wrote it or edited since; settings that are left out are not planned.

    Raises:
        ConfigError: No such file, unknown keys (the nearest known one is named) or impossible values.
    """
    try:
        return build_settings(Plan, read_yaml(path), str(path))
    except ConfigError as error:
        sentence = str(error)
        raise ConfigError(sentence if str(path) in sentence else f"{path}: {sentence}") from error


def save_plan(run: Run, planned: PlannedRun) -> None:
    """Write ``plan.yaml`` and ``fingerprint.json`` into a run, and note the plan in its manifest."""
    if planned.plan is None or not run.writes:
        return
    if planned.fingerprint is not None:
        planned.fingerprint.save(run.path / FINGERPRINT_NAME)
    run.note({"plan": planned.plan})
    # Last, since other processes wait for it.
    write_yaml(run.path / PLAN_NAME, to_mapping(planned.plan))


def _planned(settings: FinetuneSettings, task: Task, plan: Plan | None = None) -> PlannedRun:
    """Settings in which nothing is open."""
    batch_size = settings.batch_size or MIN_BATCH
    return PlannedRun(replace(settings, plan=None, batch_size=batch_size, task=to_named(task, TASKS)), task, plan)


def fixed_choices(
    source: CaseSet | Cache, task: CropTask, settings: FinetuneSettings, initial: Initialisation | None = None
) -> FixedChoices:
    """What is decided before planning: by the data where they are a cache, by the settings, or else by the encoder."""
    asked = settings.task
    own = to_mapping(task) if not isinstance(asked, (str, Mapping)) else {} if isinstance(asked, str) else asked
    given = {
        **{name: getattr(settings, name) for name in ("spacing_mm", "intensity", "batch_size", "max_steps")},
        "patch_size": task.patch_size,
        "positive_ratio": None if own.get("positive_ratio") is None else task.positive_ratio,
        "flip_axes": task.augmentation.flip_axes,
        "rotation_degrees": task.augmentation.rotation_degrees,
    }
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    by = dict.fromkeys(values, "given")
    if isinstance(source, Cache):
        values["spacing_mm"], by["spacing_mm"] = source.preprocessing.spacing_mm, "of the cache"
    if settings.max_epochs is not None:
        values["max_steps"], by["max_steps"] = None, f"max_epochs {settings.max_epochs} given"
    if initial is not None:
        for name, value in (("spacing_mm", initial.own_spacing_mm), ("intensity", initial.own_intensity)):
            if value is not None and name not in values:
                values[name], by[name] = value, "of the encoder"
    return FixedChoices(values=values, by=by)


def _filled(
    settings: FinetuneSettings, task: CropTask, initial: Initialisation, plan: Plan, decided: FixedChoices
) -> PlannedRun:
    """Settings with the plan's values where nothing else was decided; the encoder's spacing is written out too."""

    def is_open(name: str) -> bool:
        return name not in decided.values or decided.by[name] == "of the encoder"

    augmentation = task.augmentation
    for name in ("flip_axes", "rotation_degrees"):
        if is_open(name):
            augmentation = replace(augmentation, **{name: getattr(plan, name)})
    changes: dict[str, Any] = {"augmentation": augmentation}
    for name in ("patch_size", "positive_ratio"):
        if is_open(name) and getattr(plan, name) is not None:
            changes[name] = getattr(plan, name)
    filled = replace(
        settings,
        spacing_mm=plan.spacing_mm if is_open("spacing_mm") else settings.spacing_mm,
        intensity=settings.intensity if "intensity" in decided.values else plan.intensity,
        batch_size=settings.batch_size or plan.batch_size,
        max_steps=plan.max_steps if is_open("max_steps") else settings.max_steps,
    )
    return _planned(filled, replace(task, **changes).checked(initial.recipe), plan)


def _plan_of_run(key: str, settings: FinetuneSettings) -> Plan | None:
    """The plan that a run has already: one that is resumed, or that several processes share; None to make one."""
    path = Path(settings.out) / PLAN_NAME
    if is_first_process():
        plan = read_plan(path) if path.is_file() else None
        several = (settings.devices or 1) * (settings.num_nodes or 1) > 1
        return plan if plan and (settings.resume or (several and plan.made_for == key)) else None
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        plan = read_plan(path) if path.is_file() else None
        if plan is not None and (plan.made_for == key or settings.resume):
            return plan
        time.sleep(0.5)
    raise ConfigError(
        f"{path} did not come from the first process within {PATIENCE_S / 60:.0f} minutes; see what it says, and make "
        "sure that all processes see the folder of the run."
    )


def describe_plan(plan: Plan) -> list[str]:
    """Lines of a table: setting, value, and what it follows from."""
    rows = _rows(plan)
    width = max(len(value) for _, value in rows)
    room = max(40, shutil.get_terminal_size((120, 24)).columns - width - 22)
    lines = [f"plan (change it in the run's {PLAN_NAME} and give that back with --plan, or by flags):"]
    for name, value in rows:
        first, *more = textwrap.wrap(plan.reasons.get(name, ""), room) or [""]
        lines.append(f"  {name:16}  {value:{width}}  {first}".rstrip())
        lines += [" " * (22 + width) + part for part in more]
    return lines


def plan_in_short(plan: Plan) -> list[str]:
    """The same settings and values as two lines, without what they follow from."""
    settings = ", ".join(f"{name} {value}" for name, value in _rows(plan))
    return [f"plan: {settings}", f"      (why: the run's {PLAN_NAME}, or --verbose true; change it by flags or --plan)"]


def _rows(plan: Plan) -> list[tuple[str, str]]:
    """Settings and values, for people."""
    return [
        ("spacing_mm", "of each scan" if plan.spacing_mm is None else _numbers(plan.spacing_mm)),
        ("intensity", describe_intensity(plan.intensity)),
        ("patch_size", _numbers(plan.patch_size)),
        ("batch_size", _numbers([plan.batch_size])),
        ("max_steps", _numbers([plan.max_steps])),
        ("positive_ratio", _numbers([plan.positive_ratio])),
        ("flip_axes", ", ".join("XYZ"[axis] for axis in plan.flip_axes or ()) or "none"),
        ("rotation_degrees", _numbers(plan.rotation_degrees)),
    ]


def _numbers(values: Sequence[float | None] | None) -> str:
    if values is None or None in values:
        return "default"
    return " ".join(f"{value:g}" for value in values)


@dataclass
class TrainingMemory:
    """What training needs, from dry runs on fake tensors.

    Attributes:
        usable_bytes: Bytes that training may take.
        accumulation: Micro-batches of a step.
        steps: Gives the memory of steps with patches of a size.
    """

    usable_bytes: int
    accumulation: int
    steps: Callable[[Triple], StepMemory]

    def need_bytes(self, patch_size: Triple, batch_size: int) -> int:
        """Bytes of a step, or of a validation on the CPU where that takes more."""
        step = self.steps(patch_size)
        try:
            need = step.need(batch_size, self.accumulation).total
            # Validation's network takes no more than a step, so that most often nothing has to be asked about it.
            if need + step.scores_bytes > FILLED_SHARE * self.usable_bytes:
                need = step.most_bytes(batch_size, self.accumulation)
        except Mim3dError:
            raise
        except Exception:
            # A backbone of the user's own may look at values, which fake tensors do not have; it may train all the
            # same.
            return 0
        return need


def training_memory(
    task: CropTask,
    recipe: Backbone,
    labels: Mapping[int, str],
    settings: FinetuneSettings,
    held_out: Sequence[Triple],
) -> TrainingMemory | None:
    """Answers about memory; None where the user wants no check or nothing can be known.

    Args:
        task: The task as asked for.
        recipe: Settings of the encoder.
        labels: Label value -> name.
        settings: Settings of fine-tuning; the task fills in what its optimiser leaves open.
        held_out: Voxels of each scan to validate on.
    """
    loop = settings.loop(1)
    if settings.memory_limit == 0 or not can_be_known(loop):
        return None
    usable = usable_bytes(loop, None if settings.memory_limit is None else int(settings.memory_limit * 2**30))
    if usable is None:
        return None
    largest = [cast(CachedScan, ScanOutline(shape)) for shape in sorted(held_out, key=math.prod)[-1:]]
    scores_bytes = task.validation_bytes(largest, labels)
    optim = optimisation(settings, task)

    # Each patch is asked about several times.
    @functools.cache
    def steps(patch_size: Triple) -> StepMemory:
        import torch

        sample = {
            "image": ((1, recipe.in_channels, *patch_size), torch.float32),
            "label": ((1, *patch_size), torch.int64),
        }
        return StepMemory(lambda: task.build(recipe, labels), sample, loop, optim, scores_bytes)

    return TrainingMemory(usable, settings.accumulation, steps)
