"""Which part of the training cases is learned from: for few labels, always whole patients, smaller parts in larger."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from mim3d.core.errors import ConfigError, DataError
from mim3d.core.settings import nearest
from mim3d.datasets.records import Case, listed


@dataclass(frozen=True, kw_only=True)
class TrainPart:
    """A part of the training cases; held-out cases stay the same whatever the part.

    Attributes:
        train_fraction: share of the patients.
        train_cases: number of patients instead.
        train_list: file that names ids of cases or patients, one per line; parts are taken of those.
        train_seed: of which patients are taken; their order is one, so that a smaller part lies in a larger one.
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
            raise ConfigError(
                f"train_fraction ({self.train_fraction}) and train_cases ({self.train_cases}) are both set; give only "
                "one of them."
            )
        if self.train_seed < 0:
            raise ConfigError(f"train_seed is {self.train_seed}; it must be zero or more.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """From the arguments of a command; those it does not know are left out.

        Raises:
            ConfigError: for a value that cannot work.
        """
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def take(self, train: Sequence[Case], others: Sequence[Case] = ()) -> tuple[Case, ...]:
        """The part of the training cases.

        Args:
            train: all cases that may be learned from.
            others: the other cases of the data set; a list may name them, but they are not learned from.
        Raises:
            DataError: a list that cannot be read, names what there is not, or leaves nothing; fewer patients than are
                asked for.
        """
        cases = tuple(train) if self.train_list is None else self._listed(train, others)
        patients = shuffled_patients(cases, self.train_seed)
        number = max(1, int(self.train_fraction * len(patients) + 0.5))
        if self.train_cases is not None:
            if self.train_cases > len(patients):
                raise DataError(
                    f"train_cases is {self.train_cases}, but there are {len(patients)} patients to train on; use at "
                    "most as many."
                )
            number = self.train_cases
        kept = set(patients[:number])
        return tuple(case for case in cases if case.patient in kept)

    def _listed(self, train: Sequence[Case], others: Sequence[Case]) -> tuple[Case, ...]:
        assert self.train_list is not None
        names = read_names(self.train_list)
        known = {name for case in (*train, *others) for name in (case.id, case.patient)}
        for name in names:
            if name not in known:
                raise DataError(
                    f"{self.train_list} names '{name}', which is no case or patient of the data set."
                    f"{nearest(name, known) if len(known) < 1000 else ''}"
                )
        kept = tuple(case for case in train if case.id in names or case.patient in names)
        if not kept:
            raise DataError(
                f"{self.train_list} names no case to train on, only held-out ones ({listed(sorted(names))}); name "
                "others, or choose another fold."
            )
        return kept


def read_names(path: str) -> set[str]:
    """The lines of a text file, without those that are empty.

    Raises:
        DataError: cannot be read, or has none.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = {line.strip() for line in file if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of names ({error}).") from error
    if not names:
        raise DataError(f"{path}: names nothing; write one case or patient per line.")
    return names


def shuffled_patients(cases: Sequence[Case], seed: int) -> list[str]:
    """The patients in an order drawn from a seed; every beginning of it has its share of each class."""
    classes: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        classes[case.patient].add(case.class_name or "")
    patients = sorted(classes)
    shuffled = [patients[index] for index in np.random.default_rng(seed).permutation(len(patients))]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in shuffled:
        groups[tuple(sorted(classes[patient]))].append(patient)
    # Places of each class, spread evenly over the whole; sorting is stable, so that equal places stay shuffled.
    places = {patient: (index + 0.5) / len(group) for group in groups.values() for index, patient in enumerate(group)}
    return sorted(shuffled, key=places.__getitem__)
