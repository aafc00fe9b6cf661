"""The plan of a data set that nobody described: made before a run begins, said with its reasons, taken back edited."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError
from mim3d.core.resources import num_cores
from mim3d.core.run_folder import Run, is_first_process
from mim3d.core.settings import build_settings, read_yaml, to_mapping, to_named, write_yaml
from mim3d.core.types import Spacing
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.splits import Split
from mim3d.planning.fingerprint import (
    DEFAULT_VOXEL_SCANS,
    DatasetFingerprint,
    fingerprint_key,
    fingerprint_of,
)
from mim3d.planning.patch import MIN_BATCH
from mim3d.planning.plan import Decided, Plan, plan_dataset, plan_spacing, shapes_at
from mim3d.planning.scans import ScanSource, cached_sources, file_sources
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.segmentation.augmentation import sided_labels
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.workflows.finetune.planning_memory import training_memory
from mim3d.workflows.finetune.planning_table import PLAN_NAME, describe_plan
from mim3d.workflows.finetune.start import Start
from mim3d.workflows.shared.training import Training

__all__ = ["FINGERPRINT_NAME", "PLAN_NAME", "Planned", "make_plan", "plan_finetuning", "read_plan", "save_plan"]

FINGERPRINT_NAME = "fingerprint.json"

#: Settings that are worth a look at the data where one of them is open; the spacing alone is not.
PLANNED = ("intensity", "patch_size", "batch_size", "max_steps")

#: How long the other processes of a run wait for the plan of the first one, seconds.
PATIENCE_S = 1800.0


@dataclass(frozen=True)
class Planned:
    """What came of planning.

    Attributes:
        arguments: of the command, with what was open filled in: ``spacing_mm``, ``intensity``, ``task``, ``batch_size``
            and ``max_steps``. An encoder's own intensities stay None there, since :class:`Start` sees to them.
        plan: the plan; None where nothing was left to plan.
        fingerprint: what the plan follows from; None where it was not looked for.
    """

    arguments: dict[str, Any]
    plan: Plan | None = None
    fingerprint: DatasetFingerprint | None = None


def plan_finetuning(
    source: CaseSet | Cache,
    split: Split,
    start: Start,
    arguments: Mapping[str, Any],
    run_dir: str | Path | None = None,
) -> Planned:
    """Fill in what the user left open, from the data, and print every choice with its reason.

    Whatever is given wins: the command's arguments (a preset's among them), then the plan in the file ``plan``, then
    the card of the encoder, then the plan made here. Nothing is written: ``save_plan`` does that once there is a run.
    The headers of all cases are read and the voxels of some to train on; held-out labels are never looked at.

    Args:
        source: the data set or cache.
        split: the cases to train and validate on.
        start: the encoder's settings and card.
        arguments: of ``finetune``, by name; ``plan`` may name a file.
        run_dir: folder of the run, whether or not it is there: the plan of a run that is resumed is taken from it.

    Raises:
        ConfigError: a plan file with unknown keys or impossible values, or a patch that does not fit the encoder.
        DataError: no scan can be used.
    """
    asked = create_task(arguments["task"])
    filled = {**arguments, "plan": None}
    if not isinstance(asked, Segmentation):
        return Planned({**filled, "batch_size": arguments.get("batch_size") or MIN_BATCH})
    given = _given(source, asked, arguments)
    if arguments.get("plan") is not None:
        plan = read_plan(arguments["plan"])
        _print(f"plan: {arguments['plan']}")
        return Planned(_filled(filled, asked, start, plan, given), plan)
    decided = _with_encoder(given, start)
    if all(name in decided.values for name in PLANNED):
        return Planned(filled)
    sources = _sources(source, split, asked)
    looks = _Looks.of(split, decided, arguments)
    key = _key(sources, looks, start, asked, decided, arguments)
    found = _plan_of_run(run_dir, key, arguments)
    if found is not None:
        _print(f"plan: {Path(run_dir or '') / PLAN_NAME}")
        return Planned(_filled(filled, asked, start, found, decided), found)
    fingerprint = _fingerprint(sources, source, looks, arguments, run_dir)
    plan = replace(make_plan(fingerprint, source, split, start, asked, arguments, decided), made_for=key)
    for line in describe_plan(plan):
        _print(line)
    return Planned(_filled(filled, asked, start, plan, decided), plan, fingerprint)


def make_plan(
    fingerprint: DatasetFingerprint,
    source: CaseSet | Cache,
    split: Split,
    start: Start,
    asked: Segmentation,
    arguments: Mapping[str, Any],
    decided: Decided,
) -> Plan:
    """The plan for a data set and an encoder, within the memory that training may use.

    Args:
        fingerprint: of the data set.
        source: the data set or cache, for its labels.
        split: the cases to train and validate on.
        start: the encoder's settings.
        asked: the task as asked for.
        arguments: of ``finetune``, by name.
        decided: what is not open.
    """
    training = Training.of({**arguments, "batch_size": arguments.get("batch_size") or MIN_BATCH})
    spacing_mm = decided.values["spacing_mm"] if "spacing_mm" in decided.values else plan_spacing(fingerprint.scans)[0]
    held_out = {case.id for case in split.val}
    shapes = shapes_at([grid for grid in fingerprint.scans if grid.id in held_out], spacing_mm)
    labels = _labels(source, fingerprint, asked)
    plan = plan_dataset(
        fingerprint,
        token_edge=start.recipe.patch_size,
        num_training=len(split.train),
        memory=training_memory(asked, start.recipe, labels, training, arguments.get("optim"), shapes),
        num_together=training.accumulation * training.devices * training.num_nodes,
        decided=decided,
    )
    return _with_augmentation(plan, asked, labels, fingerprint)


def read_plan(path: str | Path) -> Plan:
    """A plan from YAML, as ``save_plan`` wrote it or edited since; settings that are left out are not planned.

    Raises:
        ConfigError: no such file, unknown keys (the nearest known one is named) or impossible values.
    """
    try:
        return build_settings(Plan, read_yaml(path), str(path))
    except ConfigError as error:
        told = str(error)
        raise ConfigError(told if str(path) in told else f"{path}: {told}") from error


def save_plan(run: Run, planned: Planned) -> None:
    """Write ``plan.yaml`` and ``fingerprint.json`` into a run, and note the plan in its manifest."""
    if planned.plan is None or not run.writes:
        return
    if planned.fingerprint is not None:
        planned.fingerprint.save(run.path / FINGERPRINT_NAME)
    run.note({"plan": planned.plan})
    # Last, since other processes wait for it.
    write_yaml(run.path / PLAN_NAME, to_mapping(planned.plan))


def _given(source: CaseSet | Cache, asked: Segmentation, arguments: Mapping[str, Any]) -> Decided:
    """What the arguments decide, and the data where they are a cache."""
    known: dict[str, tuple[Any, str]] = {}
    if isinstance(source, Cache):
        known["spacing_mm"] = source.preprocessing.spacing_mm, "of the cache"
    task = arguments["task"]
    own = to_mapping(asked) if not isinstance(task, (str, Mapping)) else {} if isinstance(task, str) else task
    values = {
        **{name: arguments.get(name) for name in ("spacing_mm", "intensity", "batch_size", "max_steps")},
        "patch_size": asked.patch_size,
        "positive_ratio": None if own.get("positive_ratio") is None else asked.positive_ratio,
        "flip_axes": asked.augmentation.flip_axes,
        "rotation_degrees": asked.augmentation.rotation_degrees,
    }
    for name, value in values.items():
        if value is not None and name not in known:
            known[name] = value, "given"
    if arguments.get("max_epochs") is not None:
        known["max_steps"] = None, f"max_epochs {arguments['max_epochs']} given"
    return _decided(known)


def _with_encoder(given: Decided, start: Start) -> Decided:
    """Also what the encoder learned from, where nothing else is given."""
    known = {name: (value, given.by[name]) for name, value in given.values.items()}
    spacing_mm = start.card.get("spacing_mm")
    if spacing_mm is not None and "spacing_mm" not in known:
        x, y, z = (float(value) for value in spacing_mm)
        known["spacing_mm"] = (x, y, z), "of the encoder"
    if "intensity" in start.card and "intensity" not in known:
        own = build_settings(Intensity, start.card["intensity"], "intensity of the weights' card")
        known["intensity"] = own, "of the encoder"
    return _decided(known)


def _decided(known: Mapping[str, tuple[Any, str]]) -> Decided:
    return Decided(
        values={name: value for name, (value, _) in known.items()}, by={name: by for name, (_, by) in known.items()}
    )


def _filled(
    arguments: Mapping[str, Any], asked: Segmentation, start: Start, plan: Plan, decided: Decided
) -> dict[str, Any]:
    """The arguments with the plan's values where nothing else was decided; the encoder's spacing is written out too."""
    filled = dict(arguments)

    def is_open(name: str) -> bool:
        return name not in decided.values or decided.by[name] == "of the encoder"

    if is_open("spacing_mm"):
        filled["spacing_mm"] = plan.spacing_mm
    if "intensity" not in decided.values:
        filled["intensity"] = plan.intensity
    filled["batch_size"] = arguments.get("batch_size") or plan.batch_size or MIN_BATCH
    if is_open("max_steps"):
        filled["max_steps"] = plan.max_steps
    augmentation = asked.augmentation
    for name in ("flip_axes", "rotation_degrees"):
        if is_open(name):
            augmentation = replace(augmentation, **{name: getattr(plan, name)})
    changes: dict[str, Any] = {"augmentation": augmentation}
    for name in ("patch_size", "positive_ratio"):
        if is_open(name) and getattr(plan, name) is not None:
            changes[name] = getattr(plan, name)
    task = replace(asked, **changes).checked(start.recipe)
    return {**filled, "task": to_named(task, TASKS)}


def _sources(source: CaseSet | Cache, split: Split, asked: Segmentation) -> list[ScanSource]:
    cases = [*split.train, *split.val]
    if isinstance(source, Cache):
        return cached_sources(source.subset(cases), asked.ignore_label)
    return file_sources(cases, source.labels, asked.ignore_label)


@dataclass(frozen=True)
class _Looks:
    """Which scans are looked into.

    Attributes:
        learned: ids of the scans that may be: those trained on.
        num_scans: as many of them; 0 where no open setting follows from voxels.
        seed: of their draw.
    """

    learned: tuple[str, ...]
    num_scans: int
    seed: int

    @classmethod
    def of(cls, split: Split, decided: Decided, arguments: Mapping[str, Any]) -> "_Looks":
        from_headers = {"intensity", "patch_size"} <= decided.values.keys()
        return cls(
            learned=tuple(case.id for case in split.train),
            num_scans=0 if from_headers else DEFAULT_VOXEL_SCANS,
            seed=int(arguments.get("seed") or 0),
        )

    def key(self, sources: Sequence[ScanSource]) -> str:
        return fingerprint_key(sources, self.learned, self.num_scans, self.seed)


def _key(
    sources: Sequence[ScanSource],
    looks: _Looks,
    start: Start,
    asked: Segmentation,
    decided: Decided,
    arguments: Mapping[str, Any],
) -> str:
    """Digest of all that a plan depends on but the memory that happens to be free."""
    content = {
        "fingerprint": looks.key(sources),
        "backbone": to_named(start.recipe, BACKBONES),
        "task": to_mapping(asked),
        "decided": to_mapping(decided),
        **{name: arguments.get(name) for name in ("memory_limit", "accumulation", "devices", "num_nodes")},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _plan_of_run(run_dir: str | Path | None, key: str, arguments: Mapping[str, Any]) -> Plan | None:
    """The plan that a run has already: one that is resumed, or that several processes share; None to make one."""
    if run_dir is None:
        return None
    path = Path(run_dir) / PLAN_NAME
    if is_first_process():
        plan = read_plan(path) if path.is_file() else None
        several = int(arguments.get("devices") or 1) * int(arguments.get("num_nodes") or 1) > 1
        return plan if plan and (arguments.get("resume") or (several and plan.made_for == key)) else None
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        plan = read_plan(path) if path.is_file() else None
        if plan is not None and (plan.made_for == key or arguments.get("resume")):
            return plan
        time.sleep(0.5)
    raise ConfigError(
        f"{path} did not come from the first process within {PATIENCE_S / 60:.0f} minutes; see what it says, and make "
        "sure that all processes see the folder of the run."
    )


def _fingerprint(
    sources: Sequence[ScanSource],
    source: CaseSet | Cache,
    looks: _Looks,
    arguments: Mapping[str, Any],
    run_dir: str | Path | None,
) -> DatasetFingerprint:
    """From the run where it has one of these very files, else made now."""
    if run_dir is not None:
        known = DatasetFingerprint.load(Path(run_dir) / FINGERPRINT_NAME, looks.key(sources))
        if known is not None:
            return known
    num_voxel_scans = min(looks.num_scans, len(looks.learned))
    voxels = f" and the voxels of {num_voxel_scans} to train on" if num_voxel_scans else ""
    _print(f"planning from the headers of {len(sources)} scans{voxels}")
    workers = arguments.get("num_workers")
    return fingerprint_of(
        sources,
        source.labels,
        learned=looks.learned,
        num_voxel_scans=looks.num_scans,
        seed=looks.seed,
        num_workers=num_cores() if workers is None else max(1, int(workers)),
    )


def _labels(source: CaseSet | Cache, fingerprint: DatasetFingerprint, asked: Segmentation) -> dict[int, str]:
    """Label value -> name: as declared, else as found in the scans looked into and named in the task."""
    if source.labels:
        return dict(source.labels)
    labels = {facts.value: facts.name for facts in fingerprint.classes}
    named = [value for values in (asked.regions or {}).values() for value in values]
    named += [] if asked.ignore_label is None else [asked.ignore_label]
    return {0: "background", **{value: str(value) for value in named}, **(labels or {1: "1"})}


def _with_augmentation(
    plan: Plan, asked: Segmentation, labels: Mapping[int, str], fingerprint: DatasetFingerprint
) -> Plan:
    """Also along which axes crops may be mirrored and turned, and why."""
    spacing_mm = plan.spacing_mm or _median_spacing(fingerprint)
    structures = asked.named_structures(labels)
    augmentation = asked.augmentation.planned(structures, spacing_mm)
    sided = [f"{'XYZ'[axis]} ('{names[0]}')" for axis in range(3) if (names := sided_labels(structures, axis))]
    flips = f"labels name a side of {', '.join(sided)}" if sided else "no label names a side"
    voxel = " x ".join(f"{value:.4g}" for value in spacing_mm)
    turns = f"voxels of {voxel} mm" + (
        "" if all(augmentation.rotation_degrees or ()) else ": turned only where both axes are about as fine"
    )
    reasons = {"flip_axes": flips, "rotation_degrees": turns, **plan.reasons}
    return replace(
        plan,
        flip_axes=augmentation.flip_axes,
        rotation_degrees=augmentation.rotation_degrees,
        reasons=reasons,
    )


def _median_spacing(fingerprint: DatasetFingerprint) -> Spacing:
    from statistics import median

    x, y, z = (float(median(grid.spacing_mm[axis] for grid in fingerprint.scans)) for axis in range(3))
    return x, y, z


def _print(line: str) -> None:
    if is_first_process():
        print(line, flush=True)
