"""The preset of a published data set below the settings of fine-tuning: what the user leaves open is taken from it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mim3d.backbones.contract import round_up, size_text
from mim3d.caching.cache import Cache
from mim3d.core.errors import ConfigError, listed
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Named, Triple
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.published.presets import Preset
from mim3d.datasets.splits import Split
from mim3d.tasks import TASKS, create_task, find_task
from mim3d.tasks.augmentation import sided_labels
from mim3d.tasks.contract import CropTask, Task
from mim3d.training.schedule import Optimisation
from mim3d.workflows.finetune.schedules import schedule_of
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.initialisation import DEFAULT_BACKBONE

#: What the command takes where no task is asked for; it gives way to the task of a preset.
_UNASKED_TASK = "segmentation"


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
    """Settings with those of a preset where the user gave none.

    What is None (or, of ``task``, ``backbone`` and ``optim``, not set) is taken from the preset; all else stays.

    Args:
        settings: Settings as the user gave them.
        preset: Preset of the data set.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder; that of the preset is rounded
            up to it.
    Raises:
        ConfigError: The preset is for another task, or has folds of its own.
    """
    settings = with_own_folds(preset, settings)
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
    return replace(
        settings,
        task=_merged_task(preset, round_up(preset.patch_size, multiple), settings.task),
        backbone=_merged_backbone(len(preset.channels), settings.backbone, settings.weights),
        spacing_mm=preset.spacing_mm if settings.spacing_mm is None else settings.spacing_mm,
        intensity=preset.intensity if settings.intensity is None else settings.intensity,
        max_epochs=max_epochs,
        optim=settings.optim.filled_from(schedule_of(settings).optim).filled_from(optim),
    )


def describe_preset(preset: Preset, split: Split, task: Task, multiple: Triple) -> list[str]:
    """Lines that say what a preset comes to in a run.

    Args:
        preset: The preset.
        split: Its cases in the fold of the run.
        task: The task of the run.
        multiple: Voxels along X, Y, Z that a patch must be a multiple of for the encoder.
    """
    kind = "published folds" if preset.folds else "seeded folds by patient"
    lines = [
        f"preset {preset.name} ({kind}): {number_of(len(split.train), 'case')} to train on, {len(split.val)} held out"
    ]
    if type(task) is not find_task(preset.task):
        own = f"{type(task).__module__}.{type(task).__qualname__}"
        return [*lines, f"preset {preset.name}: crops and their variation are those of the task {own} itself"]
    rounded = round_up(preset.patch_size, multiple)
    if rounded != preset.patch_size and getattr(task, task.sized_by) == rounded:
        published, taken = (" x ".join(map(str, size)) for size in (preset.patch_size, rounded))
        token = size_text(multiple)
        lines.append(
            f"crops of {published} voxels, as published, are rounded up to {taken}: whole tokens of {token} voxels"
        )
    # Structures whose names tell left from right (or another side) may be mirrored.
    if preset.variation is None or not isinstance(task, CropTask) or task.augmentation.flip_prob == 0:
        return lines
    axes = task.augmentation.flip_axes or ()
    sided = dict.fromkeys(name for axis in axes for name in sided_labels(preset.labels, axis))
    if sided:
        free = " ".join(str(axis) for axis in axes if not sided_labels(preset.labels, axis))
        remedy = f"--task.augmentation.flip_axes {free}" if free else "--task.augmentation.flip_prob 0"
        lines.append(
            f"crops are mirrored along {', '.join('XYZ'[axis] for axis in axes)}, as published, although labels name "
            f"a side ({listed(list(sided))}); to keep the sides apart: {remedy}"
        )
    return lines


def with_declared(settings: FinetuneSettings, source: CaseSet | Cache) -> FinetuneSettings:
    """Settings whose task knows what the data set declares of its labels, where the user did not say otherwise.

    That are the ignored value, and the regions with the values that they give in predictions; both are printed. A task
    without such settings stays as it is.

    Args:
        settings: Settings as the user gave them.
        source: The data set or cache.
    """
    asked: Any = settings.task
    task: Any = create_task(asked)
    given = set(asked) if isinstance(asked, Mapping) else set()
    if dataclasses.is_dataclass(asked):
        given = {name for name in ("ignore_label", "regions", "region_values") if getattr(task, name, None) is not None}
    known = {item.name for item in dataclasses.fields(task)} - given
    declared: dict[str, Any] = {}
    if source.ignore_label is not None and "ignore_label" in known:
        declared["ignore_label"] = source.ignore_label
        say(f"label value {source.ignore_label} is ignored, as the data set declares it: nothing is learned from it")
    if source.regions and "regions" in known:
        declared["regions"] = dict(source.regions)
        if source.region_values is not None and "region_values" in known:
            declared["region_values"] = source.region_values
        members = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in source.regions.items())
        say(f"regions, as the data set declares them by label values: {members}")
    if not declared:
        return settings
    if dataclasses.is_dataclass(asked):
        return replace(settings, task=replace(task, **declared))
    own = {"name": asked} if isinstance(asked, str) else dict(asked or {})
    return replace(settings, task={**own, **{name: to_mapping(value) for name, value in declared.items()}})


def _merged_task(preset: Preset, patch_size: Triple, asked: Any) -> Any:
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
        return asked
    if name not in (_UNASKED_TASK, preset.task):
        raise ConfigError(f"preset {preset.name} is for {preset.task}, but task is {name}; leave task out.")
    published = to_named(find_task(preset.task).of_preset(preset, patch_size), TASKS)
    return _overlaid(published, {**own, "name": preset.task})


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
