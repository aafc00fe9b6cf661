"""One run of fine-tuning: from its settings to a trained network."""

import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.caching.summary import cohort_of
from mim3d.core.errors import ConfigError, DamagedError, listed
from mim3d.core.left_out import LeftOutList
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.run_folder import Run
from mim3d.core.settings import to_mapping, to_named, update_settings
from mim3d.core.warned import LearningWarning, UnchosenWarning, published, recording
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.splits import Split
from mim3d.distributed.processes import Processes
from mim3d.objective import Objective
from mim3d.tasks import TASKS
from mim3d.tasks.contract import Task
from mim3d.tasks.freezing import FreezingObjective
from mim3d.tasks.segmentation.targets import are_partial
from mim3d.tracking import TrackedRun
from mim3d.training.checkpoint import load_best
from mim3d.training.loop import train
from mim3d.training.settings import TrainResult
from mim3d.weights import save_network
from mim3d.workflows.finetune.data import read_training_data
from mim3d.workflows.finetune.like import check_cases, check_scans, say_like
from mim3d.workflows.finetune.planning import PlannedRun, plan_finetuning, save_plan
from mim3d.workflows.finetune.schedules import (
    begun_manifest,
    optimisation,
    schedule_line,
    schedule_of,
    scheduled_task,
    with_schedule,
)
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.damage import adding_to, damaged_rows, on_sound_scans
from mim3d.workflows.shared.first_screen import network_line, say_what_is_learned
from mim3d.workflows.shared.held_out import split_in_words, write_split
from mim3d.workflows.shared.initialisation import Initialisation, initialise
from mim3d.workflows.shared.inputs import check_channels, encoder_card, inputs_of, open_scans, unreadable_of
from mim3d.workflows.shared.leakage import (
    SEEN_NAME,
    check_leakage,
    check_pretraining,
    identities_of,
    seen_from,
    write_seen,
)
from mim3d.workflows.shared.memory import finetuning_variants, require_memory
from mim3d.workflows.shared.training import joined_processes

#: Passes over the training scans where nothing else is asked for.
DEFAULT_EPOCHS = 300

