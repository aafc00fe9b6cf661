"""The preset of a published data set below the settings of fine-tuning: its cases, and the split of a fold."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mim3d.backbones.contract import round_up, size_text
from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.run_folder import is_first_process
from mim3d.core.settings import to_named
from mim3d.core.types import Named, Triple
from mim3d.datasets.cases import CaseSet, check_cases
from mim3d.datasets.published.folds import declare_fold, read_preset
from mim3d.datasets.published.presets import Preset, find_preset
from mim3d.datasets.splits import Split
from mim3d.tasks import TASKS, create_task
from mim3d.tasks.augmentation import sided_labels
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.schedule import Optimisation
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.held_out import choose_split
from mim3d.workflows.shared.initialisation import DEFAULT_BACKBONE, asked_recipe

#: Task of a preset that is for another one than this: what the command takes where nothing is asked for.
_UNASKED_TASK = "segmentation"


def apply_preset(settings: FinetuneSettings) -> tuple[FinetuneSettings, CaseSet | Cache, Split]:
    """Put a preset below what the user asked for; find the cases, and the split of the fold.

    What is None (or, of ``task``, ``backbone`` and ``optim``, not set) is taken from the preset; all else stays.

    Args:
        settings: Settings as the user gave them; ``preset`` names the preset or an alias of it, and ``data`` is the
            data set as published, or a cache of it.

    Returns:
        The new settings, the data set (with what headers can tell checked) or cache, and the split.
    Raises:
        ConfigError: Unknown preset or fold, a task the preset is not for, or a cache of another voxel size.
        DataError: Cases that are missing or cannot be used.
    """
    assert settings.preset is not None
    preset = find_preset(settings.preset)
    settings = with_own_folds(preset, settings)
    multiple = asked_recipe(settings.backbone, settings.weights)[0].input_multiple
    merged = with_preset(settings, preset, multiple)
    data, fold, strict = settings.data, settings.single_fold, settings.strict
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
        source = read_preset(preset, data, fold, strict=strict)
        check_cases(source, need_labels=preset.task == "segmentation")
        cases = source.cases
    split = choose_split(cases, fold=fold, num_folds=preset.num_folds, part=settings.train_part)
    if is_first_process():
        _print_preset(preset, split, merged.task, multiple)
    return merged, source, split


def with_own_folds(preset: Preset, settings: FinetuneSettings) -> FinetuneSettings:
    """Settings with the number of folds of the preset.

    Raises:
        ConfigError: Another number of folds is asked for, or a seed to split them by.
    """
    for name, own in (("num_folds", preset.num_folds), ("split_seed", 0)):
        if getattr(settings, name) not in (own, getattr(FinetuneSettings, name)):
            raise ConfigError(
                f"{name} is {getattr(settings, name)}, but the {preset.num_folds} folds of preset {preset.name} are "
                f"fixed; leave {name} out."
            )
    return replace(settings, num_folds=preset.num_folds)


def with_preset(settings: FinetuneSettings, preset: Preset, multiple: Triple) -> FinetuneSettings:
    """Settings with those of a preset where the user gave none; the patch is rounded up to whole tokens.

    Args:
        settings: Settings as the user gave them.
        preset: Preset of the data set.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
    Raises:
        ConfigError: The preset is for another task.
    """
    optim = Optimisation(
        base_learning_rate=preset.base_learning_rate,
        reference_batch=preset.reference_batch,
        weight_decay=preset.weight_decay,
        warmup_ratio=preset.warmup_epochs / preset.epochs,
    )
    max_epochs = settings.max_epochs
    if max_epochs is not None:
        # In epochs as published, unless that would be most of a short run.
        ratio = preset.warmup_epochs / max_epochs
        optim = replace(optim, warmup_ratio=min(preset.warmup_epochs / preset.epochs, ratio))
    elif settings.max_steps is None:
        max_epochs = preset.epochs
    patch_size = list(round_up(preset.patch_size, multiple))
    if preset.task == "classification":
        task: dict[str, Any] = {"name": "classification", "fit": "scan", "size": patch_size}
    else:
        task = {
            "name": "segmentation",
            "patch_size": patch_size,
            "positive_ratio": preset.positive_ratio,
            "overlap": preset.overlap,
        }
        if preset.regions is not None:
            task["regions"] = {name: list(values) for name, values in preset.regions.items()}
    if preset.variation is not None:
        # As published: along every axis, whatever the labels' names say, and nothing that is not named.
        unnamed = {"flip_axes": [0, 1, 2], "scale_prob": 0.0, "gamma_prob": 0.0}
        task["augmentation"] = {**unnamed, **dataclasses.asdict(preset.variation)}
    return replace(
        settings,
        task=_merged_task(preset, task, settings.task),
        backbone=_merged_backbone(len(preset.channels), settings.backbone, settings.weights),
        spacing_mm=preset.spacing_mm if settings.spacing_mm is None else settings.spacing_mm,
        intensity=preset.intensity if settings.intensity is None else settings.intensity,
        num_folds=preset.num_folds,
        max_epochs=max_epochs,
        optim=settings.optim.filled_from(optim),
    )


def _print_preset(preset: Preset, split: Split, task: Any, multiple: Triple) -> None:
    """Print what the preset comes to in this run."""
    kind = "published folds" if preset.folds else "seeded folds by patient"
    print(f"preset {preset.name} ({kind}): {len(split.train)} cases to train on, {len(split.val)} held out")
    rounded = round_up(preset.patch_size, multiple)
    used = task.get("patch_size", task.get("size")) if isinstance(task, Mapping) else None
    if rounded != preset.patch_size and used is not None and tuple(used) == rounded:
        published, taken = (" x ".join(map(str, size)) for size in (preset.patch_size, rounded))
        token = size_text(multiple)
        print(f"crops of {published} voxels, as published, are rounded up to {taken}: whole tokens of {token} voxels")
    # Structures whose names tell left from right (or another side) may be mirrored.
    if preset.variation is None or not isinstance(task, Mapping) or task.get("name") not in TASKS:
        return
    asked = create_task(dict(task))
    if not isinstance(asked, Segmentation) or asked.augmentation.flip_prob == 0:
        return
    axes = asked.augmentation.flip_axes or ()
    sided = dict.fromkeys(name for axis in axes for name in sided_labels(preset.labels, axis))
    if sided:
        free = " ".join(str(axis) for axis in axes if not sided_labels(preset.labels, axis))
        remedy = f"--task.augmentation.flip_axes {free}" if free else "--task.augmentation.flip_prob 0"
        print(
            f"crops are mirrored along {', '.join('XYZ'[axis] for axis in axes)}, as published, although labels name "
            f"a side ({listed(list(sided))}); to keep the sides apart: {remedy}"
        )


def _merged_task(preset: Preset, given: Mapping[str, Any], asked: Any) -> Any:
    """The task asked for on top of the preset's; a task of the user's own stays as it is.

    Raises:
        ConfigError: The preset is for another task.
    """
    own = {"name": asked} if isinstance(asked, str) else dict(asked) if isinstance(asked, Mapping) else None
    if own is None:
        own = {"name": _UNASKED_TASK}
        if dataclasses.is_dataclass(asked):
            # Its name, and those of its settings that are not its defaults.
            defaults: Any = type(asked)
            written, plain = to_named(asked, TASKS), to_named(defaults(), TASKS)
            own = {key: value for key, value in written.items() if key == "name" or value != plain[key]}
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


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping) and key != "regions"
        merged[key] = _overlaid(under, value) if both and isinstance(under, Mapping) else value
    return merged


def _merged_backbone(num_channels: int, asked: Named | None, weights: str | None) -> Named | None:
    """The backbone with as many input channels as the data set; that of the weights is adapted to the data anyway."""
    if asked is None:
        return None if weights is not None else {"name": DEFAULT_BACKBONE, "in_channels": num_channels}
    if isinstance(asked, str):
        return {"name": asked, "in_channels": num_channels}
    return {"in_channels": num_channels, **asked} if isinstance(asked, Mapping) else asked
