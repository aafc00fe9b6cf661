"""All folds of a data set by one command: one complete run after the other, and what their validations say together."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.core.errors import ConfigError
from mim3d.core.files import write_json
from mim3d.core.run_folder import GO_ON, require_usable
from mim3d.core.settings import parse_duration, read_yaml, to_mapping, to_named, write_yaml
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.published.layouts import declare_fold, read_preset
from mim3d.datasets.published.presets import find_preset
from mim3d.datasets.splits import TrainPart
from mim3d.tasks import TASKS, create_task
from mim3d.workflows.finetune.planning import PLAN_NAME
from mim3d.workflows.finetune.presets import require_own_folds
from mim3d.workflows.finetune.run import Tuned
from mim3d.workflows.shared.held_out import choose_split
from mim3d.workflows.shared.inputs import read_data

SUMMARY_NAME = "summary.json"
CONFIG_NAME = "config.yaml"
MANIFEST_NAME = "manifest.json"


def tune_folds(arguments: Mapping[str, Any], tune: Callable[..., Tuned]) -> str:
    """Fine-tune once for each fold, into OUT/fold_0, OUT/fold_1, ...; they share OUT/cache and the plan of the first.

    Folds that are finished stay as they are when the command is run again with ``resume``, and one that is not goes on.
    What the validations say is written to OUT/summary.json after every fold, and printed at the end.

    Args:
        arguments: of ``finetune``, complete.
        tune: fine-tunes once; called as :func:`mim3d.workflows.finetune.run.tune`.
    Returns:
        OUT.
    Raises:
        ConfigError: settings that cannot work, or a folder that holds something else, before any work begins.
        DataError: cases that cannot be dealt out to folds.
    """
    out = Path(arguments["out"])
    folders = [out / f"fold_{fold}" for fold in range(arguments["num_folds"])]
    _check(arguments, out, folders)
    if not _is_begun(out):
        require_usable(out)
    if not any((folder / MANIFEST_NAME).exists() for folder in folders):
        _write_config(out, arguments)
    finished = [run for run in _tune_each(arguments, out, folders, tune) if run.finished]
    if finished:
        _print_summary(out, finished)
    if len(finished) < len(folders):
        again = f"mim3d finetune --config {out / CONFIG_NAME} --out {out} --resume true"
        print(f"{len(finished)} of {len(folders)} folds are finished; go on with: {again}")
    else:
        print(f"predict with all of them: mim3d predict --weights {out}/fold_* --input SCANS --out DIR")
    return str(out)


def _tune_each(
    arguments: Mapping[str, Any], out: Path, folders: Sequence[Path], tune: Callable[..., Tuned]
) -> list[Tuned]:
    """One run after the other, until all are finished, one is stopped, or the time is over."""
    clock = _Session(arguments["max_time"])
    tuned: list[Tuned] = []
    for fold, folder in enumerate(folders):
        left = clock.left()
        if left == _NOTHING:
            break
        print(f"fold {fold} of {len(folders)}: {folder}")
        changes = {
            "fold": fold,
            "out": str(folder),
            "cache": arguments["cache"] or str(out / "cache"),
            "max_time": left,
        }
        plan = folders[0] / PLAN_NAME
        if fold and arguments["plan"] is None and plan.is_file():
            changes["plan"] = str(plan)
        tuned.append(tune({**arguments, **changes}, every_fold=fold == 0))
        if fold == 0:
            # Only now: settings with which no fold can be resumed must not take the place of those that can.
            _write_config(out, arguments)
        if not tuned[-1].finished:
            break
        _write_summary(out, tuned, num_folds=len(folders))
    return tuned


def _check(arguments: Mapping[str, Any], out: Path, folders: Sequence[Path]) -> None:
    """Refuse what would come to an end only after hours."""
    if arguments["devices"] * arguments["num_nodes"] > 1:
        raise ConfigError(
            "fold all trains on one device, since several start the command anew for every run; use --devices 1, or "
            f"one command for each of --fold 0 to {len(folders) - 1} with the same --cache."
        )
    if len(folders) < 2:
        raise ConfigError(f"num_folds is {arguments['num_folds']}, but fold all needs num_folds >= 2, such as 5.")
    if (out / MANIFEST_NAME).exists():
        raise ConfigError(f"{out} holds a single run already; choose another --out for all folds.")
    begun = [folder for folder in folders if (folder / MANIFEST_NAME).exists()]
    if begun and not arguments["resume"]:
        raise ConfigError(f"{begun[0]} holds a run already; go on by --resume true, or choose another --out.")
    data = arguments["data"]
    if arguments["preset"] is not None:
        _check_preset(arguments, data, len(folders))
        return
    needs_label = create_task(arguments["task"]).needs == "label"
    cases = read_data(data, need_labels=needs_label, keep_labels=True).cases
    if any(case.split == "val" for case in cases):
        raise ConfigError(
            f"{data} declares which cases validate, so that all folds would be the same; use --fold 0, or leave the "
            "declared split out."
        )
    for fold in range(len(folders)):
        part, seed = TrainPart.of(arguments), arguments["split_seed"]
        choose_split(cases, fold=fold, num_folds=len(folders), part=part, split_seed=seed)


def _check_preset(arguments: Mapping[str, Any], data: str, num_folds: int) -> None:
    """Refuse settings that a preset is not for, and a data set that lacks cases of some fold."""
    preset = find_preset(arguments["preset"])
    require_own_folds(preset, arguments)
    with warnings.catch_warnings():
        # Every fold says itself which of its cases are missing.
        warnings.simplefilter("ignore")
        source: Cache | CaseSet = open_cache(data) if is_cache(data) else read_preset(preset, data, None)[0]
        for fold in range(num_folds):
            cases = declare_fold(preset, data, source.cases, fold, strict=arguments["strict"])
            choose_split(cases, fold=fold, num_folds=num_folds, part=TrainPart.of(arguments))


def _write_config(out: Path, arguments: Mapping[str, Any]) -> None:
    write_yaml(out / CONFIG_NAME, {"command": "finetune", **_as_given(arguments)})


def _is_begun(out: Path) -> bool:
    """Whether the folder is one that this command made."""
    config = out / CONFIG_NAME
    return config.is_file() and read_yaml(config).get("fold") == "all"


def _as_given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as YAML can hold them: a task or backbone given as settings by its name."""
    task = arguments["task"]
    named = task if isinstance(task, (str, Mapping)) else to_named(task, TASKS)
    values: dict[str, Any] = to_mapping({**arguments, "task": named})
    return {name: value for name, value in values.items() if name != "resume"}


