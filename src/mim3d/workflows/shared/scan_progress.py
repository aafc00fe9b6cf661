"""How far a command over many scans has come: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from mim3d.core.errors import DataError
from mim3d.core.progress import PLAIN_EVERY_S, Bar, clock
from mim3d.datasets.cases import Case


class ScanProgress:
    """Progress on stderr, in scans and parts of scans.

    Args:
        num_scans: scans to do.
    """

    def __init__(self, num_scans: int) -> None:
        self._num_scans = num_scans
        self._done = 0
        self._part = 0.0
        self._name = ""
        self._start = self._last_line = time.monotonic()
        self._bar = Bar("{task.completed:.1f} of {task.total} scans", "{task.fields[name]}", num_scans, name="")

    def __enter__(self) -> "ScanProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """A scan begins."""
        self._name, self._part = name, 0.0
        self._show()

    def windows(self, done: int, total: int) -> None:
        """So many windows of the scan are done."""
        self._part = done / max(total, done, 1)
        self._show()

    def end(self) -> None:
        """The scan is done, one way or the other."""
        self._done, self._part = self._done + 1, 0.0
        self._show()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.say(text)

    def _show(self) -> None:
        position = self._done + self._part
        if self._bar.is_shown:
            self._bar.update(position, name=self._name)
            return
        now = time.monotonic()
        last = self._done == self._num_scans
        if position and (last or now - self._last_line >= PLAIN_EVERY_S):
            self._last_line = now
            left = (now - self._start) / position * (self._num_scans - position)
            self.say(f"{position:.3g} of {self._num_scans} scans  {clock(left)} left")


def close_scans(
    cases: Sequence[Case], failures: Mapping[str, str], done: str, folder: Path, list_name: str, *, num_before: int
) -> str:
    """Say how many scans are done and where.

    Args:
        cases: all of them.
        failures: id -> reason of those that could not be done.
        done: what was done to them, ``segmented``.
        folder: where the results lie.
        list_name: file in it that has all reasons.
        num_before: those that were done before.
    Returns:
        The folder.
    Raises:
        DataError: some could not be done.
    """
    failed = [case.id for case in cases if case.id in failures]
    before = f", {num_before} of them before" if num_before else ""
    print(f"{len(cases) - len(failed)} of {len(cases)} scans {done}{before}: {folder}")
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cases)} scans could not be {done}, the first because of {failures[failed[0]]} All "
            f"reasons are in {folder / list_name}."
        )
    return str(folder)
