"""Warnings that change how a result is to be read: said when they arise, kept with the result, and said again last."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

_PACKAGE = str(Path(__file__).parents[1])


class ResultWarning(UserWarning):
    """What changes how a result is to be read.

    Attributes:
        kind: What it is about, for people and programs.
        in_general: The same without names of scans, patients or folders, for what is published; None for what concerns
            the one run alone.
    """

    kind = "other"
    in_general: str | None = None


class LeakWarning(ResultWarning):
    """Scans that scores are computed on were learned from."""

    kind = "leak"
    in_general = "Some of the held-out cases were learned from; scores on them say nothing about new patients."


class WeightsWarning(ResultWarning):
    """Weights fill a network in part, or do not say what they are."""

    kind = "weights"
    in_general = "Training began with weights that fill the encoder in part, or do not say all of what they are."


class UnlikeWeightsWarning(ResultWarning):
    """Scans are prepared, or show something, other than what an encoder learned from before."""

    kind = "unlike weights"
    in_general = (
        "Training began with weights whose encoder learned from other voxel sizes, intensities or channels than those "
        "of the scans."
    )


class LicenceWarning(ResultWarning):
    """Weights were learned from weights that may not be used for everything."""

    kind = "licence"
    in_general = (
        "Training began with weights that are not for commercial use; what was learned from them may be bound by their "
        "terms."
    )


class LearningWarning(ResultWarning):
    """Settings by which little is learned, or parts that learned nothing."""

    kind = "learning"
    in_general = "Settings were such that little was learned, or parts of the method learned nothing."


class UnchosenWarning(ResultWarning):
    """Held-out cases that cannot choose among the weights of a run."""

    kind = "unchosen"
    in_general = "The held-out cases could not choose among the weights, so the last ones are kept."


class UnfinishedWarning(ResultWarning):
    """Training stopped before its end."""

    kind = "unfinished"
    in_general = "Training stopped before its last step."


class LeftOutWarning(ResultWarning):
    """Cases could not be used."""

    kind = "left out"
    in_general = "Some cases of the data set could not be used."


class UnlikeTrainingWarning(ResultWarning):
    """Scans differ from those that a network learned from."""

    kind = "unlike training"


class ComparisonWarning(ResultWarning):
    """Runs that are shown side by side differ in settings that scores depend on."""

    kind = "comparison"


#: A warning as files hold it: its ``kind`` and ``text``.
WarningRow = dict[str, str]


@dataclass(eq=False)
class Recording:
    """Warnings since a command or run began, each once.

    Attributes:
        rows: The warnings, in their order.
        keepers: Called with all of them whenever there is another one.
    """

    rows: list[WarningRow] = field(default_factory=list)
    keepers: list[Callable[[Sequence[WarningRow]], None]] = field(default_factory=list)

    def add(self, kind: str, text: str) -> None:
        """Add a warning, unless it is there."""
        row = {"kind": kind, "text": text}
        if row not in self.rows:
            self.rows.append(row)
            for keep in self.keepers:
                keep(self.rows)


_recordings: list[Recording] = []


@contextmanager
def recording() -> Iterator[Recording]:
    """Record what mim3d warns of, which is shown as ever; of recordings inside one another each holds it."""
    own = Recording()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def record(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
            if issubclass(category, ResultWarning):
                own.add(category.kind, str(message))
            elif issubclass(category, UserWarning) and filename.startswith(_PACKAGE):
                own.add(ResultWarning.kind, str(message))
            show(message, category, filename, *rest, **named)

        warnings.showwarning = record
        _recordings.append(own)
        try:
            yield own
        finally:
            _recordings.remove(own)


def record_said(kind: str, text: str) -> None:
    """Record what was, or will be, said by other means than a warning, under the kind of a :class:`ResultWarning`."""
    for each in _recordings:
        each.add(kind, text)


#: What the warnings of a thread are held in, as ``held``, where it does not show them at once.
_of_thread = threading.local()

#: Shows a warning that was held.
Held = Callable[[], None]


@contextmanager
def holding_apart() -> Iterator[None]:
    """As long as the block runs, threads may hold what they warn of, each for itself: see :func:`held_warnings`."""
    show = warnings.showwarning

    def hold(*warning: Any, **named: Any) -> None:
        held: list[Held] | None = getattr(_of_thread, "held", None)
        if held is None:
            show(*warning, **named)
        else:
            held.append(partial(show, *warning, **named))

    warnings.showwarning = hold
    try:
        yield
    finally:
        warnings.showwarning = show


@contextmanager
def held_warnings() -> Iterator[list[Held]]:
    """Hold what this thread warns of, in a block of :func:`holding_apart`; each is shown by a call of what is held."""
    before: list[Held] | None = getattr(_of_thread, "held", None)
    _of_thread.held = held = list[Held]()
    try:
        yield held
    finally:
        _of_thread.held = before


@contextmanager
def silenced() -> Iterator[None]:
    """Show nothing of what this thread warns of; where warnings are held apart, others are heard as ever."""
    if getattr(_of_thread, "held", None) is not None:
        # What is held in here is dropped. `catch_warnings` changes what all threads do.
        with held_warnings():
            yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def keep_recorded(keep: Callable[[Sequence[WarningRow]], None]) -> None:
    """Let the innermost recording hand what it holds, and whatever comes, to a function that keeps it in a file."""
    if _recordings:
        _recordings[-1].keepers.append(keep)
        if _recordings[-1].rows:
            keep(_recordings[-1].rows)


def merged(*lists: Sequence[WarningRow]) -> list[WarningRow]:
    """All rows of several lists, each once."""
    return list({(row["kind"], row["text"]): row for rows in lists for row in rows}.values())


def published(rows: Sequence[WarningRow]) -> list[WarningRow]:
    """Warnings without what must stay private: of each kind what can be said in general."""
    kinds = {row["kind"] for row in rows}
    return [
        {"kind": each.kind, "text": each.in_general}
        for each in ResultWarning.__subclasses__()
        if each.kind in kinds and each.in_general is not None
    ]


def checked_rows(content: Any) -> list[WarningRow]:
    """Warnings in a file that anybody may have written; what is none is passed over."""
    rows = content if isinstance(content, list) else []
    return [
        {"kind": row["kind"][:40], "text": row["text"][:2000]}
        for row in rows[:1000]
        if isinstance(row, dict) and isinstance(row.get("kind"), str) and isinstance(row.get("text"), str)
    ]
