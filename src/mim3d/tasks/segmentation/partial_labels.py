"""Cases that are annotated in part: a list says which labels their maps hold, and the others are unknown there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mim3d.core.errors import DataError
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case


@dataclass(frozen=True)
class PartialLabels:
    """Which channels of a network a case has annotations of.

    Attributes:
        members: label values that belong to each channel.
        names: label value -> name of the data set.
    """

    members: tuple[tuple[int, ...], ...]
    names: Mapping[int, str]

    def channels(self, case: Case) -> tuple[bool, ...]:
        """For each channel, whether all of its label values were annotated; the background always was."""
        values = annotated_values(case, self.names)
        return tuple(values is None or set(members) <= values for members in self.members)


def annotated_values(case: Case, names: Mapping[int, str]) -> set[int] | None:
    """Label values that a case has annotations of, with the background; None for all.

    Raises:
        DataError: a label that the data set lacks.
    """
    if case.labelled is None:
        return None
    known = {**{str(value): value for value in names}, **{name: value for value, name in names.items()}}
    for label in case.labelled:
        if label not in known:
            raise DataError(f"case {case.id} is said to have annotations of '{label}'.{nearest(label, known)}")
    return {0, *(known[label] for label in case.labelled)}


def are_partial(cases: Sequence[Case], names: Mapping[int, str]) -> bool:
    """Whether any case is annotated in part; raises DataError for a label that the data set lacks."""
    found = [annotated_values(case, names) for case in cases]
    return any(values is not None for values in found)
