"""From the preset of a published data set to the settings of fine-tuning, its cases and the split of a fold."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.run_folder import is_first_process
from mim3d.core.settings import to_named
from mim3d.core.types import Triple
from mim3d.datasets.cases import CaseSet, check_cases
from mim3d.datasets.published.layouts import declare_fold, read_preset
from mim3d.datasets.published.presets import Preset, Variation, find_preset
from mim3d.datasets.splits import Split, TrainPart
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.segmentation.augmentation import sided_labels
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.optimisation import Optimisation
from mim3d.workflows.finetune.start import DEFAULT_BACKBONE, asked_recipe
from mim3d.workflows.shared.held_out import choose_split

#: Tasks that a preset replaces when it is for another one: what the command takes where nothing is asked for.
_UNASKED_TASK = "segmentation"


def apply_preset(name: str, data: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], CaseSet | Cache, Split]:
    """Fine-tuning's arguments with a preset below what the user asked for, the cases, and the split of the fold.

    What is None (or, of ``task``, ``backbone`` and ``optim``, not set) is taken from the preset; all else stays.

    Args:
        name: of the preset, or an alias.
        data: folder of the data set as published, or a cache of it.
        arguments: of ``finetune``, complete; not changed.

    Returns:
        The merged arguments, the data set (with what headers can tell checked) or cache, and the split.
    Raises:
        ConfigError: unknown preset or fold, a task the preset is not for, or a cache of another voxel size.
        DataError: cases that are missing or cannot be used.
    """
    preset = find_preset(name)
    edge = asked_recipe(arguments.get("backbone"), arguments.get("weights"))[0].patch_size
    fold, strict = arguments.get("fold"), arguments.get("strict")
    require_own_folds(preset, arguments)
    merged = _merged(preset, preset_settings(preset, fold, edge), arguments)
    source: CaseSet | Cache
    if is_cache(data):
        source = open_cache(data)
        cases = declare_fold(preset, source.path, source.cases, fold, strict=strict)
        unlabelled = [scan.case.id for scan in source.subset(cases) if not scan.has_label]
        if preset.task == "segmentation" and unlabelled:
            raise DataError(
                f"{data} is a cache of scans without labels, such as pre-training makes ({listed(unlabelled)}); make "
                f"one from the folder of {preset.name} first (mim3d cache DATA --out CACHE), or give that folder."
            )
    else:
        source, _ = read_preset(preset, data, fold, strict=strict)
        check_cases(source, need_labels=preset.task == "segmentation")
        cases = source.cases
    split = choose_split(cases, fold=fold, num_folds=preset.num_folds, part=TrainPart.of(arguments))
    if is_first_process():
        _say(preset, split, merged["task"], edge)
    return merged, source, split


def require_own_folds(preset: Preset, arguments: Mapping[str, Any]) -> None:
    """Refuse other folds than those of the preset.

    Raises:
        ConfigError: another number of folds, or a seed to deal them out by.
    """
    for name, own in (("num_folds", preset.num_folds), ("split_seed", 0)):
        if arguments.get(name, own) != own:
            raise ConfigError(
                f"{name} is {arguments[name]}, but the {preset.num_folds} folds of preset {preset.name} are fixed; "
                f"leave {name} out."
            )


def preset_settings(preset: Preset, fold: int | None, backbone_patch_edge: int) -> dict[str, Any]:
    """Arguments of ``finetune`` that a preset gives: defaults that lie below the user's own.

    The patch is rounded up to whole tokens.

    Args:
        preset: of the data set.
        fold: that is held out.
        backbone_patch_edge: voxels along the edge of the encoder's tokens.
    """
    patch_size = _whole_tokens(preset.patch_size, backbone_patch_edge)
    if preset.task == "classification":
        task: dict[str, Any] = {"name": "classification", "fit": "scan", "size": list(patch_size)}
    else:
        task = {
            "name": "segmentation",
            "patch_size": list(patch_size),
            "positive_ratio": preset.positive_ratio,
            "overlap": preset.overlap,
        }
        if preset.regions is not None:
            task["regions"] = {name: list(values) for name, values in preset.regions.items()}
    if preset.variation is not None:
        task["augmentation"] = _augmentation(preset.variation)
    return {
        "task": task,
        "backbone": {"in_channels": len(preset.channels)},
        "spacing_mm": preset.spacing_mm,
        "intensity": preset.intensity,
        "fold": fold,
        "num_folds": preset.num_folds,
        "max_epochs": preset.epochs,
        "optim": Optimisation(
            base_learning_rate=preset.base_learning_rate,
            reference_batch=preset.reference_batch,
            weight_decay=preset.weight_decay,
            warmup_ratio=preset.warmup_epochs / preset.epochs,
        ),
    }


def _augmentation(variation: Variation) -> dict[str, Any]:
    """As published: along every axis, whatever the labels' names say, and nothing that is not named."""
    return {
        "flip_axes": [0, 1, 2],
        "scale_prob": 0.0,
        "gamma_prob": 0.0,
        **dataclasses.asdict(variation),
    }


