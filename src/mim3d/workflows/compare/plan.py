"""The plan of a comparison: one contract for all arms, settled once, and the cells that follow from it."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.backbones.contract import common_multiple, round_up
from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache, open_cache
from mim3d.caching.fingerprints import find_leaks
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import CheckpointError, ConfigError, DataError, listed
from mim3d.core.files import load_json, write_json
from mim3d.core.left_out import in_words
from mim3d.core.names import cut, number_of
from mim3d.core.own_code import own_code_in
from mim3d.core.progress import say
from mim3d.core.settings import build_settings, coerce, nearest, overlay, to_mapping, to_named
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.datasets.published.folds import declare_fold
from mim3d.datasets.published.presets import find_preset
from mim3d.datasets.splits import Split, declared_folds
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.contract import CropTask, Task
from mim3d.training.precision import choose_precision
from mim3d.workflows.compare.arms import Arm, read_arms
from mim3d.workflows.compare.cells import Cell
from mim3d.workflows.compare.run_cell import locked_of
from mim3d.workflows.compare.settings import CompareSettings
from mim3d.workflows.compare.subsets import Amount, FoldPart, require_distinct
from mim3d.workflows.finetune.data import TrainingData, read_training_data
from mim3d.workflows.finetune.planning import plan_finetuning
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.held_out import choose_split
from mim3d.workflows.shared.initialisation import Initialisation
from mim3d.workflows.shared.inputs import given_scans, unreadable_of
from mim3d.workflows.shared.leakage import Seen, identities_of, leaks_in_words, read_seen, unlisted

PLAN_NAME = "plan.json"
PLAN_FORMAT = 1

#: What a comparison that was stopped before it had a plan leaves in its folder.
_BEFORE_A_PLAN = {"cache", "lists", "measured"}

#: What to do about weights that learned from tested scans.
_LEAKING = "leave the arm out, or give weights that learned from none of the tested scans"

#: What is read of a plan, which somebody else may have written: entry -> type.
_PLAN: Mapping[str, Any] = {
    **dict.fromkeys(("arms", "cells"), list[dict[str, Any]]),
    **dict.fromkeys(("labels", "notes"), list[str]),
    "data": str,
    "folds": list[int],
    "num_tested": int,
    "patients": dict[str, str],
}


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """What is compared, settled.

    Attributes:
        settings: The settings, with their recipes read.
        arms: The arms.
        finetune: Fine-tuning that all arms share; what the plan of the data set gave is filled in.
        cache: The prepared scans.
        folds: The parts of each fold.
        notes: What is to be said of the data beside every table.
        cells: The cells, in the order in which they are run.
        source_digest: What the data set is known by before its scans are prepared.
        earlier: Id and content of the cells that the folder's plan of before has, by what tells them apart.
    """

    settings: CompareSettings
    arms: Sequence[Arm]
    finetune: FinetuneSettings
    cache: Cache
    folds: Sequence[FoldPart]
    notes: Sequence[str] = ()
    cells: Sequence[Cell] = ()
    source_digest: str = ""
    earlier: Mapping[Any, tuple[str, Any]] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Folder of the comparison."""
        return Path(self.settings.out)

    @property
    def amounts(self) -> list[Amount]:
        """The amounts of labels."""
        return [Amount.of(each) for each in self.settings.labels]

    @property
    def task(self) -> Task:
        """What is learned from labels."""
        return create_task(self.finetune.task)

    @property
    def shapes(self) -> list[Triple]:
        """Voxels of every prepared scan."""
        return [scan.shape for scan in self.cache]

    def save(self) -> None:
        """Write all that running a cell, or making the tables, needs to know."""
        rows = [
            {
                "name": arm.name,
                "kind": arm.kind,
                "method": None if arm.method is None else arm.method["name"],
                "weights": arm.weights,
                "backbone": to_named(arm.recipe(), BACKBONES)["name"],
            }
            for arm in self.arms
        ]
        content = {
            "format": PLAN_FORMAT,
            "data": self.settings.data,
            "data_digest": data_digest(self.cache.cases),
            "source_digest": self.source_digest,
            "cache_digest": self.cache.digest,
            "spacing_mm": self.cache.preprocessing.spacing_mm,
            "task": to_mapping(self.finetune.task),
            "finetune": to_mapping(self.finetune),
            "settled_for": settled_for(self.settings, self.arms),
            "arms": rows,
            "labels": [amount.text for amount in self.amounts],
            "folds": [fold.number for fold in self.folds],
            "num_tested": len({case.patient for fold in self.folds for case in fold.test}),
            "patients": {case.id: case.patient for fold in self.folds for case in fold.test},
            "notes": list(self.notes),
            "cells": [cell.to_row() for cell in self.cells],
        }
        write_json(self.out / PLAN_NAME, content, indent=1)


