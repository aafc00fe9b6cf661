"""Fine-tuning like another run: all of its recipe is taken, so that the two differ in their weights alone."""

import dataclasses
import json
import math
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.files import load_json
from mim3d.core.names import cut, printable, verb_of
from mim3d.core.progress import say
from mim3d.core.run_folder import MANIFEST_NAME, how_to_resume, noted_intensity, read_manifest, recipe_of
from mim3d.core.settings import CONFIG_NAME, coerce, flat, read_yaml, to_mapping, to_named
from mim3d.datasets.mistaken import run_command
from mim3d.datasets.splits import Split
from mim3d.distributed.processes import choose_processes
from mim3d.tasks import TASKS
from mim3d.workflows.shared.held_out import SPLIT_NAME

if TYPE_CHECKING:
    from mim3d.workflows.finetune.settings import FinetuneSettings

#: Settings of which one takes the place of the other.
_EITHER = (
    ("max_steps", "max_epochs"),
    ("train_fraction", "train_cases"),
    ("optim.learning_rate", "optim.base_learning_rate"),
    ("optim.warmup_steps", "optim.warmup_ratio"),
)

#: Settings of a task under which all of its encoder learns from the first step.
_LEARNS: Mapping[str, Any] = {"freeze_encoder": False, "unfreeze_ratio": None}

#: Settings by which cases are split.
_OF_SPLIT = (
    *("fold", "held_out_list", "num_folds", "split_seed"),
    *("train_fraction", "train_cases", "train_list", "train_seed"),
)

#: Settings of a recipe that name a file or folder.
_PATHS = ("data", "cache", "train_list", "held_out_list")


