"""What is learned from: the cases that the settings name, split into those to train on and those that are held out."""

from typing import NamedTuple

from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.core.errors import DataError, listed
from mim3d.core.progress import say
from mim3d.datasets.cases import CaseSet
from mim3d.datasets.published.folds import declare_fold, read_preset
from mim3d.datasets.published.presets import Preset, find_preset
from mim3d.datasets.splits import Split
from mim3d.datasets.usable import usable_cases
from mim3d.tasks import create_task
from mim3d.tasks.contract import Task
from mim3d.workflows.finetune.presets import describe_preset, with_declared, with_preset
from mim3d.workflows.finetune.settings import FinetuneSettings
from mim3d.workflows.shared.first_screen import say_split
from mim3d.workflows.shared.initialisation import asked_recipe
from mim3d.workflows.shared.inputs import read_data, unreadable_of


class TrainingData(NamedTuple):
    """What is learned, and from what.

    Attributes:
        settings: The settings, with those of a preset where the user gave none.
        task: The task of these settings.
        source: The data set, with what headers can tell checked, or the cache.
        split: The cases of it to train and to validate on.
    """

    settings: FinetuneSettings
    task: Task
    source: CaseSet | Cache
    split: Split


def read_training_data(settings: FinetuneSettings) -> TrainingData:
    """Read what a run learns from; no voxel is read. What a preset comes to is printed.

    Args:
        settings: Settings as the user gave them. Where ``preset`` names a preset, ``data`` is its data set as
            published, or a cache of it.

    Raises:
        ConfigError: Unknown task, preset or fold, or a task that the preset is not for.
        DataError: Cases that are missing or cannot be used.
    """
    if settings.preset is None:
        task = create_task(settings.task)
        source = read_data(
            settings.data, lacks=task.lacks, keep_labels=True, strict=bool(settings.strict), **settings.declared
        )
        settings = with_declared(settings, source)
        task = create_task(settings.task)
        unreadable = unreadable_of(source)
        split = settings.split(source.cases, unreadable)
        say_split(settings, source.cases, unreadable, split)
        return TrainingData(settings, task, source, split)
    preset = find_preset(settings.preset)
    multiple = asked_recipe(settings.backbone, settings.weights)[0].input_multiple
    settings = with_preset(settings, preset, multiple)
    task = create_task(settings.task)
    source, split = _read_published(preset, settings, task)
    for line in describe_preset(preset, split, task, multiple):
        say(line)
    return TrainingData(settings, task, source, split)


def _read_published(preset: Preset, settings: FinetuneSettings, task: Task) -> tuple[CaseSet | Cache, Split]:
    data, fold, strict = settings.data, settings.single_fold, settings.strict
    if not is_cache(data):
        source = usable_cases(
            read_preset(preset, data, fold, strict=strict), lacks=task.lacks, strict=bool(settings.strict)
        )
        return source, settings.split(source.cases, source.unreadable)
    cache = open_cache(data)
    cases = declare_fold(preset, cache.path, cache.cases, fold, strict=strict)
    unlabelled = [scan.case.id for scan in cache.subset(cases) if task.needs == "label" and not scan.has_label]
    if unlabelled:
        raise DataError(
            f"{data} is a cache of scans without labels, such as pre-training makes ({listed(unlabelled)}); make one "
            f"from the folder of {preset.name} first (mim3d cache DATA --out CACHE), or give that folder."
        )
    return cache, settings.split(cases)
