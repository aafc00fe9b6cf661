"""Scans of a cache that prove damaged while a command is at work: it goes on without them, and they are listed."""

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

from mim3d.caching.cache import failure_row
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import DamagedError
from mim3d.core.left_out import LeftOutList
from mim3d.core.warned import LeftOutWarning

Result = TypeVar("Result")


def damaged_rows(scans: Sequence[CachedScan]) -> list[dict[str, str]]:
    """Rows for the list of cases left out, of the scans of which not all can be read; every scan is read once."""
    return [failure_row(scan.case, reason) for scan in scans if (reason := scan.damage) is not None]


def adding_to(left_out: LeftOutList, scans: Sequence[CachedScan]) -> Callable[[str, str], None]:
    """What adds one of the scans to a list, given its case and what is wrong with it."""
    by_id = {scan.case.id: scan.case for scan in scans}
    return lambda name, reason: left_out.add(failure_row(by_id[name], reason))


def on_sound_scans(
    scans: list[CachedScan], work: Callable[[Sequence[CachedScan]], Result], left_out: LeftOutList | None
) -> Result:
    """Work on scans; where one proves damaged, it is left out from then on, and the work is done again.

    Args:
        scans: The scans, from which damaged ones are taken.
        work: What is done on all of them.
        left_out: Receives the damaged ones, each of which a warning names; None where nothing may be left out.

    Raises:
        DamagedError: No scan is left, or nothing may be left out.
    """
    try:
        return work(scans)
    except DamagedError:
        rows = damaged_rows(scans)
        if left_out is None or not 0 < len(rows) < len(scans):
            raise
    for row in rows:
        warnings.warn(f"{row['id']} is damaged and left out: {row['reason']}", category=LeftOutWarning, stacklevel=2)
        left_out.add(row)
    ids = {row["id"] for row in rows}
    scans[:] = [scan for scan in scans if scan.case.id not in ids]
    return work(scans)