def settings_below(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that lie below those given: the recipe of the run ``like``; nothing where none is named.

    Args:
        given: Settings as the user gave them, as YAML, the command line or Python has them.

    Raises:
        ConfigError: It is no run of fine-tuning, or one that stopped before its plan was finished.
    """
    like = given.get("like")
    going_on = coerce(given.get("resume", False), bool, "--resume")
    if like is None:
        return {}
    config = Path(str(given.get("out"))) / CONFIG_NAME
    if going_on and config.is_file():
        # What goes on does so by its own settings, whatever has become of the other run.
        return {name: value for name, value in read_yaml(config).items() if name != "command"}
    run, every_fold = _run_of(str(like))
    manifest = _complete(run)
    taken = _found_from_here(recipe_of(manifest), manifest)
    if every_fold:
        taken["fold"] = "all"
    devices, num_nodes = (coerce(given.get(name), int | None, f"--{name}") for name in ("devices", "num_nodes"))
    num_processes = math.prod(choose_processes(devices, num_nodes))
    if taken["accumulation"] % num_processes == 0:
        taken["accumulation"] //= num_processes
    if coerce(given.get("weights"), str | None, "--weights") is None:
        taken["schedule"] = "default"
        taken["task"] = {**taken["task"], **{name: v for name, v in _LEARNS.items() if name in taken["task"]}}
    names = flat({key: to_mapping(value) for key, value in given.items() if value is not None})
    for pair in _EITHER:
        for name, other in (pair, pair[::-1]):
            group, _, last = other.rpartition(".")
            place = taken.get(group) if group else taken
            if names.get(name) is not None and isinstance(place, dict):
                place.pop(last, None)
    return taken


def say_like(settings: "FinetuneSettings") -> None:
    """Print whose recipe is used, and every setting that is another one."""
    if settings.like is None or settings.resume:
        return
    run, every_fold = _run_of(settings.like)
    there = flat({name: v for name, v in recipe_of(_complete(run)).items() if not (every_fold and name == "fold")})
    task = to_named(settings.task, TASKS) if dataclasses.is_dataclass(settings.task) else settings.task
    plain = json.loads(json.dumps(to_mapping(dataclasses.replace(settings, task=task))))
    plain["accumulation"] *= (settings.devices or 1) * (settings.num_nodes or 1)
    here = flat(plain)
    changed = [
        f"{name} {here[name]} (there {printable(cut(str(value)))})"
        for name, value in there.items()
        if name not in _PATHS and name in here and here[name] != value
    ]
    end = f", but for {', '.join(changed)}" if changed else ""
    say(f"recipe: that of {settings.like}{end}")
    if settings.weights is None and "schedule" in here and here["schedule"] != there["schedule"]:
        say(f"        (schedule {there['schedule']} spares weights, and there are none)")


def check_cases(settings: "FinetuneSettings", known: Collection[str], split: Split) -> None:
    """Hold the cases against those of the run ``like``, before anything is prepared.

    Args:
        settings: The settings.
        known: Ids of all cases of the data set.
        split: The cases to train on and those that are held out.

    Raises:
        DataError: It learned from another data set.
    """
    if settings.like is None or settings.resume:
        return
    run, _ = _run_of(settings.like)
    parts, before = _split_ids(run), _complete(run)["settings"]
    absent = sorted(set().union(*parts.values()) - set(known))
    if not absent and all(getattr(settings, name) == before.get(name) for name in _OF_SPLIT):
        now = {"train": {case.id for case in split.train}, "val": {case.id for case in split.val}}
        absent = sorted(case for name, ids in parts.items() for case in ids - now[name])
    if absent:
        raise DataError(
            f"{settings.like} learned from another data set than {settings.data}: {listed(absent)} "
            f"{verb_of(len(absent), 'are')} not in the same part of it; give the --data of that run, or leave "
            "--like out."
        )


def check_scans(settings: "FinetuneSettings", scans: Cache) -> None:
    """Hold the prepared scans against those of the run ``like``, where both are of the same cases and voxel size.

    Raises:
        DataError: Scans or labels of the same ids are others.
    """
    if settings.like is None or settings.resume:
        return
    run, _ = _run_of(settings.like)
    manifest = _complete(run)
    same_cases = set().union(*_split_ids(run).values()) == {scan.case.id for scan in scans}
    same_size = manifest["settings"].get("spacing_mm") == to_mapping(settings.spacing_mm)
    if same_cases and same_size and manifest["inputs"]["data"] != scans.digest:
        raise DataError(
            f"{settings.like} learned from other scans or labels than {settings.data} holds under the same ids; give "
            "the data of that run, or leave --like out."
        )


def _run_of(like: str) -> tuple[Path, bool]:
    """The run, or the first of the folds in a folder of all of them, and whether it is such a folder.

    Raises:
        ConfigError: It is no run of fine-tuning.
    """
    folder = Path(like)
    if not (folder / MANIFEST_NAME).is_file():
        folds = sorted(path.parent for path in folder.glob(f"fold_*/{MANIFEST_NAME}"))
        if folds:
            return folds[0], True
    command = run_command(str(folder))
    if command == "finetune":
        return folder, False
    if command is None:
        raise ConfigError(f"like is {like}, which is no run of fine-tuning; give the --out of a mim3d finetune.")
    goes = "; its encoder goes with --weights" if command == "pretrain" else ""
    raise ConfigError(f"like is {like}, a run of mim3d {command}; give the --out of a mim3d finetune{goes}.")


def _complete(run: Path) -> dict[str, Any]:
    """The manifest of a run of which all is known that another one takes.

    Raises:
        ConfigError: It stopped before.
    """
    manifest = {"derived": {}, **read_manifest(run / MANIFEST_NAME)}
    if recipe_of(manifest)["intensity"] is None:
        manifest["derived"]["intensity"] = noted_intensity(run, manifest)
    whole = (run / SPLIT_NAME).is_file() and isinstance(manifest["inputs"].get("data"), str)
    if not whole or recipe_of(manifest)["intensity"] is None or not isinstance(manifest["settings"].get("task"), dict):
        raise ConfigError(
            f"like is {run}, which stopped before its plan was finished; go on with it first "
            f"({how_to_resume('finetune', run)}), or give another run."
        )
    return manifest


def _split_ids(run: Path) -> dict[str, set[str]]:
    content: Any = None
    with suppress(OSError, ValueError):
        content = load_json(run / SPLIT_NAME)
    try:
        return {name: {str(row["id"]) for row in content[name]} for name in ("train", "val")}
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / SPLIT_NAME} is no split that mim3d wrote; give another run as like.") from error


def _found_from_here(recipe: dict[str, Any], manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe, whose paths that are found only from the folder where its run was started begin there."""
    folder = manifest.get("working_folder")
    for name in _PATHS:
        value = recipe.get(name)
        if isinstance(value, str) and isinstance(folder, str) and not os.path.lexists(value):
            there = os.path.join(folder, value)
            recipe[name] = there if os.path.lexists(there) else value
    return recipe