_NOTHING = "00:00:00"


class _Session:
    """What is left of the longest time that all folds together may take."""

    def __init__(self, max_time: str | None) -> None:
        self._end = None if max_time is None else time.monotonic() + parse_duration(max_time)

    def left(self) -> str | None:
        """As HH:MM:SS; None without a limit."""
        if self._end is None:
            return None
        seconds = max(0, int(self._end - time.monotonic()))
        return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def _by_name(runs: Sequence[Tuned]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for run in runs for name in run.scores)
    return {name: [run.scores[name] for run in runs if name in run.scores] for name in names}


def _write_summary(out: Path, runs: Sequence[Tuned], *, num_folds: int) -> None:
    """Write scores of every fold with their mean and standard deviation over folds."""
    by_name = _by_name(runs)
    summary = {
        "num_folds": num_folds,
        "folds": [
            {"fold": fold, "path": run.path.name, "step": run.step, "scores": dict(run.scores)}
            for fold, run in enumerate(runs)
        ],
        "mean": {name: fmean(values) for name, values in by_name.items()},
        "standard_deviation": {name: stdev(values) if len(values) > 1 else None for name, values in by_name.items()},
    }
    write_json(out / SUMMARY_NAME, summary, remedy=GO_ON)


def _print_summary(out: Path, runs: Sequence[Tuned]) -> None:
    for line in table(runs, _by_name(runs)):
        print(line)
    print(f"summary: {out / SUMMARY_NAME}")


def table(runs: Sequence[Tuned], by_name: Mapping[str, Sequence[float]]) -> list[str]:
    """Lines of a table: a score per line, a fold per column, mean and standard deviation last."""
    width = max(map(len, ["validation", *by_name]))
    heads = "".join(f"{run.path.name:>9}" for run in runs)
    lines = [f"{'validation':{width}}{heads}  mean +- standard deviation"]
    for name, values in by_name.items():
        cells = "".join(f"{run.scores[name]:9.4f}" if name in run.scores else f"{'-':>9}" for run in runs)
        spread = f" +- {stdev(values):.4f}" if len(values) > 1 else ""
        lines.append(f"{name:{width}}{cells}  {fmean(values):.4f}{spread}")
    return lines
