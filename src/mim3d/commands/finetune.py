"""The command that turns labels, with or without a pre-trained encoder, into a segmenter."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.commands.held_out import choose_split, write_split
from mim3d.commands.inputs import check_channels, encoder_card, open_scans, read_data, weights_input
from mim3d.commands.leakage import SEEN_NAME, check_pretraining, check_split, labelled, record_seen
from mim3d.commands.memory import finetuning_ways, require_memory
from mim3d.commands.start import Start, choose_start
from mim3d.commands.training import Training
from mim3d.config import to_mapping, to_named
from mim3d.data.cache import Cache, CachedScan
from mim3d.data.cases import Split
from mim3d.data.loading import Loader
from mim3d.data.transforms import Intensity
from mim3d.engine.checkpoint import load_best
from mim3d.engine.loop import train
from mim3d.engine.settings import TrainResult
from mim3d.errors import DataError
from mim3d.inference import scores_bytes
from mim3d.objective import Objective
from mim3d.optimisation import Optimisation
from mim3d.run import Run
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.base import Task
from mim3d.types import Named, Spacing
from mim3d.weights import save_network

#: Passes over the training scans where nothing else is asked for.
DEFAULT_EPOCHS = 300

#: Validations of a run where nothing else is asked for.
DEFAULT_VALIDATIONS = 10


def finetune(
    data: str,
    out: str,
    task: Named = "segmentation",
    weights: str | None = None,
    backbone: Named | None = None,
    cache: str | None = None,
    spacing_mm: Spacing | None = None,
    intensity: Intensity | None = None,
    fold: int | None = 0,
    num_folds: int = 5,
    train_fraction: float = 1.0,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_time: str | None = None,
    batch_size: int = 2,
    accumulation: int = 1,
    optim: Optimisation = Optimisation(),
    precision: str = "32-true",
    devices: int = 1,
    num_nodes: int = 1,
    accelerator: str = "auto",
    num_workers: int | None = None,
    memory_limit: float | None = None,
    log_every: int = 10,
    validate_every: int | None = None,
    checkpoint_every: int = 200,
    pictures_every: int | None = 500,
    keep_checkpoints: int = 2,
    seed: int = 0,
    strict: bool = False,
    resume: bool = False,
) -> str:
    """Learn a task from labelled scans, from a pre-trained encoder or from scratch.

    The weights that validate best lie in OUT/segmenter with their card, ready for `mim3d predict --weights OUT`; the
    held-out cases are listed in OUT/held_out.csv. A run that is stopped goes on with `--resume true`.

    Args:
        data: MSD or nnU-Net raw folder, dataset.json, folder of images and labels, CSV or JSON list, or a cache.
        out: Folder of the run.
        task: What to learn; settings as --task.patch_size 96 96 96.
        weights: Pre-trained encoder: a run, an exported folder or a published checkpoint; from scratch if not given.
        backbone: Encoder, a name of list_models(); that of the weights if not given, hybrid_base from scratch.
        cache: Folder for the cache of preprocessed scans; OUT/cache if not given.
        spacing_mm: Voxel size along X, Y, Z in millimetres; that of the weights if not given, else each scan's own.
        intensity: Mapping of intensities to network input; that of the weights if not given, else planned.
        fold: Which of the folds is held out for validation, from 0; null trains on all cases without validation.
        num_folds: Folds the patients are dealt out to; a declared split wins over folds.
        train_fraction: Share of the training patients that is used; smaller shares are part of larger ones.
        max_steps: Optimiser steps.
        max_epochs: Passes over the training scans, instead of max_steps; 300 if neither is given.
        max_time: Longest time of this session, HH:MM or HH:MM:SS; the run can be resumed.
        batch_size: Crops per micro-batch and device.
        accumulation: Micro-batches whose gradients are averaged into one step.
        optim: Optimiser; what is not given is the task's own.
        precision: 32-true, bf16-mixed or 16-mixed.
        devices: Processes, one per device, on each node.
        num_nodes: Machines.
        accelerator: auto, cpu, cuda or mps.
        num_workers: Reading processes; none on a CPU and most cores beside a GPU if not given.
        memory_limit: GiB that training may use (on a GPU: of each); what is free if not given, 0 for no check.
        log_every: Steps between two lines of metrics.
        validate_every: Steps between two validations; ten in all if not given.
        checkpoint_every: Steps between two checkpoints.
        pictures_every: Steps between two sets of pictures.
        keep_checkpoints: Newest checkpoints kept.
        seed: Of weights, order and crops; never of the folds.
        strict: Refuse what is otherwise told in a warning: scans that cannot be used or prove damaged, and held-out
            scans that were learned from.
        resume: Go on with the run in OUT, or start it.
    """
    arguments = dict(locals())
    training = Training.of(arguments)
    source = read_data(data, need_labels=True)
    split = choose_split(source.cases, fold=fold, num_folds=num_folds, train_fraction=train_fraction)
    start = choose_start(backbone, weights, num_channels=len(split.train[0].images))
    cases = [*split.train, *split.val]
    check_channels(cases, start.recipe)
    asked = create_task(task).checked(start.recipe)
    spacing_mm = start.spacing_mm(spacing_mm, source)
    named = {"task": to_named(asked, TASKS), "backbone": to_named(start.recipe, BACKBONES)}
    settings = {**arguments, **named, "spacing_mm": spacing_mm}
    run = Run.create(out, command="finetune", settings=settings, inputs=weights_input(weights), resume=resume)
    scans = open_scans(source, cases, run, cache, spacing_mm=spacing_mm, num_workers=num_workers, strict=strict)
    write_split(run, split)
    _check_leakage(run, split, scans, weights, strict=strict)
    return _train(run, training, optim, asked, start, split, scans, intensity)


def _check_leakage(run: Run, split: Split, scans: Cache, weights: str | None, *, strict: bool) -> None:
    """Say which held-out scans were learned from, by the encoder or by this run, and write down what it learns from.

    Raises:
        DataError: ``strict``, and there is one.
    """
    learned = scans.subset(split.train)
    if split.val:
        held_out = labelled(scans.subset(split.val))
        check_pretraining(weights, held_out, strict=strict)
        check_split(labelled(learned), held_out, strict=strict)
    record_seen(run, learned, weights)


def _train(
    run: Run,
    training: Training,
    optim: Optimisation,
    asked: Task,
    start: Start,
    split: Split,
    scans: Cache,
    intensity: Intensity | None,
) -> str:
    """Everything after the scans lie in a cache: the plan, the network, its training, and what is left of it."""
    training_scans = scans.subset(split.train)
    held_out = tuple(scans.subset(split.val)) if split.val else ()
    planned = _plan(run, asked, start, training_scans)
    mapping = start.intensity(intensity, training_scans)
    loader = training.loader(training_scans, planned.sampler(), mapping, planned.augment())
    optim = optim.filled_from(planned.optimisation)
    run.note(_require_memory(training, optim, planned, start, loader, held_out, scans.labels))
    objective = _build(planned, start, scans.labels, training.seed)
    result = _learn(run, training, optim, planned, objective, mapping, loader, held_out, scans.labels)
    return _close(run, objective, result, _card(start, planned, mapping, training_scans))


def _plan(run: Run, asked: Task, start: Start, scans: Cache) -> Task:
    if not any(value != 0 for value in scans.labels):
        raise DataError(f"{scans.path}: no label but background in {len(scans)} scans; check the label files.")
    planned = asked.planned(start.recipe, scans, scans.labels)
    for line in planned.summary():
        print(line)
    run.note({"task": to_named(planned, TASKS), "labels": to_mapping(scans.labels), "num_scans": len(scans)})
    return planned


def _require_memory(
    training: Training,
    optim: Optimisation,
    task: Task,
    start: Start,
    loader: Loader,
    held_out: Sequence[CachedScan],
    labels: dict[int, str],
) -> dict[str, Any]:
    """Refuse what does not fit into memory, before the network is built; returns what to note."""
    return require_memory(
        training,
        finetuning_ways(lambda recipe: task.build(recipe, labels), start.recipe),
        {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in loader.dataset[0].items()},
        optim,
        smaller="a smaller backbone or smaller crops (task.patch_size)",
        validation_bytes=max((scores_bytes(scan.shape, len(labels)) for scan in held_out), default=0),
    )


def _build(task: Task, start: Start, labels: dict[int, str], seed: int) -> Objective:
    import torch

    torch.manual_seed(seed)
    objective = task.build(start.recipe, labels)
    if start.encoder is not None:
        objective.encoder.load_state_dict(start.encoder.state_dict())
    return objective


def _learn(
    run: Run,
    training: Training,
    optim: Optimisation,
    task: Task,
    objective: Objective,
    mapping: Intensity,
    loader: Loader,
    held_out: Sequence[CachedScan],
    labels: dict[int, str],
) -> TrainResult:
    num_steps = training.num_steps(loader, DEFAULT_EPOCHS)
    every = training.validate_every or -(-num_steps // DEFAULT_VALIDATIONS)
    return train(
        objective,
        loader,
        run=run,
        loop=replace(training.loop(num_steps), validate_every=every),
        optim=optim,
        validate=(lambda trained: task.validate(trained, held_out, mapping, labels)) if held_out else None,
        best_by=task.best_by if held_out else None,
    )


def _card(start: Start, task: Task, mapping: Intensity, scans: Cache) -> dict[str, Any]:
    """What a reader of the segmenter must know."""
    labels = {str(value): name for value, name in scans.labels.items()}
    return {**encoder_card(start.recipe, mapping, scans), "task": to_named(task, TASKS), "labels": labels}


def _close(run: Run, objective: Objective, result: TrainResult, card: dict[str, Any]) -> str:
    """Export the weights that validated best, or the last ones, and say where everything lies."""
    if run.writes:
        best = load_best(run.checkpoints_dir, objective) or {"step": result.step, "values": {}}
        save_network(
            run.path / "segmenter",
            objective,
            {**card, "step": best["step"], "scores": best["values"]},
            beside=[run.path / SEEN_NAME],
        )
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["values"].items())
        print(f"kept: the weights of step {best['step']}{f' ({scores} on the held-out cases)' if scores else ''}")
    if not result.finished:
        print(f"stopped at step {result.step}: {result.reason}; go on with: {run.how_to_resume}")
    print(f"segmenter: {run.path / 'segmenter'}")
    return str(run.path)
