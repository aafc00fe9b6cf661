"""All folds of a data set by one command: one complete run after the other, and a summary of their validations."""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from rich.text import Text

from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.core.errors import TO_BE_CONTINUED, ConfigError, note_exit_code
from mim3d.core.files import write_json
from mim3d.core.names import number_of, printable
from mim3d.core.progress import say
from mim3d.core.run_folder import GO_ON, MANIFEST_NAME, holds_all_folds, how_to_resume, require_usable, warnings_of
from mim3d.core.settings import CONFIG_NAME, parse_duration, to_mapping, to_named, write_yaml
from mim3d.core.warned import LeakWarning, LeftOutWarning
from mim3d.datasets.cases import CaseSet, read_cases
from mim3d.datasets.published.folds import declare_fold, read_preset
from mim3d.datasets.published.presets import find_preset
from mim3d.datasets.splits import EmptyPartError, declared_folds
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.evaluation import print_tables, printed_table
from mim3d.workflows.finetune.planning import PLAN_NAME
from mim3d.workflows.finetune.presets import with_own_folds
from mim3d.workflows.finetune.run import FinetuneResult, finetune_once
from mim3d.workflows.finetune.schedules import with_schedule
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.inputs import read_data, unreadable_of
from mim3d.workflows.shared.training import precision_of

SUMMARY_NAME = "summary.json"


def finetune_folds(settings: FinetuneSettings) -> str:
    """Fine-tune once for each fold, into OUT/fold_0, OUT/fold_1, ...; they share OUT/cache and the plan of the first.

    Folds that are finished stay as they are when the command is run again with ``resume``, and one that is not goes on.
    What the validations say is written to OUT/summary.json after every fold, and printed at the end.

    Args:
        settings: Settings with ``fold`` "all" and the numbers of processes filled in.
    Returns:
        OUT.
    Raises:
        ConfigError: Settings that cannot work, or a folder that holds something else, before any work begins.
        DataError: Cases that cannot be split into folds.
    """
    out = Path(settings.out)
    settings = with_schedule(settings)
    if settings.preset is not None:
        settings = with_own_folds(find_preset(settings.preset), settings)
    folds = _folds(settings)
    folders = [out / f"fold_{fold}" for fold in folds]
    _check(settings, out, dict(zip(folds, folders, strict=True)))
    if not holds_all_folds(out):
        require_usable(out)
    if not any((folder / MANIFEST_NAME).exists() for folder in folders):
        _write_config(out, settings)
    end = None if settings.max_time is None else time.monotonic() + parse_duration(settings.max_time)
    finished: list[FinetuneResult] = []
    num_skipped = 0
    for fold, folder in zip(folds, folders, strict=True):
        max_time = None
        if end is not None:
            seconds = int(end - time.monotonic())
            if seconds <= 0:
                note_exit_code(TO_BE_CONTINUED)
                break
            max_time = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        say(f"fold {fold} of {len(folders)}: {folder}")
        own = replace(settings, fold=fold, out=str(folder), cache=settings.cache or str(out / "cache"))
        own = replace(own, max_time=max_time)
        if finished and settings.plan is None and (plan := finished[0].path / PLAN_NAME).is_file():
            own = replace(own, plan=str(plan))
        try:
            run = finetune_once(own, every_fold=not finished)
        except EmptyPartError as error:
            # The others have cases to train and to validate on.
            num_skipped += 1
            if settings.strict or num_skipped == len(folders):
                raise
            warnings.warn(f"fold {fold} is left out: {error}", category=LeftOutWarning, stacklevel=2)
            continue
        if not finished:
            # Only now: settings with which no fold can be resumed must not take the place of those that can. All folds
            # compute as the first one does.
            settings = replace(settings, precision=precision_of(run.path) or settings.precision)
            _write_config(out, settings)
        if not run.finished:
            break
        finished.append(run)
        _write_summary(out, finished, num_folds=len(folders))
    if finished:
        say_scores(finished, _by_name(finished))
        say(f"summary: {out / SUMMARY_NAME}")
    if len(finished) + num_skipped < len(folders):
        again = how_to_resume("finetune", out)
        say(f"{number_of(len(finished), 'fold', 'are', of=len(folders))} finished; go on with: {again}")
    else:
        weights = " ".join(str(run.path) for run in finished) if num_skipped else f"{out}/fold_*"
        say(f"predict with all of them: mim3d predict --weights {weights} --input SCANS --out DIR")
    return str(out)


