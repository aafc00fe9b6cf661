"""Cases that a command leaves out while it does the rest: why, where that is listed, and what it says last."""

import csv
import traceback
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mim3d.core.errors import DataError, Mim3dError
from mim3d.core.files import REMEDY, explained_write, read_csv, write_csv, write_text
from mim3d.core.names import as_cell, number_of
from mim3d.core.warned import LeftOutWarning, record_said

#: Reasons that a sentence holds; a file has them all.
MAX_REASONS = 3

#: Columns of a list of cases that were left out.
COLUMNS = ("id", "images", "label", "reason")

#: What the command that runs has left out: file of the reasons -> sentence.
_noted: dict[str, str] = {}


@dataclass(frozen=True)
class Failure:
    """Why a case cannot be used.

    Attributes:
        reason: A sentence that names the file.
        traceback: Where an error that nobody foresaw was raised; None for all others.
    """

    reason: str
    traceback: str | None = None

    @classmethod
    def of(cls, error: BaseException, name: str) -> "Failure":
        """The failure behind an error, whoever raised it.

        Args:
            error: What was raised while the case was in work.
            name: Name of the case's first file, for errors that name none.
        """
        if isinstance(error, Mim3dError):
            return cls(str(error))
        if isinstance(error, MemoryError):
            return cls(f"{name}: larger than the memory left for it.")
        if isinstance(error, OSError):
            place = error.filename if isinstance(error.filename, str) else name
            return cls(f"{place}: cannot be read ({error.strerror or error}).")
        said = " ".join(str(error).split()) or "no message"
        return cls(
            f"{name}: unexpected {type(error).__name__}: {said[:300]}; please report it.",
            "".join(traceback.format_exception(error)),
        )


@dataclass(frozen=True)
class LeftOutList:
    """The file that lists the cases which a run leaves out, each with its reason; every process of it may add some.

    Attributes:
        path: The file.
        num_cases: Number of all cases of the run's data set.
        remedy: End of the sentence about a write that failed.
    """

    path: Path
    num_cases: int
    remedy: str = REMEDY
    _known: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin(self, rows: Sequence[Mapping[str, str]], others: Container[str]) -> None:
        """Write what is known before the work; of other cases what earlier sessions of the run added is kept.

        Args:
            rows: Rows of ``COLUMNS``.
            others: Ids of the cases that the run uses.

        Raises:
            DataError: The folder cannot be written to.
        """
        every = [*rows, *(row for row in read_left_out(self.path) if row["id"] in others)]
        if every:
            write_csv(self.path, COLUMNS, [list(row.values()) for row in every], remedy=self.remedy)
        else:
            self.path.unlink(missing_ok=True)

    def add(self, row: Mapping[str, str]) -> None:
        """Add a case that proved bad during the work, unless it is listed.

        Raises:
            DataError: The folder cannot be written to.
        """
        # Read anew only where another process, or an earlier session, has added to the file.
        if self._known.get("size") != (self.path.stat().st_size if self.path.is_file() else 0):
            self._known["ids"] = {each["id"] for each in read_left_out(self.path)}
        known = self._known.setdefault("ids", set())
        if row["id"] in known:
            return
        known.add(row["id"])
        with explained_write(self.path, self.remedy), open(self.path, "a", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            if not file.tell():
                table.writerow(COLUMNS)
            table.writerow([as_cell(row[name]) for name in COLUMNS])
            self._known["size"] = file.tell()

    def note(self) -> None:
        """Let the command line end with what is listed."""
        note_left_out(len(read_left_out(self.path)), self.num_cases, self.path)


def read_left_out(path: Path) -> list[dict[str, str]]:
    """The rows of a list of cases that were left out; none where there is no list, or one that a kill cut short."""
    try:
        return [dict(zip(COLUMNS, row, strict=True)) for _, row in read_csv(path)[1:]] if path.is_file() else []
    except (DataError, ValueError):
        return []


def in_words(reasons: Sequence[str]) -> str:
    """The first few reasons, each a sentence, and how many more there are."""
    more = len(reasons) - MAX_REASONS
    return " ".join([*reasons[:MAX_REASONS], *([f"And {more} more."] if more > 0 else [])])


def write_tracebacks(path: Path, tracebacks: Mapping[str, str], *, remedy: str | None = REMEDY) -> None:
    """Write where unforeseen errors were raised, by the id of the case; without any, a file of before goes.

    Raises:
        DataError: The folder cannot be written to.
    """
    if tracebacks:
        write_text(path, "\n".join(f"{name}\n{text}" for name, text in tracebacks.items()), remedy=remedy)
    else:
        path.unlink(missing_ok=True)


def note_left_out(num_left_out: int, num_cases: int, listed_in: Path | str) -> None:
    """Let the command line end with how many cases were left out, and with another exit code.

    Args:
        num_left_out: Number of cases that were left out; with 0 nothing is noted.
        num_cases: Number of all cases.
        listed_in: File that holds each of them with the reason.
    """
    if num_left_out:
        were = number_of(num_left_out, "case", "were", of=num_cases)
        sentence = f"{were} left out, the others are done; the reasons are in {listed_in}."
        _noted[str(listed_in)] = sentence
        record_said(LeftOutWarning.kind, sentence)


def take_noted() -> list[str]:
    """The sentences that were noted since this was called last."""
    sentences = list(_noted.values())
    _noted.clear()
    return sentences
