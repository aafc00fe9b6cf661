"""Pre-training: from unlabelled scans to an encoder."""

import time
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from statistics import fmean

import torch

from mim3d.backbones import BACKBONES
from mim3d.caching.cache import Cache
from mim3d.caching.summary import cohort_of
from mim3d.core.errors import BothSetError, ConfigError, DataError
from mim3d.core.progress import say
from mim3d.core.run_folder import Run, read_run
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Named, Spacing
from mim3d.core.warned import LearningWarning
from mim3d.datasets.cases import Case, CaseSet, read_cases
from mim3d.datasets.published.pretraining_lists import pretraining_list
from mim3d.datasets.splits import Split, require_split_seed, split_by_list
from mim3d.datasets.usable import usable_cases
from mim3d.loading.loader import Loader
from mim3d.methods import METHODS, Method, create_method
from mim3d.objective import Objective
from mim3d.scans.grids import require_spacing
from mim3d.scans.intensity import Intensity
from mim3d.tracking import TrackedRun
from mim3d.training.loop import train
from mim3d.training.settings import TrainResult
from mim3d.weights import MIN_COVERAGE, OpenedWeights, require_share
from mim3d.workflows.probe.monitor import BEST_BY, EncoderKeeper, ProbePlan
from mim3d.workflows.shared.begun import PLANNED_PASSES, Begun
from mim3d.workflows.shared.damage import adding_to
from mim3d.workflows.shared.first_screen import fold_line, network_line, say_what_is_learned
from mim3d.workflows.shared.held_out import FoldChoice, cases_by_task, split_in_words
from mim3d.workflows.shared.initialisation import Initialisation, asked_recipe, initialise
from mim3d.workflows.shared.inputs import check_channels, encoder_card, inputs_of, open_scans, read_data, shapes_of
from mim3d.workflows.shared.leakage import check_leakage, identities_of, seen_from, write_seen
from mim3d.workflows.shared.memory import largest_image, pretraining_sample, pretraining_variants, require_memory
from mim3d.workflows.shared.training import TrainingSettings, joined_processes

#: Steps, and lines of metrics, from which a part may be called idle: before, its loss is mostly that of the beginning.
LEAST_STEPS = 20
LEAST_LINES = 4


@dataclass(frozen=True)
class PretrainSettings(TrainingSettings):
    """Settings of pre-training.

    Attributes:
        data: Folder of scans, DICOM tree, MSD folder or dataset.json, nnU-Net raw folder, CSV or JSON list, or a cache.
        out: Folder of the run.
        method: Pre-training method; settings as --method.temperature 0.2.
        backbone: Encoder, a name of list_models(); that of the weights (settings alone change it), else hybrid_base.
        weights: Encoder to go on from: a run, an exported folder or a published checkpoint.
        min_coverage: Share of the encoder that the weights must fill, from 0 to 1; 1 refuses every partial load.
        preset: List of public data sets whose folders lie below DATA: 1k, 10k or all; every scan of DATA if not given.
        cache: Folder for the cache of preprocessed scans; OUT/cache if not given.
        spacing_mm: Voxel size along X, Y, Z to resample to, in millimetres; that of the weights, else each scan's own.
        intensity: Mapping of intensities to network input; that of the weights, else planned from the scans.
        fold: Leave out the cases that `mim3d finetune --fold` of this number holds out; all cases train if not given.
        held_out_list: File with the ids of cases or patients to leave out, one per line, in place of a fold.
        num_folds: Number of folds that `fold` counts.
        split_seed: Seed of the folds, as in fine-tuning.
        probe: Labelled scans, or `phantom`, to score features on; OUT/encoder is then the best, encoder_last the last.
        probe_every: Steps between two probings; ten in all if not given, 0 for one at the end.
        max_epochs: Passes over the scans, instead of max_steps; if neither is given, 800 within 5,000 to 100,000 steps.
        batch_size: Samples (hierarchies) per micro-batch and device.
        strict: Refuse what is otherwise a warning: scans that cannot be used or prove damaged, and held-out scans that
            were learned from.
    """

    data: str
    out: str
    _: KW_ONLY
    method: Named = "MiM"
    backbone: Named | None = None
    weights: str | None = None
    min_coverage: float = MIN_COVERAGE
    preset: str | None = None
    cache: str | None = None
    spacing_mm: Spacing | None = None
    intensity: Intensity | None = None
    fold: int | None = None
    held_out_list: str | None = None
    num_folds: int = 5
    split_seed: int = 0
    probe: str | None = None
    probe_every: int | None = None
    batch_size: int = 1
    strict: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_spacing(self.spacing_mm)
        require_share(self.min_coverage)
        require_split_seed(self.split_seed)
        if self.held_out_list is not None and self.fold is not None:
            raise BothSetError(f"fold ({self.fold})", f"held_out_list ({self.held_out_list})")
        if self.probe_every is not None and self.probe is None:
            raise ConfigError(f"probe_every is {self.probe_every}, but there is no probe; give --probe DATA too.")
        if self.probe_every is not None and self.probe_every < 0:
            raise ConfigError(f"probe_every is {self.probe_every}; it must be at least 1, or 0 for one at the end.")

    @property
    def folds(self) -> FoldChoice:
        """Which cases fine-tuning would hold out."""
        return FoldChoice(self.fold, self.num_folds, self.split_seed)


