"""What a person sees while it trains: a bar on a terminal, a plain line now and then elsewhere."""

import time
from collections.abc import Mapping
from typing import Any, Self

from mim3d.core.progress import PLAIN_EVERY_S, Bar, clock
from mim3d.core.resources import in_words

#: Seconds over which the speed is averaged: validations and checkpoints come seldom and take long.
_STEADY_S = 300.0


class Display:
    """Progress on stderr.

    Args:
        max_steps: Steps of the whole run.
        silent: Whether to show nothing, as in all processes but the first.
    """

    def __init__(self, max_steps: int, *, silent: bool = False) -> None:
        self._max_steps = max_steps
        self._first_step = 0
        self._silent = silent
        self._start = time.monotonic()
        self._last_line = -PLAIN_EVERY_S
        self._bar = Bar("", "", 0, silent=silent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._bar.stop()

    def begin(self, first_step: int) -> None:
        """Start the clock and the bar. ``first_step`` steps were done in earlier sessions."""
        self._bar.stop()
        self._first_step = first_step
        self._start = time.monotonic()
        self._bar = Bar(
            "step {task.completed:.0f}/{task.total}",
            "{task.fields[values]}",
            self._max_steps,
            completed=first_step,
            silent=self._silent,
            steady_s=_STEADY_S,
            values="",
        )

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.say(text)

    def advance(self, step: int) -> None:
        """Show that step ``step`` is done."""
        self._bar.update(step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show a line of metrics: behind the bar, or now and then as a plain line with the time left."""
        if self._bar.is_shown:
            self._bar.update(values=summary(values))
            return
        now = time.monotonic()
        if not self._silent and (now - self._last_line >= PLAIN_EVERY_S or step == self._max_steps):
            self._last_line = now
            left_s = (now - self._start) / max(step - self._first_step, 1) * (self._max_steps - step)
            self.say(f"step {step}/{self._max_steps}  {summary(values)}  {clock(left_s)} left")


def summary(values: Mapping[str, float]) -> str:
    """Loss, learning rate, speed, data waiting and, where it is known, the most memory held, of one line of metrics."""
    memory = values.get("memory_bytes")
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"{values['samples_per_s']:.3g} samples/s  {values['data_wait_ratio']:.0%} waiting for data"
        + ("" if memory is None else f"  {in_words(int(memory))} held")
    )
