"""What a person sees while it trains: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from mim3d.progress import PLAIN_EVERY_S, clock


class Display:
    """Progress on stderr; silent in all but the first process.

    Args:
        max_steps: steps of the whole run.
        silent: show nothing.
    """

    def __init__(self, max_steps: int, *, silent: bool = False) -> None:
        self._max_steps = max_steps
        self._first_step = 0
        self._silent = silent
        self._start = time.monotonic()
        self._last_line = -PLAIN_EVERY_S
        self._bar: Any = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, first_step: int) -> None:
        """Start the clock and the bar; ``first_step`` steps were done in earlier sessions."""
        self._first_step = first_step
        self._start = time.monotonic()
        if not self._silent and sys.stderr.isatty():
            self._bar, self._task = _make_bar(self._max_steps, first_step)
            self._bar.start()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif not self._silent:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int) -> None:
        """Step ``step`` is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a line of metrics."""
        if self._bar is not None:
            self._bar.update(self._task, values=summary(values))
            return
        now = time.monotonic()
        if not self._silent and (now - self._last_line >= PLAIN_EVERY_S or step == self._max_steps):
            self._last_line = now
            self.say(f"step {step}/{self._max_steps}  {summary(values)}  {self._time_left(step, now)}")

    def _time_left(self, step: int, now: float) -> str:
        seconds = (now - self._start) / max(step - self._first_step, 1) * (self._max_steps - step)
        return f"{clock(seconds)} left"


def summary(values: Mapping[str, float]) -> str:
    """Loss, learning rate, speed and data waiting of one line of metrics."""
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"{values['samples_per_s']:.3g} samples/s  {values['data_wait_ratio']:.0%} waiting for data"
    )


def _make_bar(max_steps: int, first_step: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[values]}"),
        console=Console(stderr=True),
        speed_estimate_period=300,
    )
    return bar, bar.add_task("training", total=max_steps, completed=first_step, values="")