def run_pretraining(settings: PretrainSettings) -> str:
    """Pre-train an encoder, and return the folder of the run.

    Raises:
        ConfigError: Settings that cannot work, before any work begins.
        CheckpointError: Weights that cannot be read or do not fit.
        DataError: Scans that cannot be used.
    """
    started_at = time.monotonic()
    settings = settings.on_processes()
    with joined_processes(settings) as processes:
        begun = Begun.of(settings.out, resume=settings.resume)
        asked = begun.method(create_method(settings.method, settings.backbone or ""))
        settings, choice = settings.on_machine(processes, settings.out)
        source, cases, initial = _begin_with(settings, asked, begun)
        recipe, spacing_mm = initial.recipe, settings.spacing_mm or begun.spacing_mm
        settings = replace(settings, spacing_mm=initial.spacing_mm(spacing_mm, source))
        shapes = shapes_of(source, cases, settings.spacing_mm)
        method = asked.planned(recipe, shapes)
        _say_split(settings, cases, source.cases)
        say(network_line(to_named(method, METHODS)["name"], recipe, settings.weights))
        summary, details = method.summary(recipe, shapes), method.details(recipe, shapes)
        say_what_is_learned(summary, details, verbose=settings.verbose)
        optim = begun.optimisation(settings.optim, method, recipe)
        sample = pretraining_sample(method, recipe, shapes[0])
        probe = ProbePlan.of(settings.probe, settings.probe_every, settings.folds, recipe, sample, settings.seed)
        memory = require_memory(
            settings,
            pretraining_variants(method, recipe),
            sample,
            optim,
            smaller="a smaller backbone or smaller crops (MiM: levels)",
            validation_bytes=0 if probe is None else probe.num_bytes(recipe.in_channels),
            less_validation="leave --probe out, or give it scans with fewer channels",
        )
        run = Run.create(
            settings.out,
            command="pretrain",
            settings=replace(settings, method=to_named(method, METHODS), backbone=to_named(recipe, BACKBONES)),
            inputs=inputs_of(settings),
            resume=settings.resume,
        )
        run.note({**memory, **choice, "summary": summary, "details": details, **initial.noted()})
        # Those held out are cached too: only their voxels tell whether one is among the others under another name.
        every, left_out = open_scans(
            source,
            source.cases,
            run,
            processes,
            settings.cache,
            spacing_mm=settings.spacing_mm,
            num_workers=settings.num_workers,
            strict=settings.strict,
        )
        scans = _learned(every, cases, strict=settings.strict)
        _note_scans(run, scans, settings, cases, source.cases)
        mapping = initial.intensity(settings.intensity or begun.intensity, scans)
        run.note({"intensity": mapping})
        objective = _begin(settings, method, initial)
        loader = settings.loader(scans, method.sampler(recipe), mapping, on_damage=adding_to(left_out, scans))
        if run.writes and (slow := loader.slow_levels):
            say(f"note: {slow}")
        size = {"input_size": to_mapping(largest_image(sample))}
        card = {**encoder_card(recipe, mapping, scans), **size, **initial.noted()}
        keeper = EncoderKeeper(run, card)
        if probe is not None:
            items = probe.prepared(run, settings, objective.encoder, card) if run.writes else None
            keeper = EncoderKeeper(run, card, items, lambda: method.build(recipe))
        num_steps = keeper.num_steps = _num_steps(settings, loader, begun, run)
        every_steps = None if probe is None else probe.steps_between(num_steps)
        with TrackedRun.of(run, settings.tracking) as tracked:
            result = train(
                objective,
                loader,
                run=tracked,
                loop=settings.loop(num_steps, started_at=started_at, validate_every=every_steps),
                optim=optim,
                validate=None if probe is None else keeper.score,
                best_by=None if probe is None else BEST_BY,
                on_checkpoint=keeper.save,
            )
        if run.writes:
            left_out.note()
        return _close(run, method, objective, result, keeper)


