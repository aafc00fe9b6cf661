"""The cases of a published data set, read from a folder as its owners publish it, and the part each has in a fold."""

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.names import number_of, verb_of
from mim3d.datasets.cases import Case, CaseSet, read_slice_folders, to_cases
from mim3d.datasets.published.presets import FileNames, Preset
from mim3d.datasets.splits import split_cases
from mim3d.scans.files import walk
from mim3d.scans.grids import split_channel
from mim3d.scans.modality import declared_modality
from mim3d.scans.volumes import channels_of


@lru_cache
def fold_numbers(preset: Preset) -> tuple[frozenset[str], ...] | None:
    """The numbers of the cases that each fold of a preset holds out, without leading zeros: ``35``, ``167_1``.

    Where nobody published folds, every number that the owners published is split with seed 0. None where the cases are
    not known beforehand, as in a classification.
    """
    if preset.files is None:
        return None
    if not preset.folds:
        ids = [f"{number:04d}" for number in range(1, preset.num_cases + 1)]
        cases = [Case(id=name, images=(), patient=name) for name in ids]
        splits = [split_cases(cases, fold=fold, num_folds=preset.num_folds) for fold in range(preset.num_folds)]
        return tuple(frozenset(str(int(case.id)) for case in split.val) for split in splits)
    folds = []
    for line in preset.folds:
        numbers: set[str] = set()
        for word in line.split():
            first, dash, last = word.partition("-")
            numbers |= set(map(str, range(int(first), int(last) + 1))) if dash else {word}
        folds.append(frozenset(numbers))
    return tuple(folds)


def read_preset(
    preset: Preset, folder: str | os.PathLike[str], fold: int | None, *, strict: bool | None = None
) -> CaseSet:
    """The cases of a published data set, each declared as trained on or held out by a fold.

    Only names are read, and the headers of files that hold several channels. Hidden files, other sets in the same
    tree and cases that belong to no fold (test cases, the MRI of AMOS22) are passed over.

    Args:
        preset: Preset of the data set.
        folder: Folder of the data set, or any folder above it.
        fold: Number of the fold that is held out; None declares every case as trained on.
        strict: What happens when cases of the fold are missing. None refuses a missing held-out case and warns of
            missing training cases; True refuses both; False warns of both.

    Raises:
        ConfigError: There is no such fold.
        DataError: There is no folder or no case, a case is there twice, a part of the fold is empty, or cases are
            missing that ``strict`` refuses.
    """
    root = os.path.abspath(folder)
    root = os.path.dirname(root) if os.path.isfile(root) else root
    if not os.path.isdir(root):
        raise DataError(f"{folder}: no such folder; give the folder of {preset.name} as its owners publish it.")
    cases = _read_slices(preset, root) if preset.files is None else _read_files(preset, preset.files, root)
    declared = declare_fold(preset, root, cases, fold, strict=strict)
    return CaseSet(root=root, form="preset", cases=declared, labels=dict(preset.labels))


