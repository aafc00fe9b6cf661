"""The command that turns unlabelled scans into an encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from mim3d.backbones import BACKBONES, Backbone, create_recipe
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import Run, read_run
from mim3d.core.settings import to_named
from mim3d.core.types import Named, Spacing, Triple
from mim3d.datasets.cases import Case, CaseSet, check_cases, read_cases
from mim3d.datasets.published.pretraining_lists import pretraining_list
from mim3d.datasets.splits import split_cases
from mim3d.distributed.processes import Processes
from mim3d.loading.loader import Loader
from mim3d.methods import METHODS, Method, create_method
from mim3d.objective import Objective
from mim3d.planning.plan import plan_intensity
from mim3d.scans.intensity import Intensity
from mim3d.tracking import TrackedRun, Tracking
from mim3d.training.loop import train
from mim3d.training.memory import SampleShapes
from mim3d.training.optimisation import Optimisation
from mim3d.training.settings import TrainResult
from mim3d.weights import load_into
from mim3d.workflows.probe.monitor import BEST_BY, EncoderKeeper, LastEncoder, ProbeMonitor, ProbePlan
from mim3d.workflows.shared.held_out import dealt_out
from mim3d.workflows.shared.inputs import check_channels, encoder_card, open_scans, read_data, shapes_of, weights_input
from mim3d.workflows.shared.leakage import check_split, labelled, record_seen
from mim3d.workflows.shared.memory import pretraining_sample, pretraining_ways, require_memory
from mim3d.workflows.shared.training import Training, all_processes, with_processes

#: Passes over the data where nothing else is asked for (the paper's 800 epochs).
DEFAULT_EPOCHS = 800

#: Lines of metrics from which a part may be called idle.
LEAST_LINES = 10


def pretrain(
    data: str,
    out: str,
    method: Named = "MiM",
    backbone: Named = "hybrid_base",
    weights: str | None = None,
    preset: str | None = None,
    cache: str | None = None,
    spacing_mm: Spacing | None = None,
    intensity: Intensity | None = None,
    fold: int | None = None,
    num_folds: int = 5,
    split_seed: int = 0,
    max_steps: int | None = None,
    max_epochs: int | None = None,
    max_time: str | None = None,
    batch_size: int = 1,
    accumulation: int = 1,
    optim: Optimisation = Optimisation(),
    precision: str = "32-true",
    tf32: bool = False,
    compile: bool = False,
    devices: int | None = None,
    num_nodes: int | None = None,
    strategy: str = "auto",
    accelerator: str = "auto",
    num_workers: int | None = None,
    read_timeout: float = 10.0,
    memory_limit: float | None = None,
    log_every: int = 10,
    checkpoint_every: int = 200,
    pictures_every: int = 500,
    keep_checkpoints: int = 2,
    probe: str | None = None,
    probe_every: int | None = None,
    max_bad_steps: int = 3,
    tracking: Tracking = Tracking(),
    seed: int = 0,
    strict: bool = False,
    resume: bool = False,
) -> str:
    """Pre-train an encoder on unlabelled scans.

    Labels in the data are never read. The encoder lies in OUT/encoder with its card, ready for `mim3d finetune
    --weights OUT`; a run that is stopped goes on with `--resume true`.

    Args:
        data: Folder of scans, DICOM tree, MSD folder or dataset.json, nnU-Net raw folder, CSV or JSON list, or a cache.
        out: Folder of the run.
        method: Pre-training method; settings as --method.temperature 0.2.
        backbone: Encoder, a name of list_models(); settings as --backbone.recompute true.
        weights: Encoder to go on from: a run, an exported folder or a published checkpoint.
        preset: List of public data sets whose folders lie below DATA: 1k, 10k or all; every scan of DATA if not given.
        cache: Folder for the cache of preprocessed scans; OUT/cache if not given.
        spacing_mm: Voxel size along X, Y, Z to resample to, in millimetres; each scan keeps its own if not given.
        intensity: Mapping of intensities to network input; planned from the scans if not given.
        fold: Leave out the cases that `mim3d finetune --fold` of this number holds out; all cases train if not given.
        num_folds: Number of folds that `fold` counts.
        split_seed: Of the folds, as in fine-tuning.
        max_steps: Optimiser steps.
        max_epochs: Passes over the scans, instead of max_steps; 800 if neither is given.
        max_time: Longest time of this session, HH:MM or HH:MM:SS; the run can be resumed.
        batch_size: Samples (hierarchies) per micro-batch and device.
        accumulation: Micro-batches whose gradients are averaged into one step.
        optim: Optimiser; what is not given is the method's own.
        precision: 32-true, bf16-mixed or 16-mixed.
        tf32: Let a GPU round the factors of float32 products to TF32: several times as fast, 10 bits instead of 23.
        compile: Compile the blocks of the network (torch.compile); a minute at the start.
        devices: Processes, one per device, on each node; as torchrun or srun started them, or 1, if not given.
        num_nodes: Machines; as torchrun or srun started the processes, or 1, if not given.
        strategy: ddp (every process has all weights) or auto (ddp).
        accelerator: auto, cpu, cuda or mps.
        num_workers: Reading processes; none on a CPU and most cores beside a GPU if not given.
        read_timeout: Minutes that a reading process may take over a batch before the run stops; 0 waits for ever.
        memory_limit: GiB that training may use (on a GPU: of each); what is free if not given, 0 for no check.
        log_every: Steps between two lines of metrics.
        checkpoint_every: Steps between two checkpoints.
        pictures_every: Steps between two sets of reconstructions.
        keep_checkpoints: Newest checkpoints kept.
        probe: Labelled scans, or `phantom`, to score features on; OUT/encoder is then the best, encoder_last the last.
        probe_every: Steps between two probings; ten in all if not given.
        max_bad_steps: Steps of the whole run that may go wrong: not finite, and skipped, or out of memory, and taken
            once more; a run with more of them stops.
        tracking: TensorBoard, Weights & Biases or MLflow beside metrics.jsonl.
        seed: Of weights, order, crops and masks.
        strict: Refuse what is otherwise told in a warning: scans that cannot be used or prove damaged, and held-out
            scans that were learned from.
        resume: Go on with the run in OUT, or start it.
    """
    arguments = with_processes(dict(locals()))
    with all_processes(arguments) as processes:
        return _pretrain(arguments, processes)


def _pretrain(arguments: dict[str, Any], processes: Processes) -> str:
    """Everything behind the command, from its complete arguments."""
    training = Training.of(arguments)
    training.check_machine()
    asked, recipe = create_method(arguments["method"]), create_recipe(arguments["backbone"])
    source = _source(arguments["data"], arguments["preset"], arguments["fold"])
    cases = _training_cases(source, arguments)
    check_channels(cases, recipe)
    shapes = shapes_of(source, cases, arguments["spacing_mm"])
    planned = _plan(asked, recipe, shapes)
    optim = arguments["optim"].filled_from(planned.optimisation)
    sample = pretraining_sample(planned, recipe, shapes[0])
    asked_probe = ProbePlan.of(arguments, recipe, sample)
    memory = _require_memory(training, planned, recipe, optim, sample, asked_probe)
    settings = arguments | {"method": to_named(planned, METHODS), "backbone": to_named(recipe, BACKBONES)}
    weights = arguments["weights"]
    inputs = weights_input(weights)
    run = Run.create(arguments["out"], command="pretrain", settings=settings, inputs=inputs, resume=training.resume)
    run.note(memory)
    # Those held out are cached too: only their voxels tell whether one is among the others under another name.
    every = open_scans(
        source,
        source.cases,
        run,
        processes,
        arguments["cache"],
        spacing_mm=arguments["spacing_mm"],
        num_workers=training.num_workers,
        strict=bool(training.strict),
    )
    scans = _learned(every, cases, strict=bool(training.strict))
    record_seen(run, scans, weights)
    mapping = arguments["intensity"] or plan_intensity(scans)
    objective = _build(planned, recipe, weights, training.seed)
    loader = training.loader(scans, planned.sampler(recipe), mapping)
    card = encoder_card(recipe, mapping, scans)
    keeper: EncoderKeeper = LastEncoder(run, card)
    if asked_probe is not None:
        items = asked_probe.prepared(run, training, objective.encoder, card) if run.writes else None
        keeper = ProbeMonitor(run, card, asked_probe, items, lambda: planned.build(recipe))
    result = _learn(run, training, optim, objective, loader, keeper)
    return _close(run, planned, result, keeper)


def _source(data: str, preset: str | None, fold: int | None) -> CaseSet | Cache:
    """The data set, or what of a published list is there."""
    if preset is None:
        return read_data(data, need_labels=False)
    if fold is not None:
        raise ConfigError(
            f"fold {fold} of preset {preset}: a list of scans to pre-train on has no folds; leave fold out."
        )
    source = pretraining_list(preset, data, tell=print)
    check_cases(source, need_labels=False)
    return source


def _training_cases(source: CaseSet | Cache, arguments: Mapping[str, Any]) -> Sequence[Case]:
    """All cases but those held out: by a declared split, or by the fold that fine-tuning would hold out."""
    kept = [case for case in source.cases if case.split in (None, "train")]
    if arguments["fold"] is not None:
        # Cases that no task deals out must not shift its folds here.
        every = source.cases if isinstance(source, Cache) else read_cases(arguments["data"]).cases
        fold, num_folds, seed = (arguments[name] for name in ("fold", "num_folds", "split_seed"))
        splits = [
            split_cases(dealt, fold=fold, num_folds=num_folds, seed=seed) for dealt in dealt_out(every) or [list(every)]
        ]
        held_out = {case.patient for split in splits for case in split.val}
        kept = [case for case in kept if case.patient not in held_out]
    if not kept:
        raise DataError('Every case is declared val or test, so none is left to pre-train on; mark some "train".')
    return kept


def _learned(scans: Cache, cases: Sequence[Case], *, strict: bool) -> Cache:
    """The scans to learn from.

    Raises:
        DataError: ``strict``, and one of those held out is among them by another name.
    """
    learned = scans.subset(cases)
    chosen = {case.id for case in cases}
    held_out = [case for case in scans.cases if case.id not in chosen]
    if held_out:
        check_split(labelled(learned), labelled(scans.subset(held_out)), strict=strict)
    return learned


def _plan(asked: Method, recipe: Backbone, shapes: Sequence[Triple]) -> Method:
    planned = asked.planned(recipe, shapes)
    for line in planned.summary(recipe, shapes):
        print(line)
    return planned


def _require_memory(
    training: Training,
    method: Method,
    recipe: Backbone,
    optim: Optimisation,
    sample: SampleShapes,
    probe: ProbePlan | None,
) -> dict[str, Any]:
    """Refuse what does not fit into memory, before a run folder or a cache is made; returns what to note."""
    return require_memory(
        training,
        pretraining_ways(method, recipe),
        sample,
        optim,
        smaller="a smaller backbone or smaller levels of the hierarchy",
        validation_bytes=0 if probe is None else probe.num_bytes(recipe.in_channels),
        less_validation="leave --probe out, or give it scans with fewer channels",
    )


def _build(method: Method, recipe: Backbone, weights: str | None, seed: int) -> Objective:
    import torch

    torch.manual_seed(seed)
    objective = method.build(recipe)
    if weights is not None:
        print(f"{weights}: {load_into(objective.encoder, weights)}")
    return objective


def _learn(
    run: Run, training: Training, optim: Optimisation, objective: Objective, loader: Loader, keeper: EncoderKeeper
) -> TrainResult:
    num_steps = training.num_steps(loader, DEFAULT_EPOCHS)
    monitor = keeper if isinstance(keeper, ProbeMonitor) else None
    with TrackedRun.of(run, training.tracking) as tracked:
        return train(
            objective,
            loader,
            run=tracked,
            loop=replace(
                training.loop(num_steps), validate_every=None if monitor is None else monitor.every(num_steps)
            ),
            optim=optim,
            validate=monitor,
            best_by=None if monitor is None else BEST_BY,
            on_checkpoint=keeper.save,
        )


def _close(run: Run, method: Method, result: TrainResult, keeper: EncoderKeeper) -> str:
    """Say what was learned, and where it lies; all but the first process have nothing to say."""
    if not run.writes:
        return str(run.path)
    lines = read_run(run.path).metrics
    last = lines[-max(1, len(lines) // 10) :]
    names = {name for line in last for name in line}
    means = {
        name: fmean(values) for name in names if (values := [line[name] for line in last if line.get(name) is not None])
    }
    if result.finished and len(lines) >= LEAST_LINES:
        for sentence in method.idle_parts(means):
            print(f"warning: {sentence}")
    if not result.finished:
        print(f"stopped at step {result.step}: {result.reason}; go on with: {run.how_to_resume}")
    print(keeper.conclusion(result.best))
    return str(run.path)
