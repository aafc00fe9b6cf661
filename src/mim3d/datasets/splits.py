"""Which cases train and which validate: by patient, from a seed, so that a fold is the same everywhere."""

import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.records import Case, Split, listed


def split_cases(cases: Sequence[Case], *, fold: int = 0, num_folds: int = 5, seed: int = 0) -> Split:
    """Split cases into training and validation, never dividing a patient.

    A declared split wins: "val" validates, "test" is left out, the rest trains. Where no case is declared "val",
    the patients are shuffled within their class, dealt out to ``num_folds`` folds, and fold ``fold`` validates.
    The result depends on ids, patients, classes and the seed, not on the order of ``cases``.

    Raises:
        ConfigError: ``fold`` is not in ``0 .. num_folds - 1``, or fewer than two folds.
        DataError: Fewer patients than folds, or a declared split that leaves a part empty.
    """
    if num_folds < 2 or not 0 <= fold < num_folds:
        raise ConfigError(f"fold {fold} of {num_folds} does not exist; use num_folds >= 2 and fold 0 to num_folds - 1.")
    if any(case.split == "val" for case in cases):
        return _declared(cases)
    usable = [case for case in cases if case.split != "test"]
    held_out = _patients_of_fold(usable, fold, num_folds, seed)
    return Split(
        train=tuple(case for case in usable if case.patient not in held_out),
        val=tuple(case for case in usable if case.patient in held_out),
    )


def _declared(cases: Sequence[Case]) -> Split:
    train = tuple(case for case in cases if case.split in (None, "train"))
    val = tuple(case for case in cases if case.split == "val")
    if not train:
        raise DataError('The declared split has no case to train on; mark some cases "train".')
    shared = sorted({case.patient for case in train} & {case.patient for case in val})
    if shared:
        warnings.warn(
            f"The declared split puts {len(shared)} patients into both train and val ({listed(shared)}); "
            "validation scores will look better than they are.",
            stacklevel=3,
        )
    return Split(train=train, val=val)


def _patients_of_fold(cases: Sequence[Case], fold: int, num_folds: int, seed: int) -> set[str]:
    classes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        classes[case.patient].add(case.class_name or "")
    if len(classes) < num_folds:
        raise DataError(
            f"{len(classes)} patients cannot be dealt out to {num_folds} folds; use --num_folds {len(classes)}."
            if len(classes) > 1
            else "One patient cannot be split into training and validation; add cases of other patients."
        )
    rng = np.random.default_rng(seed)
    patients = sorted(classes)
    shuffled = [patients[index] for index in rng.permutation(len(patients))]
    # Stable: within a class the shuffled order stays, so that every fold gets its share of each class.
    dealt = sorted(shuffled, key=lambda patient: sorted(classes[patient]))
    return set(dealt[fold::num_folds])
