"""How far long work has come: a bar with the time left on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

#: Seconds between two plain lines.
PLAIN_EVERY_S = 15.0

Item = TypeVar("Item")


def counted(items: Iterable[Item], total: int, title: str) -> Iterator[Item]:
    """Pass items on and show on stderr how many of ``total`` have come.

    Args:
        items: the work, done as it is taken.
        total: how many there will be.
        title: one word for it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    console = Console(stderr=True, soft_wrap=True)
    start = last_line = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        for done, item in enumerate(items, start=1):
            bar.advance(task)
            now = time.monotonic()
            if not console.is_terminal and now - last_line >= PLAIN_EVERY_S:
                last_line = now
                console.print(f"{title} {done}/{total}  {clock((now - start) / done * (total - done))} left")
            yield item


def clock(seconds: float) -> str:
    """Seconds as ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
