"""The first lines of a run: what was understood and what will be done. How numbers follow is left to ``verbose``."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mim3d.backbones import BACKBONES, Backbone
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.settings import to_named
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split, declared_folds

if TYPE_CHECKING:
    from mim3d.workflows.finetune.settings import FinetuneSettings


def network_line(learned: str, recipe: Backbone, weights: str | None) -> str:
    """What learns, and from where it starts.

    Args:
        learned: Name of the method or task.
        recipe: Settings of the encoder.
        weights: Where its weights come from; None from scratch.
    """
    start = "from scratch" if weights is None else f"from {weights}"
    name = to_named(recipe, BACKBONES)["name"]
    token = " x ".join(map(str, recipe.token_size))
    return f"network: {learned} on {name} with tokens of {token} voxels, {start}"


def say_what_is_learned(summary: Sequence[str], details: Sequence[str], *, verbose: bool) -> None:
    """Print what a sample is; the details too where they are asked for."""
    for line in (*summary, *(details if verbose else ())):
        say(line)


def fold_line(
    fold: int | None,
    num_folds: int,
    every: Sequence[Case],
    num_learned: int,
    num_held_out: int,
    held_out_list: str | None = None,
) -> str:
    """How many cases are learned from and held out, and by what.

    Args:
        fold: Number of the fold; None where none was asked for.
        num_folds: Number of folds that it is one of.
        every: All cases of the data set.
        num_learned: Number of cases to learn from.
        num_held_out: Number of cases that are held out.
        held_out_list: File that names them, where one is given in place of a fold.
    """
    parts = f"{number_of(num_learned, 'case')} to learn from, {num_held_out or 'none'} held out"
    if held_out_list is not None:
        return f"held out by {held_out_list}: {parts}"
    if fold is None and not num_held_out:
        return f"no fold: {parts}"
    if fold is None or any(case.split == "val" for case in every):
        return f"split that the data set declares: {parts}"
    declared = declared_folds(every)
    where = f"fold {fold} of {len(declared)} that the data set declares" if declared else f"fold {fold} of {num_folds}"
    return f"{where}: {parts}"


def say_split(settings: "FinetuneSettings", every: Sequence[Case], unreadable: Sequence[Case], split: Split) -> None:
    """Print which cases fine-tuning learns from: the fold, and where few are taken of it, how many and by what."""
    whole = replace(settings, train_fraction=1.0, train_cases=None, train_list=None)
    full = whole.split(every, unreadable)
    numbers = len(full.train), len(full.val)
    say(fold_line(settings.single_fold, settings.num_folds, every, *numbers, settings.held_out_list))
    asked = {name: getattr(settings, name) for name in ("train_fraction", "train_cases", "train_list")}
    given = [f"{name} {value}" for name, value in asked.items() if value != getattr(whole, name)]
    if given:
        few, all_of_them = (len({case.patient for case in part.train}) for part in (split, full))
        given += [] if settings.train_list else [f"train_seed {settings.train_seed}"]
        say(
            f"few-shot: {len(split.train)} of {number_of(len(full.train), 'case')}, {few} of "
            f"{number_of(all_of_them, 'patient')} ({', '.join(given)})"
        )
