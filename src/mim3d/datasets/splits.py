"""Which cases train and which validate, by patient and from a seed, and which part of the training cases is used."""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mim3d.core.errors import BothSetError, ConfigError, DataError, listed
from mim3d.core.names import number_of
from mim3d.core.settings import nearest
from mim3d.core.warned import LeakWarning
from mim3d.datasets.cases import Case


class EmptyPartError(DataError):
    """None of the cases of one part of a split can be used."""


@dataclass(frozen=True)
class Split:
    """The two parts of a data set in one fold.

    Attributes:
        train: Cases that are trained on.
        val: Cases that are held out for validation.
    """

    train: tuple[Case, ...]
    val: tuple[Case, ...]

    def without(self, cases: Sequence[Case]) -> "Split":
        """The same split without some cases.

        Raises:
            EmptyPartError: A part that had cases has none left.
        """
        ids = {case.id for case in cases}
        parts = {name: tuple(c for c in part if c.id not in ids) for name, part in vars(self).items()}
        for name, part in vars(self).items():
            if part and not parts[name]:
                what, names = "train" if name == "train" else "validate", listed([case.id for case in part])
                raise EmptyPartError(f"None of the {len(part)} cases to {what} on can be used ({names}); mend one.")
        return Split(**parts)


def require_split_seed(seed: int) -> None:
    """Refuse a seed of folds that is none.

    Raises:
        ConfigError: It is negative.
    """
    if seed < 0:
        raise ConfigError(f"split_seed is {seed}; it must be zero or more.")


def split_cases(cases: Sequence[Case], *, fold: int = 0, num_folds: int = 5, seed: int = 0) -> Split:
    """Split cases into training and validation, never dividing a patient.

    A declared split has priority: "val" validates, "test" is left out, the rest trains. Declared folds come next: the
    cases of the chosen one validate, those of none always train. Where neither is declared, the patients of each class
    are shuffled and distributed evenly over the folds, and one fold validates. The result depends on ids, patients,
    classes and the seed, not on the order of ``cases``.

    Args:
        cases: All cases of the data set.
        fold: Number of the fold that validates, from 0.
        num_folds: Number of folds.
        seed: Seed of the shuffle.

    Raises:
        ConfigError: ``seed`` is negative, ``fold`` is not in ``0 .. num_folds - 1`` or not declared, there are fewer
            than two folds, or more are declared than ``num_folds``.
        DataError: There are fewer patients than folds, or a declared split leaves a part empty.
    """
    require_split_seed(seed)
    folds = declared_folds(cases)
    if folds:
        if len(folds) > num_folds:
            raise ConfigError(
                f"The data set declares {len(folds)} folds ({listed(folds)}), but num_folds is {num_folds}; use "
                f"--num_folds {len(folds)}."
            )
        if fold not in folds:
            raise ConfigError(f"The data set declares the folds {listed(folds, 20)}, so fold cannot be {fold}.")
    elif num_folds < 2 or not 0 <= fold < num_folds:
        raise ConfigError(f"fold {fold} of {num_folds} does not exist; use num_folds >= 2 and fold 0 to num_folds - 1.")
    usable = [case for case in cases if case.split != "test"]
    if folds or any(case.split == "val" for case in cases):
        held_out_ids = {case.id for case in usable if (case.fold == fold if folds else case.split == "val")}
        split = Split(
            train=tuple(case for case in usable if case.id not in held_out_ids),
            val=tuple(case for case in usable if case.id in held_out_ids),
        )
        if not split.train:
            raise DataError('The declared split has no case to train on; mark some cases "train".')
        shared = sorted({case.patient for case in split.train} & {case.patient for case in split.val})
        if shared:
            warnings.warn(
                f"The declared split puts {number_of(len(shared), 'patient')} into both train and val "
                f"({listed(shared)}); validation scores will look better than they are.",
                category=LeakWarning,
                stacklevel=2,
            )
        return split
    classes = _shuffled_classes(usable, seed)
    if len(classes) < num_folds:
        raise DataError(
            f"{len(classes)} patients cannot be split into {num_folds} folds; use --num_folds {len(classes)}."
            if len(classes) > 1
            else f"One patient (by list or DICOM headers, {len(usable)} cases) cannot be split into training and "
            "validation; add cases of other patients, or tell patients apart by --patient_pattern or a column patient."
        )
    # Stable: within a class the shuffled order stays, so that every fold gets its share of each class.
    held_out = set(sorted(classes, key=classes.__getitem__)[fold::num_folds])
    return Split(
        train=tuple(case for case in usable if case.patient not in held_out),
        val=tuple(case for case in usable if case.patient in held_out),
    )


def declared_folds(cases: Sequence[Case]) -> list[int]:
    """The numbers of the folds that a data set declares, sorted; none where a declared "val" takes their place."""
    if any(case.split == "val" for case in cases):
        return []
    return sorted({case.fold for case in cases if case.fold is not None and case.split != "test"})