def _whole_tokens(size: Triple, edge: int) -> Triple:
    x, y, z = (-(-voxels // edge) * edge for voxels in size)
    return x, y, z


def _say(preset: Preset, split: Split, task: Any, edge: int) -> None:
    """Print what the preset comes to in this run."""
    kind = "published folds" if preset.folds == "published" else "seeded folds by patient"
    print(f"preset {preset.name} ({kind}): {len(split.train)} cases to train on, {len(split.val)} held out")
    rounded = _whole_tokens(preset.patch_size, edge)
    used = task.get("patch_size", task.get("size")) if isinstance(task, Mapping) else None
    if rounded != preset.patch_size and used is not None and tuple(used) == rounded:
        told, taken = (" x ".join(map(str, size)) for size in (preset.patch_size, rounded))
        print(f"crops of {told} voxels, as published, are rounded up to {taken}: whole tokens of {edge} voxels")
    mirrored = _mirrored(preset, task)
    if mirrored:
        print(mirrored)


def _mirrored(preset: Preset, task: Any) -> str | None:
    """A line where structures whose names tell left from right (or another side) are mirrored; None elsewhere."""
    if preset.variation is None or not isinstance(task, Mapping) or task.get("name") not in TASKS:
        return None
    asked = create_task(dict(task))
    if not isinstance(asked, Segmentation) or asked.augmentation.flip_prob == 0:
        return None
    axes = asked.augmentation.flip_axes or ()
    sided = dict.fromkeys(name for axis in axes for name in sided_labels(preset.labels, axis))
    if not sided:
        return None
    free = " ".join(str(axis) for axis in axes if not sided_labels(preset.labels, axis))
    remedy = f"--task.augmentation.flip_axes {free}" if free else "--task.augmentation.flip_prob 0"
    return (
        f"crops are mirrored along {', '.join('XYZ'[axis] for axis in axes)}, as published, although labels name a "
        f"side ({listed(list(sided))}); to keep the sides apart: {remedy}"
    )


def _merged(preset: Preset, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(arguments)
    merged["task"] = _merged_task(preset, given["task"], arguments.get("task"))
    merged["backbone"] = _merged_backbone(given["backbone"], arguments.get("backbone"), arguments.get("weights"))
    merged["num_folds"] = given["num_folds"]
    for name in ("spacing_mm", "intensity"):
        if merged.get(name) is None:
            merged[name] = given[name]
    optim = given["optim"]
    if merged.get("max_steps") is None and merged.get("max_epochs") is None:
        merged["max_epochs"] = given["max_epochs"]
    elif merged.get("max_epochs") is not None:
        # In epochs as published, unless that would be most of a short run.
        ratio = min(optim.warmup_ratio, preset.warmup_epochs / merged["max_epochs"])
        optim = dataclasses.replace(optim, warmup_ratio=ratio)
    merged["optim"] = (merged.get("optim") or Optimisation()).filled_from(optim)
    return merged


def _merged_task(preset: Preset, given: Mapping[str, Any], asked: Any) -> Any:
    """The task asked for on top of the preset's; a task of the user's own stays as it is.

    Raises:
        ConfigError: the preset is for another task.
    """
    own = {"name": asked} if isinstance(asked, str) else dict(asked) if isinstance(asked, Mapping) else None
    if own is None:
        own = _changes(asked) if dataclasses.is_dataclass(asked) else {"name": _UNASKED_TASK}
    name = own.get("name", _UNASKED_TASK)
    if name not in TASKS:
        if "." in name:
            print(f"preset {preset.name}: crops and their variation are those of the task {name} itself")
        return asked
    if name == _UNASKED_TASK:
        own["name"] = given["name"]
    elif name != given["name"]:
        raise ConfigError(f"preset {preset.name} is for {given['name']}, but task is {name}; leave task out.")
    return _overlaid(given, own)


def _changes(task: Any) -> dict[str, Any]:
    """The name of a task and those of its settings that are not its defaults."""
    written, plain = to_named(task, TASKS), to_named(type(task)(), TASKS)
    return {key: value for key, value in written.items() if key == "name" or value != plain[key]}


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping) and key != "regions"
        merged[key] = _overlaid(under, value) if both and isinstance(under, Mapping) else value
    return merged


def _merged_backbone(given: Mapping[str, Any], asked: Any, weights: str | None) -> Any:
    """The backbone with as many input channels as the data set; that of the weights is adapted to the data anyway."""
    if asked is None:
        return None if weights is not None else {"name": DEFAULT_BACKBONE, **given}
    if isinstance(asked, str):
        return {"name": asked, **given}
    return {**given, **asked} if isinstance(asked, Mapping) else asked
