"""Which cases of a data set can be used, as far as their headers tell: found before any work, for all cases at once."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace

from mim3d.core.errors import DataError
from mim3d.core.left_out import Failure, in_words
from mim3d.core.names import number_of, verb_of
from mim3d.core.warned import LeftOutWarning
from mim3d.datasets.cases import Case, CaseSet, LeftOut
from mim3d.datasets.mistaken import refuse_unlearnable
from mim3d.scans.grids import require_same_grid
from mim3d.scans.volumes import read_grid

#: What a case lacks for the work at hand, in words, such as "no label map"; None where it has everything.
Lacks = Callable[[Case], str | None]


def usable_cases(cases: CaseSet, *, lacks: Lacks | None = None, strict: bool = False) -> CaseSet:
    """The cases that can be used, with the others and their reasons in ``left_out``; no voxel is read.

    Left out are cases that lack what is needed, whose files are missing or unreadable, or whose channels and label maps
    lie on different grids. One warning says how many there are, and the first reasons.

    Args:
        cases: The data set.
        lacks: What a case lacks; None to need images alone.
        strict: Refuse the data set where a case cannot be used.

    Raises:
        DataError: No case can be used; or with ``strict`` one cannot.
    """
    usable, left_out = [], list(cases.left_out)
    for case in cases.cases:
        lacking = lacks(case) if lacks else None
        reason = f"{case.images[0]}: {lacking}." if lacking else fault_of(case)
        if reason is None:
            usable.append(case)
        else:
            left_out.append(LeftOut(case=case, reason=reason, lacking=lacking is not None))
    if left_out and not usable and all(each.lacking for each in left_out):
        refuse_unlearnable(cases.root, left_out)
    if left_out:
        refuse_or_say(cases.root, [each.reason for each in left_out], len(usable) + len(left_out), strict=strict)
    return replace(cases, cases=tuple(usable), left_out=tuple(left_out))


def refuse_or_say(root: str, reasons: list[str], num_cases: int, *, strict: bool) -> None:
    """Warn of cases that are left out.

    Args:
        root: Data set that they belong to.
        reasons: Why each of them cannot be used.
        num_cases: Number of all cases.
        strict: Refuse them.

    Raises:
        DataError: Nothing is left; or with ``strict`` anything is left out.
    """
    if len(reasons) == num_cases:
        raise DataError(
            f"{root}: none of {num_cases} cases can be used: {in_words(reasons)}" if num_cases > 1 else reasons[0]
        )
    counts = number_of(len(reasons), "case", of=num_cases)
    if strict:
        raise DataError(f"{root}: {counts} cannot be used (strict: nothing is left out): {in_words(reasons)}")
    warnings.warn(
        f"{root}: {counts} cannot be used and {verb_of(len(reasons), 'are')} left out: {in_words(reasons)}",
        category=LeftOutWarning,
        stacklevel=3,
    )


def fault_of(case: Case, check: Callable[[Case], None] | None = None) -> str | None:
    """Why the files of a case cannot be used, as far as headers tell.

    Args:
        case: The case.
        check: A further check, which raises where the case cannot be used.
    """
    try:
        if check is not None:
            check(case)
        first, *others = (*case.images, *([case.label] if case.label else []))
        grid = read_grid(first)
        for path in others:
            require_same_grid(grid, read_grid(path))
    except Exception as error:  # Whatever a reader raises, it must not stop the other cases.
        return Failure.of(error, os.fspath(case.images[0])).reason
    return None
