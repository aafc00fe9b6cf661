"""When to stop before the last step: a signal or the time limit, agreed on by all processes."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

_GO_ON, _TIME_IS_UP, _SIGNALLED = 0, 1, 2

# A terminal and a wrapping process often deliver the same Ctrl-C twice.
_SAME_REQUEST_S = 2.0


class StopRequests:
    """Watches for SIGTERM, SIGINT and the time limit; a second signal, seconds later, ends the process.

    Args:
        max_time_s: seconds from now until training should stop; None for no limit.
    """

    def __init__(self, max_time_s: float | None) -> None:
        self._max_time_s = max_time_s
        self._deadline = None if max_time_s is None else time.monotonic() + max_time_s
        self._signal: int | None = None
        self._signalled_at = 0.0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # On the host, so that agreeing at every step never waits for the device.
            self._group = torch.distributed.new_group(backend="gloo")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def reason(self) -> str | None:
        """Why to stop now, in words, the same in every process; None to go on. A collective call."""
        request = _GO_ON
        if self._deadline is not None and time.monotonic() >= self._deadline:
            request = _TIME_IS_UP
        if self._signal is not None:
            request = _SIGNALLED
        if self._group is not None:
            agreed = torch.tensor(request)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
            request = int(agreed)
        if request == _TIME_IS_UP:
            return f"the time limit of {self._max_time_s:g} s was reached"
        if request == _SIGNALLED:
            name = signal.Signals(self._signal).name if self._signal is not None else "a signal to another process"
            return f"{name} asked to stop"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked reader inherits this: Ctrl-C is the trainer's to decide, anything else ends the reader.
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = number, now
        elif now - self._signalled_at > _SAME_REQUEST_S:
            self._give_back()
            os.kill(os.getpid(), number)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