def _begin_with(
    settings: PretrainSettings, asked: Method, begun: Begun
) -> tuple[CaseSet | Cache, Sequence[Case], Initialisation]:
    """The data set, its cases to learn from, and the encoder, once it is known that it fits method and cases."""
    weights = None if settings.weights is None else OpenedWeights(settings.weights)
    # Before a large data set is read.
    asked.check_backbone(asked_recipe(settings.backbone, weights)[0])
    source = _source(settings)
    cases = _training_cases(source, settings)
    num_channels = len(cases[0].images)
    initial = initialise(settings.backbone, weights, num_channels, min_coverage=settings.min_coverage)
    check_channels(cases, initial.recipe)
    # A run goes on as it began, also where an earlier version did not follow its weights.
    return source, cases, replace(initial, gives_way=begun.is_run)


def _say_split(settings: PretrainSettings, cases: Sequence[Case], every: Sequence[Case]) -> None:
    """Print which cases are learned from, where some are held out."""
    num_held_out = len(every) - len(cases)
    if settings.fold is not None or num_held_out:
        say(fold_line(settings.fold, settings.num_folds, every, len(cases), num_held_out, settings.held_out_list))


def _begin(settings: PretrainSettings, method: Method, initial: Initialisation) -> Objective:
    """What is trained, drawn by the seed, with the encoder's weights where there are some."""
    torch.manual_seed(settings.seed)
    objective = method.build(initial.recipe)
    if initial.encoder is not None:
        initial.fill(objective.encoder)
        objective.after_weights()
    return objective


def _note_scans(
    run: Run, scans: Cache, settings: PretrainSettings, cases: Sequence[Case], every: Sequence[Case]
) -> None:
    """Note in a run what it learns from, and by what the other cases of the data set are held out."""
    chosen = {case.id for case in cases}
    split = Split(tuple(cases), tuple(case for case in every if case.id not in chosen))
    words = split_in_words(split, settings.fold, settings.num_folds, settings.held_out_list)
    run.note({"cohort": {"train": cohort_of(scans)}, "split": words})
    if run.writes:
        write_seen(run.path, seen_from(identities_of(scans), settings.weights))


def _source(settings: PretrainSettings) -> CaseSet | Cache:
    """The data set, or the scans of a published list that are there."""
    if settings.preset is None:
        return read_data(settings.data, strict=settings.strict, **settings.declared)
    if settings.fold is not None:
        raise ConfigError(
            f"fold {settings.fold} of preset {settings.preset}: a list of scans to pre-train on has no folds; leave "
            "fold out."
        )
    return usable_cases(pretraining_list(settings.preset, settings.data, log=print), strict=settings.strict)


def _training_cases(source: CaseSet | Cache, settings: PretrainSettings) -> Sequence[Case]:
    """All cases but those held out: by a list, a declared split, or the fold that fine-tuning would hold out."""
    if settings.held_out_list is not None:
        return split_by_list(source.cases, settings.held_out_list).train
    kept = [case for case in source.cases if case.split in (None, "train")]
    if settings.fold is not None:
        # Cases that belong to no task must not shift its folds here.
        every = source.cases if isinstance(source, Cache) else read_cases(settings.data, **settings.declared).cases
        held_out = settings.folds.held_out_patients(cases_by_task(every) or [list(every)])
        kept = [case for case in kept if case.patient not in held_out]
    if not kept:
        raise DataError('Every case is declared val or test, so none is left to pre-train on; mark some "train".')
    return kept


def _num_steps(settings: PretrainSettings, loader: Loader, begun: Begun, run: Run) -> int:
    """Steps of the run: as given, else as it was begun, else planned from the number of scans."""
    given = settings.num_steps(loader, PLANNED_PASSES)
    if settings.max_steps is not None or settings.max_epochs is not None:
        return given
    num_steps, line = begun.num_steps(given, loader.samples_per_epoch)
    say(line)
    run.note({"length": line})
    return num_steps


def _learned(scans: Cache, cases: Sequence[Case], *, strict: bool) -> Cache:
    """The scans to learn from, once it is known whether one of those held out is among them by another name."""
    learned = scans.subset(cases)
    chosen = {case.id for case in cases}
    held_out = [case for case in scans.cases if case.id not in chosen]
    if held_out:
        check_leakage(identities_of(learned), identities_of(scans.subset(held_out)), strict=strict)
    return learned


def _close(run: Run, method: Method, objective: Objective, result: TrainResult, keeper: EncoderKeeper) -> str:
    """Say what was learned, and where it lies; all but the first process have nothing to say."""
    if not run.writes:
        return str(run.path)
    lines = read_run(run.path).metrics
    last = lines[-max(1, len(lines) // 10) :]
    names = {name for line in last for name in line}
    means = {
        name: fmean(values) for name in names if (values := [line[name] for line in last if line.get(name) is not None])
    }
    if result.finished and result.step >= LEAST_STEPS and len(lines) >= LEAST_LINES:
        for sentence in method.idle_parts(means):
            warnings.warn(sentence, category=LearningWarning, stacklevel=2)
    keeper.conclude(objective, result.step)
    say(keeper.conclusion(result.best))
    return str(run.path)