def read_plan(out: Path) -> dict[str, Any]:
    """The plan that a folder holds.

    Raises:
        ConfigError: It holds none.
    """
    content: Any = None
    try:
        content = load_json(out / PLAN_NAME)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{out} holds no plan of a comparison; give --data and --arms to make one.") from error
    if not isinstance(content, dict) or content.get("format") != PLAN_FORMAT:
        raise ConfigError(f"{out / PLAN_NAME} is no plan of this version of mim3d; choose another --out.")
    return content | {
        name: coerce(content.get(name), hint, f"{out / PLAN_NAME}: {name}") for name, hint in _PLAN.items()
    }


def cells_of(plan: Mapping[str, Any], settings: CompareSettings) -> list[Cell]:
    """The cells of a plan that was read.

    Args:
        plan: The plan.
        settings: The settings of this call, which name the code of the user's own that may be imported.

    Raises:
        ConfigError: A cell is none, or names code that the settings do not.
    """
    cells = [Cell.of_row(row).under(Path(settings.out)) for row in plan["cells"]]
    allowed = set(own_code_in(settings.to_config()).values())
    for cell in cells:
        for name, code in own_code_in(vars(cell.settings)).items():
            if code not in allowed:
                raise ConfigError(f"{PLAN_NAME}: cell {cell.id} names the {name} '{code}', which the settings do not.")
    return cells


def data_digest(cases: Sequence[Case]) -> str:
    """What a data set is known by before a voxel is read: names, patients and classes of its cases."""
    rows = sorted((case.id, case.patient, case.class_name or "", case.label is not None) for case in cases)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@contextmanager
def quietly() -> Iterator[None]:
    """Keep what the commands print from the screen of the comparison."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def settle(settings: CompareSettings) -> ComparisonPlan:
    """Read arms and data, and settle everything that all arms share; no cell is made yet.

    Raises:
        ConfigError: Settings that cannot work, two arms that are the same, or a folder of another data set.
        CheckpointError: Weights that cannot be read.
        DataError: Data that cannot be used, or too few for the amounts of labels.
    """
    if settings.data is None:
        raise ConfigError(f"{settings.out} holds no comparison to go on with; give --data and --arms.")
    before = read_plan(Path(settings.out)) if (Path(settings.out) / PLAN_NAME).is_file() else None
    if before is None and Path(settings.out).is_dir():
        others = {path.name for path in Path(settings.out).iterdir() if not path.name.startswith(".")} - _BEFORE_A_PLAN
        if others:
            raise ConfigError(
                f"{settings.out} is not empty and holds no comparison ({cut(min(others))} is there); choose another "
                "--out, or an empty folder."
            )
    finetune: dict[str, Any] = settings.finetune if isinstance(settings.finetune, dict) else {}
    asked = build_settings(
        FinetuneSettings,
        {
            **{name: value for name, value in finetune.items() if name not in ("max_steps", "max_epochs")},
            **{name: getattr(settings, name) for name in ("data", "out", "preset", "accelerator")},
            **{name: getattr(settings, name) for name in ("modality", "patient_pattern")},
            "fold": None,
        },
        "finetune",
    )
    pretrain: dict[str, Any] = settings.pretrain if isinstance(settings.pretrain, dict) else {}
    with quietly():
        read = read_training_data(asked)
    every = read.source.cases
    arms = read_arms(settings.arms, settings.backbone, pretrain.get("method"), len(every[0].images))
    if settings.reference is not None and settings.reference not in (names := [arm.name for arm in arms]):
        raise ConfigError(
            f"reference: there is no arm '{cut(settings.reference)}'.{nearest(settings.reference, names)}"
        )
    folds = _folds(settings, read)
    require_distinct(folds, [Amount.of(each) for each in settings.labels], settings.seeds, read.task)
    source_digest = data_digest(every)
    # Asked before anything is prepared, which would take the scans of the comparison out of its cache.
    _require_same(before, "source_digest", source_digest, settings)
    settled = _from_plan(before, settings, arms) or _planned(read, arms, folds[0])
    _require_same_spacing(before, settled, settings)
    cache = _cache(settings, read, settled, before)
    _require_same(before, "cache_digest", cache.digest, settings)
    folds = [fold.only({case.id for case in cache.cases}) for fold in folds]
    require_distinct(folds, [Amount.of(each) for each in settings.labels], settings.seeds, read.task)
    earlier: dict[Any, tuple[str, Any]] = {}
    if before is not None:
        # Of another version of mim3d, whose settings are not these.
        with suppress(ConfigError, DataError):
            earlier = {cell.key: (cell.id, cell.content()) for cell in cells_of(before, settings)}
    notes = [
        f"pretrain.{name} is passed over: pre-training shares that of fine-tuning, which finetune.{name} sets."
        for name in ("intensity", "precision", "spacing_mm")
        if (own := pretrain.get(name)) is not None
        and overlay(shared := to_mapping(getattr(settled, name)), to_mapping(own)) != shared
    ]
    if not any(arm.method for arm in arms):
        notes += [
            f"{name} is passed over: no arm is pre-trained here."
            for name in ("pretrain_steps", "pretrain_minutes")
            if getattr(settings, name) is not None
        ]
    if read.task.needs == "class":
        notes += [
            f"fold {fold.number}: all tested cases are of class {fold.tested_classes[0]}, so that it adds nothing to "
            "the AUC."
            for fold in folds
            if len(fold.tested_classes) == 1
        ]
    if cache.failed:
        left_out = f"left out: {in_words([row['reason'] for row in cache.failed])}"
        say(left_out)
        notes.append(f"{number_of(len(cache.failed), 'scan')} of the data set {left_out}")
    settled = replace(settled, data=cache.path, spacing_mm=None, preset=None, modality=None, patient_pattern=None)
    plan = ComparisonPlan(
        settings=settings,
        arms=arms,
        finetune=settled,
        cache=cache,
        folds=folds,
        source_digest=source_digest,
        earlier=earlier,
    )
    return replace(plan, notes=[*read.source.notes, *notes, *_leaks(plan)])


def _require_same(before: Mapping[str, Any] | None, name: str, digest: str, settings: CompareSettings) -> None:
    """Refuse other data than the folder's plan was made on, as far as it says."""
    if before is not None and before.get(name, digest) != digest:
        raise ConfigError(
            f"{settings.out} holds a comparison on other scans or labels than {settings.data} holds now "
            f"(it was made on {before['data']}); choose another --out, or restore them."
        )


