"""Which cases a run trains on and which it holds out: chosen, written down, and found again by prediction."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mim3d.data.case_datasets import read_json
from mim3d.data.cases import Case, Split, split_cases
from mim3d.errors import ConfigError, DataError
from mim3d.run import Run
from mim3d.run_files import write_json

SPLIT_NAME = "split.json"
LIST_NAME = "held_out.csv"


def choose_split(cases: Sequence[Case], *, fold: int | None, num_folds: int, train_fraction: float) -> Split:
    """Split the cases of a data set, and keep a share of those to train on.

    Folds and shares depend on the data set alone, so that methods and seeds are compared on the same cases.

    Args:
        cases: all of the data set.
        fold: which fold is held out; None holds nothing out.
        num_folds: folds in all.
        train_fraction: share of the training patients kept; a smaller share is part of a larger one.
    Raises:
        ConfigError: a fold or share that does not exist.
        DataError: cases that cannot be split.
    """
    if not 0 < train_fraction <= 1:
        raise ConfigError(f"train_fraction is {train_fraction}; it must be above 0 and at most 1.")
    if fold is None:
        split = Split(train=tuple(case for case in cases if case.split in (None, "train")), val=())
    else:
        split = split_cases(cases, fold=fold, num_folds=num_folds)
    if not split.train:
        raise DataError('No case is left to train on; mark some "train" in the list.')
    return Split(train=_share(split.train, train_fraction), val=split.val)


def _share(cases: Sequence[Case], ratio: float) -> tuple[Case, ...]:
    patients = sorted({case.patient for case in cases})
    shuffled = np.random.default_rng(0).permutation(len(patients))
    number = max(1, int(ratio * len(patients) + 0.5))
    kept = {patients[index] for index in shuffled[:number]}
    return tuple(case for case in cases if case.patient in kept)


def write_split(run: Run, split: Split) -> None:
    """Write the ids of both parts to ``split.json``, and the held-out cases as a list that is DATA again."""
    if not run.writes:
        return
    parts = {"train": split.train, "val": split.val}
    write_json(run.path / SPLIT_NAME, {name: [_record(case) for case in part] for name, part in parts.items()})
    with open(run.path / LIST_NAME, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "label", "class", "patient"])
        for case in split.val:
            rows.writerow([";".join(case.images), case.label or "", case.class_name or "", case.patient])


def held_out_cases(run: Path) -> list[Case]:
    """The held-out cases of a run, under the ids they had there.

    Args:
        run: a run of fine-tuning, or its segmenter folder.
    Raises:
        DataError: when the run holds no split, or nothing was held out.
    """
    path = next((folder / SPLIT_NAME for folder in (run, run.parent) if (folder / SPLIT_NAME).is_file()), None)
    if path is None:
        raise DataError(f"{run} has no {SPLIT_NAME} that lists held-out cases; name the scans with --input.")
    try:
        cases = [
            Case(
                id=str(row["id"]),
                images=tuple(str(image) for image in row["images"]),
                label=row["label"],
                patient=str(row["patient"]),
            )
            for row in read_json(str(path))["val"]
        ]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is no split that mim3d wrote ({error!r}); name the scans with --input.") from error
    if not cases:
        raise DataError(f"{run} held no case out; name the scans with --input.")
    return cases


def _record(case: Case) -> dict[str, object]:
    return {"id": case.id, "images": list(case.images), "label": case.label, "patient": case.patient}
