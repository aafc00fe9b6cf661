"""Who is tested, who learns and who chooses: folds, and nested amounts of labelled patients, the same for all arms.

In each fold the patients who are not tested are split once more: most may be learned from, and a fifth chooses
checkpoints. An amount of labels takes both from them, the first of an order that depends on the seed, so that smaller
amounts lie in larger ones and nobody ever changes sides. Pre-training sees all scans of those who may be learned from,
labelled or not, and none of the others.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.names import number_of
from mim3d.datasets.cases import Case
from mim3d.datasets.splits import Split, shuffled_patients
from mim3d.tasks.contract import Task

#: Share of the patients who are not tested, and of every amount of labels, that chooses checkpoints.
CHOOSING_SHARE = 0.2


@dataclass(frozen=True)
class Amount:
    """An amount of labelled patients.

    Attributes:
        text: What the user wrote, such as ``25%`` or ``12``.
        share: Share of the patients to learn from in a fold; None where a number is asked for.
        number: Number of them; None where a share is asked for.
    """

    text: str
    share: float | None = None
    number: int | None = None

    @classmethod
    def of(cls, given: int | str) -> "Amount":
        """Read an amount.

        Raises:
            ConfigError: It is neither a share from 0 to 100 % nor a number of at least 2 patients.
        """
        text = str(given).replace(" ", "")
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)(%?)", text)
        if found and found[2] and 0 < float(found[1]) <= 100:
            return cls(f"{float(found[1]):g}%", share=float(found[1]) / 100)
        if found and not found[2] and float(found[1]).is_integer() and float(found[1]) >= 2:
            return cls(str(int(float(found[1]))), number=int(float(found[1])))
        raise ConfigError(
            f"labels has {given!r}; write a share of the patients as 25%, or a number of at least 2 patients as 12."
        )

    def of_patients(self, every: int) -> int:
        """Number of patients of ``every``."""
        return self.number if self.number is not None else int((self.share or 0) * every + 0.5)


@dataclass(frozen=True, kw_only=True)
class FoldPart:
    """The parts of one fold, apart by patient.

    Attributes:
        number: Number of the fold.
        learning: Cases that may be learned from.
        choosing: Cases that choose checkpoints.
        test: Cases that are tested.
    """

    number: int
    learning: tuple[Case, ...]
    choosing: tuple[Case, ...]
    test: tuple[Case, ...]

    @classmethod
    def of(cls, number: int, split: Split, seed: int) -> "FoldPart":
        """The parts of a fold whose tested cases are those that the split holds out.

        Raises:
            DataError: There are fewer than two patients besides.
        """
        patients = shuffled_patients(split.train, seed)
        if len(patients) < 2:
            raise DataError(
                f"fold {number} leaves {number_of(len(patients), 'patient')} besides those tested, but one has to "
                "learn and one to choose checkpoints; use more patients, or more folds."
            )
        chosen = set(patients[: max(1, round(CHOOSING_SHARE * len(patients)))])
        return cls(
            number=number,
            learning=tuple(case for case in split.train if case.patient not in chosen),
            choosing=tuple(case for case in split.train if case.patient in chosen),
            test=split.val,
        )

    def only(self, ids: Collection[str]) -> "FoldPart":
        """The same with those of its cases that could be prepared."""
        parts = (tuple(case for case in part if case.id in ids) for part in (self.learning, self.choosing, self.test))
        learning, choosing, test = parts
        return replace(self, learning=learning, choosing=choosing, test=test)

    @property
    def num_patients(self) -> int:
        """Patients who are not tested."""
        return len({case.patient for case in (*self.learning, *self.choosing)})

    @property
    def tested_classes(self) -> list[str]:
        """The classes of the tested cases."""
        return sorted({str(case.class_name) for case in self.test})

    def labelled(self, amount: Amount, seed: int) -> Split:
        """The cases of an amount of labelled patients: those to learn from, and those to choose checkpoints by.

        Raises:
            DataError: There are fewer patients than asked for, or than two.
        """
        wanted = amount.of_patients(self.num_patients)
        parts = [shuffled_patients(part, seed) for part in (self.learning, self.choosing)]
        if not 2 <= wanted <= self.num_patients:
            least = -(-200 // self.num_patients)
            others = f"{number_of(self.num_patients, 'patient')} besides those tested"
            have = f"fold {self.number} has {others}"
            if wanted < 2:
                have = (
                    f"{wanted} of the {others} in fold {self.number}, where at least 2 are needed, one to learn from "
                    "and one to choose checkpoints"
                )
            remedy = f"ask for {least}% to 100%, or 2 to {self.num_patients}" if least < 100 else "ask for 100%"
            raise DataError(f"labels {amount.text}: {have}; {remedy}.")
        # Of both at least one, and of neither more than there are.
        num_choosing = min(max(1, round(wanted * len(parts[1]) / self.num_patients)), len(parts[1]))
        num_choosing = max(num_choosing, wanted - len(parts[0]))
        kept = {*parts[0][: wanted - num_choosing], *parts[1][:num_choosing]}
        return Split(
            train=tuple(case for case in self.learning if case.patient in kept),
            val=tuple(case for case in self.choosing if case.patient in kept),
        )


def require_distinct(folds: Sequence[FoldPart], amounts: Sequence[Amount], seeds: Sequence[int], task: Task) -> None:
    """Refuse amounts of labels that a data set is too small for, before any work begins.

    Raises:
        DataError: An amount is too small or too large, two are the same patients, or a part cannot be learned from.
    """
    for fold in folds:
        seen: dict[int, str] = {}
        for amount in amounts:
            for seed in seeds:
                split = fold.labelled(amount, seed)
                try:
                    task.check_split(split)
                    if task.needs == "class":
                        _require_classes(fold, split)
                except DataError as error:
                    raise DataError(f"labels {amount.text}, fold {fold.number}, seed {seed}: {error}") from error
            number = amount.of_patients(fold.num_patients)
            if number in seen:
                raise DataError(
                    f"labels {seen[number]} and {amount.text} are both {number} of the {fold.num_patients} patients "
                    f"of fold {fold.number}; leave one of them out."
                )
            seen[number] = amount.text
    if task.needs == "class" and all(len(fold.tested_classes) < 2 for fold in folds):
        raise DataError(
            "The tested cases of each fold are of one class, and AUC ranks cases of two; ask for fewer or other folds, "
            "or declare another split."
        )


def _require_classes(fold: FoldPart, split: Split) -> None:
    """Refuse labelled cases that lack a class: classifiers of other classes than others cannot be compared."""
    every = {str(case.class_name) for case in (*fold.learning, *fold.choosing, *fold.test)}
    if lacking := sorted(every - {str(case.class_name) for case in split.train}):
        raise DataError(
            f"class {listed(lacking)} is not among the cases to learn from, but among others of the data set; ask for "
            "more labels, use other seeds or more folds, or leave the class out."
        )
