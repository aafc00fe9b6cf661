"""One run of fine-tuning, from the arguments of the command to a trained network."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache, CachedScan
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run
from mim3d.core.settings import to_mapping, to_named
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.splits import Split, TrainPart
from mim3d.distributed.processes import Processes
from mim3d.loading.loader import Loader
from mim3d.objective import Objective
from mim3d.scans.intensity import Intensity
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.contract import Task
from mim3d.tasks.segmentation.partial_labels import are_partial
from mim3d.tracking import TrackedRun
from mim3d.training.checkpoint import load_best
from mim3d.training.loop import train
from mim3d.training.optimisation import Optimisation
from mim3d.training.settings import TrainResult
from mim3d.weights import save_network
from mim3d.workflows.finetune.planning import plan_finetuning, save_plan
from mim3d.workflows.finetune.presets import apply_preset
from mim3d.workflows.finetune.start import Start, choose_start
from mim3d.workflows.shared.held_out import choose_split, write_split
from mim3d.workflows.shared.inputs import check_channels, encoder_card, open_scans, read_data, weights_input
from mim3d.workflows.shared.leakage import SEEN_NAME, check_pretraining, check_split, labelled, record_seen
from mim3d.workflows.shared.memory import finetuning_ways, require_memory
from mim3d.workflows.shared.training import Training, all_processes

#: Passes over the training scans where nothing else is asked for.
DEFAULT_EPOCHS = 300

#: Validations of a run where nothing else is asked for.
DEFAULT_VALIDATIONS = 10


@dataclass(frozen=True)
class Tuned:
    """What came of a run.

    Attributes:
        path: folder of the run.
        finished: whether all of its steps are done.
        step: of the weights that were kept.
        scores: of those weights on the held-out cases, by name; empty without validation.
    """

    path: Path
    finished: bool
    step: int
    scores: Mapping[str, float]


def tune(arguments: Mapping[str, Any], *, every_fold: bool = False) -> Tuned:
    """Fine-tune once.

    Args:
        arguments: of ``finetune``, complete; ``fold`` is one fold or None.
        every_fold: the first of all folds: with ``strict``, weights that saw what a later one holds out are refused
            before this one is trained.
    Raises:
        ConfigError: settings that cannot work, before any work begins.
        CheckpointError: weights that cannot be read or do not fit.
        DataError: cases that cannot be used.
    """
    with all_processes(arguments) as processes:
        return _tune(arguments, processes, every_fold=every_fold)


def _tune(arguments: Mapping[str, Any], processes: Processes, *, every_fold: bool) -> Tuned:
    # What cannot work whatever the data is refused before they are read.
    stated = {**arguments, "batch_size": 1} if arguments["batch_size"] is None else arguments
    Training.of(stated).check_machine()
    arguments, source, split = _cases(arguments, create_task(arguments["task"]))
    if arguments["patience"] is not None and not split.val:
        raise ConfigError(
            f"patience is {arguments['patience']}, but no case is held out to validate on; give a fold, or no patience."
        )
    start = _start(arguments, source, split)
    if not processes.is_first:
        # They take the plan that it saves; here they learn when it fails before.
        processes.wait_for("plan")
    planned = plan_finetuning(source, split, start, arguments, arguments["out"])
    arguments, weights = planned.arguments, planned.arguments["weights"]
    asked = create_task(arguments["task"]).checked(start.recipe)
    training = Training.of(arguments)
    spacing_mm = start.spacing_mm(arguments["spacing_mm"], source)
    named = {"task": to_named(asked, TASKS), "backbone": to_named(start.recipe, BACKBONES)}
    settings = {**arguments, **named, "spacing_mm": spacing_mm}
    inputs = weights_input(weights)
    run = Run.create(arguments["out"], command="finetune", settings=settings, inputs=inputs, resume=training.resume)
    save_plan(run, planned)
    if processes.is_first:
        processes.announce("plan", "saved")
    scans = open_scans(
        source,
        [*split.train, *split.val],
        run,
        processes,
        arguments["cache"],
        spacing_mm=spacing_mm,
        num_workers=training.num_workers,
        strict=bool(training.strict),
    )
    if asked.needs == "label":
        # A held-out case, too, must not turn out to name a label that there is not once it is validated on.
        are_partial(scans.cases, scans.labels)
    write_split(run, split)
    _check_leakage(run, split, scans, weights, strict=bool(training.strict), every_fold=every_fold)
    return _train(run, training, arguments["optim"], asked, start, split, scans, arguments["intensity"])


def _start(arguments: Mapping[str, Any], source: CaseSet | Cache, split: Split) -> Start:
    """The encoder to start from, once it is known that task, encoder and cases fit together."""
    asked, weights = create_task(arguments["task"]), arguments["weights"]
    asked.check_split(split)
    num_channels = len(split.train[0].images)
    start = choose_start(arguments["backbone"], weights, num_channels, arguments["input_layers"])
    check_channels([*split.train, *split.val], start.recipe)
    asked.checked(start.recipe)
    asked.check_labels(source.labels)
    for frozen in ("freeze_encoder", "unfreeze_ratio"):
        if weights is None and getattr(asked, frozen, None):
            warnings.warn(
                f"{frozen} keeps an encoder as it was drawn at random, since there are no weights; give --weights, "
                "unless random features are what you want to see.",
                stacklevel=3,
            )
    return start


def _cases(arguments: Mapping[str, Any], asked: Task) -> tuple[dict[str, Any], CaseSet | Cache, Split]:
    """The arguments with a preset below them where one is asked for, the data set and its split."""
    if arguments["preset"] is not None:
        return apply_preset(arguments["preset"], arguments["data"], arguments)
    source = read_data(arguments["data"], need_labels=asked.needs == "label", keep_labels=True)
    split = choose_split(
        source.cases,
        fold=arguments["fold"],
        num_folds=arguments["num_folds"],
        part=TrainPart.of(arguments),
        split_seed=arguments["split_seed"],
    )
    return dict(arguments), source, split


def _check_leakage(
    run: Run, split: Split, scans: Cache, weights: str | None, *, strict: bool, every_fold: bool
) -> None:
    """Say which held-out scans were learned from, by the encoder or by this run, and write down what it learns from.

    Raises:
        DataError: ``strict``, and there is one.
    """
    learned = scans.subset(split.train)
    if split.val:
        held_out = labelled(scans.subset(split.val))
        if strict and every_fold:
            check_pretraining(weights, labelled(scans), strict=True)
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
) -> Tuned:
    """Everything after the scans lie in a cache: the plan, the network, its training, and what is left of it."""
    training_scans = scans.subset(split.train)
    held_out = tuple(scans.subset(split.val)) if split.val else ()
    labels = asked.classes_of(training_scans)
    planned = _plan(run, asked, start, training_scans, labels)
    mapping = start.intensity(intensity, training_scans)
    loader = training.loader(training_scans, planned.sampler(), mapping, planned.augment())
    optim = optim.filled_from(planned.optimisation)
    run.note(_require_memory(training, optim, planned, start, loader, held_out, labels))
    objective = _build(planned, start, labels, training.seed)
    result = _learn(run, training, optim, planned, objective, mapping, loader, held_out, labels)
    return _close(run, objective, result, planned.network, _card(start, planned, mapping, training_scans, labels))


def _plan(run: Run, asked: Task, start: Start, scans: Cache, labels: dict[int, str]) -> Task:
    planned = asked.planned(start.recipe, scans, labels)
    for line in planned.summary():
        print(line)
    run.note({"task": to_named(planned, TASKS), "labels": to_mapping(labels), "num_scans": len(scans)})
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
        smaller=f"a smaller backbone or smaller crops (task.{task.sized_by})",
        validation_bytes=task.validation_bytes(held_out, labels),
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
    _check_patience(training.patience, -(-num_steps // every))
    with TrackedRun.of(run, training.tracking) as tracked:
        return train(
            objective,
            loader,
            run=tracked,
            loop=replace(training.loop(num_steps), validate_every=every),
            optim=optim,
            validate=(lambda trained: task.validate(trained, held_out, mapping, labels)) if held_out else None,
            best_by=task.best_by if held_out else None,
        )


def _check_patience(patience: int | None, num_validations: int) -> None:
    """Warn of patience that outlasts the run: the first validation is always a better one."""
    if patience is not None and patience >= num_validations:
        warnings.warn(
            f"patience {patience} never ends this run, which validates {num_validations} times; give a smaller one, or "
            "a smaller --validate_every.",
            stacklevel=2,
        )


def _card(start: Start, task: Task, mapping: Intensity, scans: Cache, labels: dict[int, str]) -> dict[str, Any]:
    """What a reader of the network must know."""
    named = {str(value): name for value, name in labels.items()}
    return {**encoder_card(start.recipe, mapping, scans), "task": to_named(task, TASKS), "labels": named}


def _close(run: Run, objective: Objective, result: TrainResult, network: str, card: dict[str, Any]) -> Tuned:
    """Export the weights that validated best, or the last ones, and say where everything lies."""
    best: dict[str, Any] = {"step": result.step, "values": {}}
    if run.writes:
        best = load_best(run.checkpoints_dir, objective) or best
        save_network(
            run.path / network,
            objective,
            {**card, "step": best["step"], "scores": best["values"]},
            beside=[run.path / SEEN_NAME],
        )
        scores = ", ".join(f"{name} {value:.4f}" for name, value in best["values"].items())
        print(f"kept: the weights of step {best['step']}{f' ({scores} on the held-out cases)' if scores else ''}")
    if not result.finished:
        print(f"stopped at step {result.step}: {result.reason}; go on with: {run.how_to_resume}")
    print(f"{network}: {run.path / network}")
    return Tuned(run.path, finished=result.finished, step=best["step"], scores=best["values"])