def _folds(settings: FinetuneSettings) -> Sequence[int]:
    """The numbers of the folds: those that the data set declares, else as many as are asked for.

    Raises:
        ConfigError: More are declared than are asked for.
    """
    if settings.preset is not None:
        return range(settings.num_folds)
    with warnings.catch_warnings():
        # Every fold says itself what there is to say of the data set.
        warnings.simplefilter("ignore")
        source: Cache | CaseSet = (
            open_cache(settings.data) if is_cache(settings.data) else read_cases(settings.data, **settings.declared)
        )
    declared = declared_folds(source.cases)
    if not declared:
        return range(settings.num_folds)
    if len(declared) > settings.num_folds:
        # Refused there in one sentence for one fold and all alike.
        replace(settings, fold=declared[0]).split(source.cases)
    say(f"{settings.data} declares {number_of(len(declared), 'fold')}: {', '.join(map(str, declared))}")
    return declared


def _check(settings: FinetuneSettings, out: Path, folders: Mapping[int, Path]) -> None:
    """Refuse what would come to an end only after hours."""
    if (settings.devices or 1) * (settings.num_nodes or 1) > 1:
        raise ConfigError(
            "fold all trains on one device, since several start the command anew for every run; use --devices 1, or "
            f"one command for each of --fold 0 to {len(folders) - 1} with the same --cache."
        )
    if len(folders) < 2:
        raise ConfigError(f"num_folds is {settings.num_folds}, but fold all needs num_folds >= 2, such as 5.")
    if (out / MANIFEST_NAME).exists():
        raise ConfigError(f"{out} holds a single run already; choose another --out for all folds.")
    begun = [folder for folder in folders.values() if (folder / MANIFEST_NAME).exists()]
    if begun and not settings.resume:
        raise ConfigError(f"{begun[0]} holds a run already; go on by --resume true, or choose another --out.")
    data = settings.data
    if settings.preset is not None:
        preset = find_preset(settings.preset)
        with warnings.catch_warnings():
            # Every fold says itself which of its cases are missing.
            warnings.simplefilter("ignore")
            source: Cache | CaseSet = open_cache(data) if is_cache(data) else read_preset(preset, data, None)
            for fold in folders:
                cases = declare_fold(preset, data, source.cases, fold, strict=settings.strict)
                replace(settings, fold=fold).split(cases)
        return
    lacks = create_task(settings.task).lacks
    every = read_data(data, lacks=lacks, keep_labels=True, strict=bool(settings.strict), **settings.declared)
    if any(case.split == "val" for case in every.cases):
        raise ConfigError(
            f"{data} declares which cases validate, so that all folds would be the same; use --fold 0, or "
            "leave the declared split out."
        )
    empty = []
    for fold in folders:
        try:
            replace(settings, fold=fold).split(every.cases, unreadable_of(every))
        except EmptyPartError as error:
            empty.append(error)
    # One such fold is left out when its turn comes.
    if empty and (settings.strict or len(empty) == len(folders)):
        raise empty[0]


def _write_config(out: Path, settings: FinetuneSettings) -> None:
    """Write the settings as they were given; a task given as an object by its name."""
    named = to_named(settings.task, TASKS) if is_dataclass(settings.task) else settings.task
    values = {name: value for name, value in to_mapping(replace(settings, task=named)).items() if name != "resume"}
    write_yaml(out / CONFIG_NAME, {"command": "finetune", **values})


def _by_name(runs: Sequence[FinetuneResult]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return {name: [run.scores[name] for run in runs if name in run.scores] for name in names}


def _write_summary(out: Path, runs: Sequence[FinetuneResult], *, num_folds: int) -> None:
    """Write scores of every fold with their mean and standard deviation over folds."""
    by_name = _by_name(runs)
    summary = {
        "num_folds": num_folds,
        "folds": [
            {
                "fold": int(run.path.name.removeprefix("fold_")),
                "path": run.path.name,
                "step": run.step,
                "scores": dict(run.scores),
                **({"warnings": said} if (said := warnings_of(run.path)) else {}),
            }
            for run in runs
        ],
        "mean": {name: fmean(values) for name, values in by_name.items()},
        "standard_deviation": {name: stdev(values) if len(values) > 1 else None for name, values in by_name.items()},
    }
    write_json(out / SUMMARY_NAME, summary, remedy=GO_ON)


def say_scores(runs: Sequence[FinetuneResult], by_name: Mapping[str, Sequence[float]]) -> None:
    """Print a table: a score per row, a fold per column, mean and standard deviation last."""
    leaking = {run.path for run in runs if any(row["kind"] == LeakWarning.kind for row in warnings_of(run.path))}
    heads = [run.path.name + "*" * (run.path in leaking) for run in runs]
    table = printed_table(None, "Validation", [*heads, "mean", "standard deviation"])
    for name, values in by_name.items():
        cells = [run.scores.get(name) for run in runs] + [fmean(values), stdev(values) if len(values) > 1 else None]
        table.add_row(Text(printable(name)), *("-" if cell is None else f"{cell:.4f}" for cell in cells))
    print_tables([table])
    if leaking:
        say(f"* {LeakWarning.in_general} The mean has its part of them.")