def declare_fold(
    preset: Preset, root: str, cases: Sequence[Case], fold: int | None, *, strict: bool | None = None
) -> tuple[Case, ...]:
    """Those of the cases that belong to a fold, each declared as trained on or held out, by the names of its files.

    Args:
        preset: Preset of the data set.
        root: Folder or cache that the cases come from, for messages.
        cases: Cases of the data set, as read from its files or kept in a cache.
        fold: Number of the fold, as for ``read_preset``.
        strict: What happens when cases are missing, as for ``read_preset``.

    Raises:
        ConfigError: There is no such fold.
        DataError: As for ``read_preset``.
    """
    if fold is not None and not 0 <= fold < preset.num_folds:
        raise ConfigError(f"preset {preset.name} has the folds 0 to {preset.num_folds - 1}, but fold is {fold}.")
    folds, files = fold_numbers(preset), preset.files
    if folds is None or files is None:
        split = None if fold is None else split_cases(cases, fold=fold, num_folds=preset.num_folds)
        held_out_ids = {case.id for case in split.val} if split else set()
        return tuple(replace(case, split="val" if case.id in held_out_ids else "train") for case in cases)
    by_number = {_number(split_channel(case.images[0])[0], files.image): case for case in cases}
    every, held_out = frozenset().union(*folds), frozenset() if fold is None else folds[fold]
    here = sorted(every & by_number.keys(), key=_place)
    if not here:
        raise DataError(
            f"{root}: no case of {preset.name} in here; expected files such as "
            f"{files.names_of(min(every, key=_place))}, as its owners publish them ({preset.url})."
        )
    named = preset.name if fold is None else f"fold {fold} of {preset.name}"
    for numbers, part, refused in (
        (held_out, f"{named} holds out", strict is not False),
        (every - held_out, f"{named} trains on", strict is True),
    ):
        missing = sorted(numbers - by_number.keys(), key=_place)
        if not missing:
            continue
        text = (
            f"{root}: {len(missing)} of the {number_of(len(numbers), 'case')} that {part} "
            f"{verb_of(len(missing), 'are')} not here, the first is {files.names_of(missing[0])}"
        )
        if len(missing) == len(numbers):
            raise DataError(f"{text}; without any of them there is nothing to compare, so add some of them.")
        if refused:
            remedy = "" if strict else ", or go on without them by --strict false"
            raise DataError(f"{text}; add them ({preset.url}){remedy}.")
        warnings.warn(f"{text}; scores cannot be compared with those of the whole set.", stacklevel=2)
    return tuple(replace(by_number[number], split="val" if number in held_out else "train") for number in here)


def _read_slices(preset: Preset, root: str) -> tuple[Case, ...]:
    """The scans below the folders of the classes, each a folder of slice images; folders of other names are left."""
    homes = []
    for folder, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if len(preset.classes.keys() & set(names)) > 1:
            homes.append(folder)
            names.clear()
    if len(homes) != 1:
        found = f"{listed(homes)} all hold" if homes else "no folder in here holds"
        raise DataError(
            f"{root}: {found} the folders {', '.join(preset.classes)} of {preset.name}; give one folder of it, as its "
            f"owners publish it ({preset.url})."
        )
    return tuple(case for case in read_slice_folders(homes[0]).cases if case.class_name in preset.classes)


def _read_files(preset: Preset, files: FileNames, root: str) -> tuple[Case, ...]:
    """The cases whose image and label map are both there, in rising order of their numbers."""
    paths = list(walk(root))
    images, labels = (_by_number(preset, pattern, paths) for pattern in (files.image, files.label))
    entries = []
    modality = declared_modality(preset.channels)
    for number in sorted(images.keys() & labels.keys(), key=_place):
        channels = channels_of(images[number]) if len(preset.channels) > 1 else (images[number],)
        if len(channels) != len(preset.channels):
            raise DataError(
                f"{images[number]}: holds {number_of(len(channels), 'channel')}, but {preset.name} has "
                f"{len(preset.channels)} ({', '.join(preset.channels)}) in one file; give the set as its "
                f"owners publish it ({preset.url})."
            )
        # What follows "_" in a number separates several scans of one patient.
        patient = f"{preset.name} {number.partition('_')[0]}"
        entries.append(Case(images=channels, label=labels[number], patient=patient, modality=modality))
    return to_cases(entries, root)


def _by_number(preset: Preset, pattern: str, paths: Iterable[str]) -> dict[str, str]:
    """The files of the folds of a preset whose paths end in a pattern, by the number of their case."""
    wanted = frozenset().union(*(fold_numbers(preset) or ()))
    found: dict[str, str] = {}
    for path in paths:
        number = _number(path, pattern)
        if number in wanted and found.setdefault(number, path) != path:
            raise DataError(
                f"{path}: the same case of {preset.name} as {found[number]}; keep one copy of the data set below the "
                "folder, or name the folder of one."
            )
    return found


def _number(path: str, pattern: str) -> str:
    """The number of the case that a path belongs to, without leading zeros; empty for another path."""
    match = re.fullmatch(rf"(?:.*/)?{pattern}", path.replace(os.sep, "/"), re.DOTALL)
    return re.sub(r"^0+(?=\d)", "", match["case"]) if match else ""


def _place(number: str) -> tuple[int, str]:
    first, _, more = number.partition("_")
    return int(first), more