def settled_for(settings: CompareSettings, arms: Sequence[Arm]) -> str:
    """What the shared settings follow from, besides the data."""
    content = [settings.finetune, settings.preset, common_multiple(*(arm.recipe().input_multiple for arm in arms))]
    return hashlib.sha256(json.dumps(to_mapping(content), sort_keys=True).encode()).hexdigest()[:16]


def _from_plan(before: Mapping[str, Any] | None, settings: CompareSettings, arms: Sequence[Arm]) -> Any:
    """The shared settings of the plan before, whose batch followed from the memory that was free then."""
    if before is None or before.get("settled_for") != settled_for(settings, arms):
        return None
    settled = build_settings(FinetuneSettings, before["finetune"], f"{settings.out}/{PLAN_NAME}")
    # There it is left out, since its DATA is the cache.
    return replace(settled, spacing_mm=_spacing_of(before, settings))


def _spacing_of(before: Mapping[str, Any], settings: CompareSettings) -> Spacing | None:
    """The voxel size of a comparison's scans: from its plan, else from the cache that earlier versions left alone."""
    if "spacing_mm" in before:
        return coerce(before["spacing_mm"], Spacing | None, f"{settings.out}/{PLAN_NAME}: spacing_mm")
    with suppress(DataError):
        return open_cache(_cache_place(settings)).preprocessing.spacing_mm
    return None


def _require_same_spacing(
    before: Mapping[str, Any] | None, settled: FinetuneSettings, settings: CompareSettings
) -> None:
    """Refuse another voxel size than that of the scans that the folder's cells were run on."""
    if before is None or settled.spacing_mm is None or (own := _spacing_of(before, settings)) == settled.spacing_mm:
        return
    held = "the scans' own voxel size" if own is None else f"spacing_mm {own}"
    raise ConfigError(
        f"{settings.out} holds a comparison at {held}, and now spacing_mm is {settled.spacing_mm}; choose another "
        "--out, or leave it as it was."
    )


def _folds(settings: CompareSettings, read: TrainingData) -> list[FoldPart]:
    """The parts of the folds that are asked for."""
    source = read.source
    declared = any(case.split == "val" for case in source.cases)
    known: Sequence[int] = range(1)
    if settings.preset is not None:
        known = range(find_preset(settings.preset).num_folds)
    elif not declared:
        known = declared_folds(source.cases) or range(settings.num_folds)
    wanted = tuple(known) if settings.folds is None else settings.folds
    if unknown := [fold for fold in wanted if fold not in known]:
        what = "is one declared split, which is fold 0" if declared else f"are the folds {listed(known, 20)}"
        raise ConfigError(f"folds has {unknown[0]}, but there {what}; leave it out.")
    return [FoldPart.of(fold, _split(settings, read, fold), settings.split_seed) for fold in wanted]


