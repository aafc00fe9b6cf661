"""The folds of published data sets: lists that come with the package, and ours where nobody published any."""

import re
from functools import lru_cache
from importlib import resources

from mim3d.datasets.cases import Case
from mim3d.datasets.published.presets import PRESETS
from mim3d.datasets.splits import split_cases


@lru_cache
def fold_numbers(name: str) -> tuple[frozenset[str], ...] | None:
    """The numbers of the cases that each fold of a preset holds out, without leading zeros: ``35``, ``167_1``.

    Those of a set without published folds are dealt out with seed 0, over every number its owners published. None
    where the cases are not known beforehand.
    """
    preset = PRESETS[name]
    if preset.folds == "published":
        file_name = re.sub(r"[^a-z0-9]+", "_", name.lower())
        text = (resources.files("mim3d.datasets.published") / "fold_lists" / f"{file_name}.txt").read_text(
            encoding="ascii"
        )
        return tuple(frozenset(_expanded(line)) for line in text.splitlines())
    if preset.task == "classification":
        return None
    numbers = [
        Case(id=f"{number:04d}", images=(), patient=f"{number:04d}") for number in range(1, preset.num_cases + 1)
    ]
    splits = [split_cases(numbers, fold=fold, num_folds=preset.num_folds) for fold in range(preset.num_folds)]
    return tuple(frozenset(str(int(case.id)) for case in split.val) for split in splits)


def _expanded(line: str) -> list[str]:
    """``35-37 41 167_1`` as single numbers."""
    numbers = []
    for word in line.split():
        first, dash, last = word.partition("-")
        numbers += [str(number) for number in range(int(first), int(last) + 1)] if dash else [word]
    return numbers
