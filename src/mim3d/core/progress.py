"""How far long work has come: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

#: Seconds between two plain lines.
PLAIN_EVERY_S = 15.0

#: Columns of a terminal that hold a bar and what is told beside it.
_WIDE = 130

Item = TypeVar("Item")


class Bar:
    """A bar on stderr where that is a terminal, and lines of text, which go above it.

    Args:
        before: text in front of the bar, with ``{task.completed}`` and ``{task.total}``.
        after: text behind it and the time left, with ``{task.fields[name]}`` of ``fields``.
        total: how much there is to do.
        completed: how much was done before.
        silent: show nothing, neither bar nor lines.
        steady_s: seconds over which the speed that gives the time left is averaged.
        fields: first values of what ``after`` shows.
    """

    def __init__(
        self,
        before: str,
        after: str,
        total: int,
        *,
        completed: int = 0,
        silent: bool = False,
        steady_s: float = 30.0,
        **fields: str,
    ) -> None:
        self._silent = silent
        self._bar: Any = None
        if not silent and total and sys.stderr.isatty():
            self._bar = _rich_bar(before, after, steady_s)
            self._task = self._bar.add_task("", total=total, completed=completed, **fields)
            self._bar.start()

    @property
    def is_shown(self) -> bool:
        """Whether there is a bar; else lines are all that is seen."""
        return self._bar is not None

    def update(self, completed: float | None = None, **fields: str) -> None:
        """Move the bar, and change what stands behind it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, **fields)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()


def _rich_bar(before: str, after: str, steady_s: float) -> Any:
    """A bar; on a narrow terminal the text behind it has a line of its own, lest it crowd out the time left."""
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    behind = TextColumn(after)

    class TwoLines(Progress):
        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield from (behind(task) for task in self.tasks)

    columns = (TextColumn(before), BarColumn(bar_width=24), TimeRemainingColumn(elapsed_when_finished=True))
    if console.width < _WIDE:
        return TwoLines(*columns, console=console, speed_estimate_period=steady_s)
    return Progress(*columns, behind, console=console, speed_estimate_period=steady_s)


def counted(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Pass items on and show on stderr how many of ``total`` have come.

    Args:
        items: the work, done as it is taken.
        total: how many there will be.
        title: one word for it.
    """
    bar = Bar(f"{title} {{task.completed:.0f}}/{{task.total}}", "left", total)
    start = last_line = time.monotonic()
    try:
        for done, item in enumerate(items, start=1):
            bar.update(done)
            now = time.monotonic()
            if not bar.is_shown and now - last_line >= PLAIN_EVERY_S:
                last_line = now
                bar.say(f"{title} {done}/{total}  {clock((now - start) / done * (total - done))} left")
            yield item
    finally:
        bar.stop()


def clock(seconds: float) -> str:
    """Seconds as ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