def _split(settings: CompareSettings, read: TrainingData, fold: int) -> Split:
    cases: Sequence[Case] = read.source.cases
    with warnings.catch_warnings():
        if settings.preset is not None:
            # Every fold would name the same missing cases; the first reading has.
            warnings.simplefilter("ignore")
            preset = find_preset(settings.preset)
            cases = declare_fold(preset, str(settings.data), cases, fold, strict=False)
        return choose_split(
            cases,
            fold=fold,
            num_folds=settings.num_folds,
            split_seed=settings.split_seed,
            unreadable=unreadable_of(read.source),
        )


def _planned(read: TrainingData, arms: Sequence[Arm], fold: FoldPart) -> FinetuneSettings:
    """Fine-tuning for all arms, planned from the scans that may be learned from in the first fold."""
    recipes = [arm.recipe() for arm in arms]
    split = Split(train=(*fold.learning, *fold.choosing), val=())
    with quietly():
        planned = plan_finetuning(read.source, split, Initialisation(recipes[0]), read.settings, read.task)
    task: Any = planned.task
    if isinstance(read.task, CropTask) and read.task.patch_size is None:
        # What was planned for one network is rounded up to what all of them can take.
        task = replace(
            task, patch_size=round_up(task.patch_size, common_multiple(*(recipe.input_multiple for recipe in recipes)))
        )
    settings = replace(planned.settings, task=to_named(task, TASKS), plan=None, resume=False)
    if settings.precision == "auto":
        # Settled once, lest cells of one comparison compute in different ways.
        settings = replace(settings, precision=choose_precision(settings.accelerator).precision)
    return settings


def _cache_place(settings: CompareSettings) -> str:
    return settings.cache or os.path.join(settings.out, "cache")


def _cache(
    settings: CompareSettings, read: TrainingData, settled: FinetuneSettings, before: Mapping[str, Any] | None
) -> Cache:
    """The scans of all cells, prepared once."""
    if isinstance(read.source, Cache):
        return given_scans(read.source, read.source.cases, settled.spacing_mm)
    place = _cache_place(settings)
    if before is not None and locked_of(Path(settings.out), [str(row.get("id")) for row in before["cells"]]):
        # Cells of another process open it, and one that is checked again is unfinished meanwhile.
        with suppress(DataError):
            if (held := open_cache(place)).digest == before.get("cache_digest"):
                return held
    return build_cache(
        read.source, place, Preprocessing(spacing_mm=settled.spacing_mm), num_workers=settled.num_workers
    )


def _leaks(plan: ComparisonPlan) -> list[str]:
    """Refuse weights that learned from tested scans, and say which scans are tested and learned from in one fold.

    Raises:
        CheckpointError: The list of scans of an arm's weights is damaged.
        DataError: Weights of an arm did; the sentence names both.
    """
    notes: list[str] = []
    lists: dict[str, tuple[str, Seen]] = {}
    for arm in plan.arms:
        if arm.weights is not None:
            try:
                seen = read_seen(arm.weights)
            except CheckpointError as error:
                raise CheckpointError(f"arm {arm.name}: {error}") from error
            if unknown := unlisted(arm.weights, seen, "tested ones"):
                notes.append(f"{arm.name}: {unknown}")
            if seen is not None:
                lists[arm.name] = (arm.weights, seen)
    for fold in plan.folds:
        tested = identities_of(plan.cache.subset(fold.test))
        learned = (*fold.learning, *fold.choosing)
        if leaks := find_leaks(identities_of(plan.cache.subset(learned)), tested):
            notes.append(f"fold {fold.number}: {leaks_in_words(leaks, len(tested))}")
        if shared := sorted({case.patient for case in fold.test} & {case.patient for case in learned}):
            notes.append(
                f"fold {fold.number}: the declared split has scans of {number_of(len(shared), 'patient')} both tested "
                f"and learned from ({listed(shared)}); scores look better than they are."
            )
        for name, (weights, seen) in lists.items():
            if leaks := find_leaks(seen.scans, tested):
                place = f"in the pre-training data of {weights}"
                found = leaks_in_words(leaks, len(tested), place=place, remedy=_LEAKING)
                raise DataError(f"arm {name}, fold {fold.number}: {found}")
    return notes