#: Validations of a run where nothing else is asked for.
DEFAULT_VALIDATIONS = 10


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        path: Folder of the run.
        finished: Whether all of its steps are done.
        step: Step of the weights that were kept.
        scores: Scores of those weights on the held-out cases, by name; empty without validation.
    """

    path: Path
    finished: bool
    step: int
    scores: Mapping[str, float]


@recording()
def finetune_once(settings: FinetuneSettings, *, every_fold: bool = False) -> FinetuneResult:
    """Fine-tune once.

    Args:
        settings: With the numbers of processes filled in; ``fold`` is one fold or None.
        every_fold: Whether this is the first of all folds: with ``strict``, weights that learned from what a later
            fold holds out are refused before this one is trained.
    Raises:
        ConfigError: Settings that cannot work, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: Cases that cannot be used.
    """
    started_at = time.monotonic()
    with joined_processes(settings) as processes:
        # What cannot work whatever the data is refused before they are read.
        settings, choice = settings.on_machine(processes, settings.out)
        settings = with_schedule(settings)
        say_like(settings)
        settings, task, source, split = read_training_data(settings)
        check_cases(settings, {case.id for case in (*source.cases, *unreadable_of(source))}, split)
        task = scheduled_task(task, settings)
        if settings.patience and not split.val:
            raise ConfigError(
                f"patience is {settings.patience}, but no case is held out to validate on; give a fold, or no patience."
            )
        initial = _initialise(settings, task, source, split)
        if not processes.is_first:
            # They take the plan that it saves; here they learn when it fails before.
            processes.wait_for("plan")
        planned = plan_finetuning(source, split, initial, settings, task)
        run, scans, left_out = _prepare(planned, initial, source, split, processes)
        check_scans(planned.settings, scans)
        cached = {scan.case.id for scan in scans}
        split = split.without([case for case in (*split.train, *split.val) if case.id not in cached])
        write_split(run, split)
        parts = {"train": split.train, "held out": split.val}
        cohort = {name: cohort_of(scans.subset(part)) for name, part in parts.items() if part}
        words = split_in_words(split, settings.single_fold, settings.num_folds, settings.held_out_list)
        run.note({"cohort": cohort, "split": words, **choice})
        learned, strict = scans.subset(split.train), bool(settings.strict)
        if split.val:
            held_out = identities_of(scans.subset(split.val))
            if strict and every_fold:
                check_pretraining(settings.weights, identities_of(scans), strict=True)
            check_pretraining(settings.weights, held_out, strict=strict)
            check_leakage(identities_of(learned), held_out, strict=strict)
        if run.writes:
            write_seen(run.path, seen_from(identities_of(learned), settings.weights))
        return _train(run, planned, initial, split, scans, left_out, started_at)


def _initialise(settings: FinetuneSettings, task: Task, source: CaseSet | Cache, split: Split) -> Initialisation:
    """The encoder to begin with, once it is known that task, encoder and cases fit together."""
    task.check_split(split)
    num_channels = len(split.train[0].images)
    initial = initialise(
        settings.backbone, settings.weights, num_channels, settings.input_layers, settings.min_coverage
    )
    # Another run's recipe, even a voxel size that is each scan's own, goes before the encoder's.
    initial = replace(initial, gives_way=settings.like is not None)
    check_channels([*split.train, *split.val], initial.recipe)
    task.checked(initial.recipe)
    task.check_labels(source.label_values)
    for frozen in ("freeze_encoder", "unfreeze_ratio"):
        if settings.weights is None and getattr(task, frozen, None):
            warnings.warn(
                f"{frozen} keeps an encoder as it was drawn at random, since there are no weights; give --weights, "
                "unless random features are what you want to see.",
                category=LearningWarning,
                stacklevel=3,
            )
    return initial


def _prepare(
    planned: PlannedRun, initial: Initialisation, source: CaseSet | Cache, split: Split, processes: Processes
) -> tuple[Run, Cache, LeftOutList]:
    """The folder of the run, the scans in their cache, and the list of those that are left out."""
    settings = planned.settings
    spacing_mm = initial.spacing_mm(settings.spacing_mm, source)
    run = Run.create(
        settings.out,
        command="finetune",
        settings=replace(settings, backbone=to_named(initial.recipe, BACKBONES), spacing_mm=spacing_mm),
        inputs=inputs_of(settings),
        resume=settings.resume,
    )
    run.note(initial.noted())
    save_plan(run, planned)
    if processes.is_first:
        processes.announce("plan", "saved")
    scans, left_out = open_scans(
        source,
        [*split.train, *split.val],
        run,
        processes,
        settings.cache,
        spacing_mm=spacing_mm,
        num_workers=settings.num_workers,
        strict=bool(settings.strict),
    )
    if planned.task.needs == "label":
        # A held-out case, too, must not turn out to name a label that there is not once it is validated on.
        are_partial(scans.cases, scans.labels)
        _say_what_is_absent(run, scans.subset(split.train))
    return run, scans, left_out


def _say_what_is_absent(run: Run, learned: Cache) -> None:
    """Warn of declared labels that no case to train on holds."""
    seen = {value for scan in learned for value, count in scan.num_voxels.items() if count}
    absent = [name for value, name in learned.labels.items() if value not in seen | {0}]
    if absent:
        run.note({"labels_not_seen": absent})
        warnings.warn(
            f"declared, but in none of the {len(learned)} cases to train on: {listed(absent, 9)}; nothing is learned of"
            " them, so compare the values in the label maps with the declaration.",
            stacklevel=4,
        )


def _train(
    run: Run,
    planned: PlannedRun,
    initial: Initialisation,
    split: Split,
    scans: Cache,
    left_out: LeftOutList,
    started_at: float,
) -> FinetuneResult:
    """Everything after the scans lie in a cache: the task's plan, the network, its training, and the export."""
    settings, recipe = planned.settings, initial.recipe
    training_scans = scans.subset(split.train)
    held_out = list(scans.subset(split.val)) if split.val else []
    if settings.strict and (damaged := damaged_rows(held_out)):
        raise DamagedError(damaged[0]["reason"])
    if planned.task.needs == "class" and len(held := {str(scan.case.class_name) for scan in held_out}) == 1:
        warnings.warn(
            f"all held-out cases are of class {held.pop()}, so that their AUC is not defined: the last weights are "
            "kept, since no best ones are known.",
            category=UnchosenWarning,
            stacklevel=3,
        )
    labels = planned.task.classes_of(training_scans)
    task = _as_begun(planned.task, settings).planned(recipe, training_scans, labels)
    say(network_line(to_named(task, TASKS)["name"], recipe, settings.weights))
    if settings.weights is not None:
        say(schedule_line(settings))
    say_what_is_learned(task.summary(), task.details(), verbose=settings.verbose)
    run.note({"task": to_named(task, TASKS), "labels": to_mapping(labels), "num_scans": len(training_scans)})
    mapping = initial.intensity(settings.intensity, training_scans)
    run.note({"intensity": mapping})
    on_damage = adding_to(left_out, training_scans)
    loader = settings.loader(training_scans, task.sampler(), mapping, task.augment(), on_damage)
    optim = optimisation(settings, task)
    memory = require_memory(
        settings,
        finetuning_variants(lambda recipe: task.build(recipe, labels), recipe),
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in loader.dataset[0].items()},
        optim,
        smaller=f"a smaller backbone or smaller crops (task.{task.sized_by})",
        validation_bytes=task.validation_bytes(held_out, labels),
    )
    run.note({**memory, "details": task.details()})
    torch.manual_seed(settings.seed)
    objective = task.build(recipe, labels)
    frozen_ratio = schedule_of(settings).frozen_ratio
    if frozen_ratio and not isinstance(objective, FreezingObjective):
        raise ConfigError(
            f"schedule is {settings.schedule}, but {type(objective).__name__} freezes no encoder; use default."
        )
    initial.fill(objective.encoder)
    num_steps = settings.num_steps(loader, DEFAULT_EPOCHS)
    every = -(-num_steps // DEFAULT_VALIDATIONS) if settings.validate_every is None else settings.validate_every
    num_validations = -(-num_steps // every) if every else 1
    if settings.patience and settings.patience >= num_validations:
        # The first validation is always a better one.
        warnings.warn(
            f"patience {settings.patience} never ends this run, which validates {number_of(num_validations, 'time')}; "
            "give a smaller one, or a smaller --validate_every.",
            stacklevel=2,
        )

    def validate(trained: Objective) -> dict[str, float]:
        listed = None if settings.strict else left_out
        return on_sound_scans(held_out, lambda sound: task.validate(trained, sound, mapping, labels), listed)

    with TrackedRun.of(run, settings.tracking) as tracked:
        result = train(
            objective,
            loader,
            run=tracked,
            loop=settings.loop(num_steps, frozen_ratio=frozen_ratio, started_at=started_at, validate_every=every),
            optim=optim,
            validate=validate if held_out else None,
            best_by=task.best_by if held_out else None,
        )
    if run.writes:
        left_out.note()
    named = {str(value): name for value, name in labels.items()}
    learned = encoder_card(recipe, mapping, training_scans)
    card = {**learned, "task": to_named(task, TASKS), "labels": named, **initial.noted()}
    return _close(run, objective, result, task.network, card)


def _as_begun(task: Task, settings: FinetuneSettings) -> Task:
    """The task, with the decoder that a resumed run was planned with: later versions may plan another."""
    begun = begun_manifest(settings) or {}
    recorded = begun.get("derived", {}).get("task")
    decoder = recorded.get("decoder") if isinstance(recorded, dict) else None
    if decoder is None or getattr(task, "decoder", decoder) is not None:
        return task
    return update_settings(task, {"decoder": decoder}, "task")


def _close(run: Run, objective: Objective, result: TrainResult, network: str, card: dict[str, Any]) -> FinetuneResult:
    """Export the weights that validated best, or the last ones, and say where everything lies."""
    best: dict[str, Any] = {"step": result.step, "values": {}}
    if run.writes:
        best = load_best(run.checkpoints_dir, objective) or best
        save_network(
            run.path / network,
            objective,
            {**card, "step": best["step"], "scores": best["values"], "warnings": published(run.warnings)},
            beside=[run.path / SEEN_NAME],
        )
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["values"].items())
        say(f"kept: the weights of step {best['step']}{f' ({scores} on the held-out cases)' if scores else ''}")
    say(f"{network}: {run.path / network}")
    return FinetuneResult(run.path, finished=result.finished, step=best["step"], scores=best["values"])
