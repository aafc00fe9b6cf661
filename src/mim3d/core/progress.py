"""How far long work has come: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from mim3d.core.names import printable

#: Seconds between two plain lines.
PLAIN_EVERY_S = 15.0

#: Columns of a terminal that hold a bar and the text beside it in one line.
_WIDE = 130

Item = TypeVar("Item")


class Progress:
    """Progress on stderr, begun by ``with``: a bar where that is a terminal, else lines of text.

    Args:
        label: Text in front of the bar, with ``{done}`` and ``{total}``, such as ``step {done}/{total}``.
        total: Amount of work, in any unit.
        silent: Whether nothing is shown, neither bar nor lines.
        eager: Whether the first and the last plain line are shown even where the work is done in a few seconds.
        steady_s: Seconds over which the speed that gives the time left is averaged.

    Attributes:
        done: Amount of work that is done.
    """

    def __init__(
        self, label: str, total: int, *, silent: bool = False, eager: bool = False, steady_s: float = 30.0
    ) -> None:
        self._label = label
        self._total = total
        self._silent = silent
        self._eager = eager
        self._bar = _rich_bar(steady_s) if total and not silent and sys.stderr.isatty() else None
        self._task = None if self._bar is None else self._bar.add_task("", total=total, beside="")
        self.begin()

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, done: float = 0) -> None:
        """Start the clock, with ``done`` of the work done in earlier sessions."""
        self.done = self._first = done
        self._start = time.monotonic()
        self._last_line: float | None = None
        self._last_done = done
        if self._bar is not None:
            self._bar.reset(self._task, completed=done, description=self._text(done))

    def advance(self, done: float) -> None:
        """Move the bar; plain lines are left to :meth:`update`."""
        self.done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self._text(done))

    def update(self, done: float, beside: str = "") -> None:
        """Move the bar and change the text beside it; elsewhere print a line if it is time for one."""
        self.advance(done)
        if self._bar is not None:
            self._bar.update(self._task, beside=printable(beside))
            return
        now = time.monotonic()
        shown_before = self._last_line is not None
        is_edge = (not shown_before and self._eager) or (done >= self._total and (shown_before or self._eager))
        is_due = now - (self._last_line or self._start) >= PLAIN_EVERY_S
        if done > max(self._first, self._last_done) and (is_edge or is_due):
            self._last_line, self._last_done = now, done
            left_s = (now - self._start) / (done - self._first) * (self._total - done)
            self.say("  ".join(filter(None, (self._text(done), beside, f"{clock(left_s)} left"))))

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        text = fitted(printable(text), sys.stderr)
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def _text(self, done: float) -> str:
        return self._label.format(done=int(done) if done == int(done) else f"{done:.1f}", total=self._total)


def _rich_bar(steady_s: float) -> Any:
    """A bar; on a narrow terminal the text beside it has a line of its own, lest it crowd out the time left."""
    from rich import progress
    from rich.console import Console, RenderableType

    console = Console(stderr=True)
    beside = progress.TextColumn("{task.fields[beside]}", markup=False)

    class TwoLines(progress.Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield from (beside(task) for task in self.tasks if task.fields["beside"])

    columns = (
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TimeRemainingColumn(elapsed_when_finished=True),
    )
    if console.width < _WIDE:
        return TwoLines(*columns, console=console, speed_estimate_period=steady_s)
    return progress.Progress(*columns, beside, console=console, speed_estimate_period=steady_s)


def say(text: str) -> None:
    """Print a line on stdout that may hold names from files."""
    print(fitted(printable(text), sys.stdout), flush=True)


def fitted(text: str, stream: TextIO) -> str:
    """A line of text that a terminal breaks between words, not within a number or a name; as it is for other streams.

    Spaces fill each row up to its edge. Line ends in their place would break a command that somebody copies.
    """
    try:
        columns = os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except OSError:
        columns = 0
    return "\n".join(_filled(line, columns) if 0 < columns < len(line) else line for line in text.split("\n"))


def _filled(line: str, columns: int) -> str:
    made = ""
    for word in re.findall(r" *[^ ]+", line):
        room = columns - len(made) % columns
        # What is longer than a row is broken in any case.
        begins_row = len(word) > room and len(word.lstrip(" ")) <= columns
        made += " " * room + word.lstrip(" ") if begins_row else word
    return made


def counted(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Pass items on and show on stderr how many of them have come.

    Args:
        items: The work, done as it is taken.
        total: Number of items.
        title: One word for the work.
    """
    with Progress(f"{title} {{done}}/{{total}}", total) as progress:
        for done, item in enumerate(items, start=1):
            progress.update(done)
            yield item


def clock(seconds: float) -> str:
    """Seconds as ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
