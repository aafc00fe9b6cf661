"""When to stop before the last step: a signal or the time limit, agreed on by all processes."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch

_GO_ON, _TIME_IS_UP = 0, 1

#: Signals that ask to stop; where processes were sent different ones, the last of these counts.
_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]
_FIRST_SIGNAL = _TIME_IS_UP + 1

# A terminal and a wrapping process often deliver the same Ctrl-C twice.
_SAME_REQUEST_S = 2.0


class StopRequests:
    """Watches for SIGTERM, SIGUSR1, SIGINT and the time limit; who asks twice, seconds apart, ends the process.

    A scheduler's SIGTERM after its SIGUSR1 is the same request: the checkpoint in the making is still finished.

    Args:
        max_time_s: seconds until training should stop; None for no limit.
        since: when they began, on the monotonic clock; now if not given.
    Attributes:
        to_be_continued: whether the reason to stop is the machine's, not the user's: SIGTERM or SIGUSR1, by which a
            scheduler announces that it needs the machine or that the job's time is up.
    """

    def __init__(self, max_time_s: float | None, since: float | None = None) -> None:
        self._max_time_s = max_time_s
        began = time.monotonic() if since is None else since
        self._deadline = None if max_time_s is None else began + max_time_s
        self._signal: signal.Signals | None = None
        self._signalled_at = 0.0
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self.to_be_continued = False

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
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
            request = _FIRST_SIGNAL + _SIGNALS.index(self._signal)
        if self._group is not None:
            agreed = torch.tensor(request)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
            request = int(agreed)
        if request == _TIME_IS_UP:
            return f"the time limit of {self._max_time_s:g} s was reached"
        if request >= _FIRST_SIGNAL:
            asked = _SIGNALS[request - _FIRST_SIGNAL]
            self.to_be_continued = asked != signal.SIGINT
            return f"{asked.name} asked to stop"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked reader inherits this: SIGTERM ends it, all else is the trainer's to decide.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if self._signal is not None and now - self._signalled_at <= _SAME_REQUEST_S:
            return
        if self._signal is not None and (number == signal.SIGINT or number == self._signal == signal.SIGTERM):
            self._give_back()
            os.kill(os.getpid(), number)
        else:
            self._signal, self._signalled_at = signal.Signals(number), now

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