@dataclass(frozen=True, kw_only=True)
class TrainPart:
    """A part of the training cases, always whole patients; held-out cases stay the same whatever the part.

    Attributes:
        train_fraction: Share of the patients, above 0 and at most 1.
        train_cases: Number of patients, given instead of a share.
        train_list: Text file that names ids of cases or patients, one per line; the part is taken of those.
        train_seed: Seed of the order in which patients are taken. A smaller part of one seed lies in a larger one.
    """

    train_fraction: float = 1.0
    train_cases: int | None = None
    train_list: str | None = None
    train_seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.train_fraction <= 1:
            raise ConfigError(f"train_fraction is {self.train_fraction}; it must be above 0 and at most 1.")
        if self.train_cases is not None and self.train_cases < 1:
            raise ConfigError(f"train_cases is {self.train_cases}; it must be at least 1.")
        if self.train_cases is not None and self.train_fraction < 1:
            raise BothSetError(f"train_fraction ({self.train_fraction})", f"train_cases ({self.train_cases})")
        if self.train_seed < 0:
            raise ConfigError(f"train_seed is {self.train_seed}; it must be zero or more.")

    def take(self, train: Sequence[Case], others: Sequence[Case] = ()) -> tuple[Case, ...]:
        """The part of the training cases.

        Args:
            train: All cases that may be trained on.
            others: The other cases of the data set; a list may name them, but they are not trained on.

        Raises:
            DataError: The list cannot be read, names an unknown case, or leaves nothing; or there are fewer patients
                than are asked for.
        """
        cases = tuple(train) if self.train_list is None else named_cases(self.train_list, train, others)
        patients = shuffled_patients(cases, self.train_seed)
        number = max(1, int(self.train_fraction * len(patients) + 0.5))
        if self.train_cases is not None:
            if self.train_cases > len(patients):
                raise DataError(
                    f"train_cases is {self.train_cases}, but there is no more than "
                    f"{number_of(len(patients), 'patient')} to train on; use at most as many."
                )
            number = self.train_cases
        kept = set(patients[:number])
        return tuple(case for case in cases if case.patient in kept)


def split_by_list(cases: Sequence[Case], path: str) -> Split:
    """Hold out the cases that a text file names, with all other cases of their patients; the rest trains.

    Args:
        cases: All cases of the data set; those that it declares as "test" are left out.
        path: Text file with ids of cases or patients, one per line.

    Raises:
        DataError: The list cannot be read, names an unknown case, or leaves nothing on one of both sides.
    """
    usable = [case for case in cases if case.split != "test"]
    tests = [case for case in cases if case.split == "test"]
    patients = {case.patient for case in named_cases(path, usable, tests, part="to hold out, only declared tests")}
    split = Split(
        train=tuple(case for case in usable if case.patient not in patients),
        val=tuple(case for case in usable if case.patient in patients),
    )
    if not split.train:
        raise DataError(f"{path} holds out every case, so none is left to train on; name fewer.")
    return split


def named_cases(
    path: str, wanted: Sequence[Case], others: Sequence[Case], part: str = "to train on, only held-out ones"
) -> tuple[Case, ...]:
    """The cases that the lines of a text file name by their ids or patients.

    Args:
        path: Text file with one name per line.
        wanted: The cases that are chosen from.
        others: The other cases of the data set, which may be named but are not chosen.
        part: What ``wanted`` and ``others`` are, for the sentence about a list that names none of the former.

    Raises:
        DataError: The list cannot be read, names an unknown case, or none of those wanted.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = {line.strip() for line in file if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of names ({error}).") from error
    if not names:
        raise DataError(f"{path}: names nothing; write one case or patient per line.")
    known = {name for case in (*wanted, *others) for name in (case.id, case.patient)}
    for name in names - known:
        raise DataError(
            f"{path} names '{name}', which is no case or patient of the data set."
            f"{nearest(name, known) if len(known) < 1000 else ''}"
        )
    kept = tuple(case for case in wanted if case.id in names or case.patient in names)
    if not kept:
        raise DataError(f"{path} names no case {part} ({listed(sorted(names))}); name others, or choose another fold.")
    return kept


def shuffled_patients(cases: Sequence[Case], seed: int) -> list[str]:
    """The patients in a random order; every beginning of it has its share of each class."""
    classes = _shuffled_classes(cases, seed)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient, names in classes.items():
        groups[names].append(patient)
    # Places of each class, spread evenly over the whole; sorting is stable, so that equal places stay shuffled.
    places = {patient: (index + 0.5) / len(group) for group in groups.values() for index, patient in enumerate(group)}
    return sorted(classes, key=places.__getitem__)


def _shuffled_classes(cases: Sequence[Case], seed: int) -> dict[str, tuple[str, ...]]:
    """Patient -> sorted classes of its cases, in a random order of the patients."""
    classes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        classes[case.patient].add(case.class_name or "")
    patients = sorted(classes)
    shuffled = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    return {patient: tuple(sorted(classes[patient])) for patient in shuffled}
