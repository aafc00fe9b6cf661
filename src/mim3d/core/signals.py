"""Signals that ask a command to stop: whoever works leaves in order, and the exit code says who asked."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mim3d.core.errors import INTERRUPTED, TERMINATED, TO_BE_CONTINUED

#: Signals that ask to stop: Ctrl-C, a scheduler that ends a job, and one that announces the end of its time.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

#: A terminal and a wrapping process often deliver the same Ctrl-C twice.
SAME_REQUEST_S = 0.25

_EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}


def exit_code_of(number: int) -> int:
    """With what a command ends that a signal asked to stop."""
    return _EXIT_CODES.get(signal.Signals(number), TO_BE_CONTINUED)


class StoppedBySignal(SystemExit):
    """A signal asked to stop. On the way out files, processes and locks are closed, as after an error.

    Args:
        number: The signal.
    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(exit_code_of(number))
        self.number = number

    def __str__(self) -> str:
        return f"{signal.Signals(self.number).name} asked to stop"


class _Ending:
    """Handles signals: the first ends the work in order, one that comes later ends the process at once."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A process forked from this one inherits the handler.
            default_action(number)
            return
        now = time.monotonic()
        if self._since is not None:
            if now - self._since > SAME_REQUEST_S:
                default_action(number)
            return
        self._since = now
        raise KeyboardInterrupt if number == signal.SIGINT else StoppedBySignal(number)


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise StoppedBySignal, and SIGINT KeyboardInterrupt; a second one ends the process.

    Signals come to the main thread alone: elsewhere, and inside of another such block, this does nothing. What the
    process ignores it goes on to ignore.
    """
    if threading.current_thread() is not threading.main_thread() or isinstance(
        signal.getsignal(signal.SIGTERM), _Ending
    ):
        yield
        return
    ending = _Ending()
    answered = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, ending) for number in answered}
    try:
        yield
    finally:
        restore_handlers(previous)


def restore_handlers(previous: Mapping[int, Any]) -> None:
    """Let signals do again what they did before."""
    for number, handler in previous.items():
        signal.signal(number, handler)


def ignore_signals(numbers: list[Any]) -> None:
    """Let this process leave signals to the one that started it, or that nothing is left to stop."""
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def default_action(number: int) -> None:
    """Let a signal end this process at once, as if nothing handled it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
