"""When a run stops before its last step, and how a job of SLURM that had to stop asks to be started again."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch

from mim3d.core.errors import TO_BE_CONTINUED
from mim3d.core.signals import (
    SAME_REQUEST_S,
    STOP_SIGNALS,
    StoppedBySignal,
    default_action,
    ending_in_order,
    exit_code_of,
    restore_handlers,
)

#: What a process asks for: these, or one of STOP_SIGNALS. Where several ask, the last one counts.
_GO_ON, _TIME_IS_UP, _FIRST_SIGNAL = 0, 1, 2

#: Names that SLURM gives to jobs in which somebody sits at a prompt.
_INTERACTIVE = ("interactive", "bash", "sh", "zsh")

_SCONTROL_TIMEOUT_S = 60.0


class StopRequests:
    """Watches for SIGTERM, SIGUSR1, SIGINT and the time limit while training runs.

    A signal that comes a second time, seconds later, ends the process. A scheduler's SIGTERM after its SIGUSR1 is the
    same request: the checkpoint that is being written is still finished. A signal that came too late to stop training,
    because its last step was done, is sent again at the end, for whatever follows.

    Args:
        max_time_s: Seconds until training should stop. None for no limit.
        since: When these seconds began, on the monotonic clock. Now if not given.
    Attributes:
        to_be_continued: Whether the machine asked to stop and not the user: by SIGTERM or SIGUSR1 a scheduler announces
            that it needs the machine or that the job's time is up.
        exit_code: With what the command line ends after the stop.
    """

    def __init__(self, max_time_s: float | None, since: float | None = None) -> None:
        self._max_time_s = max_time_s
        began = time.monotonic() if since is None else since
        self._deadline = None if max_time_s is None else began + max_time_s
        self._signal: signal.Signals | None = None
        self._signalled_at = 0.0
        self._answered = False
        self._owner = os.getpid()
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self.to_be_continued = False
        self.exit_code = TO_BE_CONTINUED

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # On the host, so that agreeing at every step never waits for the device.
            self._group = torch.distributed.new_group(backend="gloo")
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        restore_handlers(self._previous)
        if self._signal is not None and not self._answered and error is None:
            os.kill(os.getpid(), self._signal)

    def reason(self) -> str | None:
        """Say why to stop now, the same in every process. A collective call.

        Returns:
            The reason, in words. None to go on.
        """
        request = _GO_ON
        if self._deadline is not None and time.monotonic() >= self._deadline:
            request = _TIME_IS_UP
        if self._signal is not None:
            request = _FIRST_SIGNAL + STOP_SIGNALS.index(self._signal)
        if self._group is not None:
            agreed = torch.tensor(request)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self._group)
            request = int(agreed)
        if request == _TIME_IS_UP:
            return f"the time limit of {self._max_time_s:g} s was reached"
        if request >= _FIRST_SIGNAL:
            asked = STOP_SIGNALS[request - _FIRST_SIGNAL]
            self.to_be_continued = asked != signal.SIGINT
            self.exit_code, self._answered = exit_code_of(asked), True
            return f"{asked.name} asked to stop"
        return None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:
            # A forked reader inherits this: SIGTERM ends it, all else is the trainer's to decide.
            if number == signal.SIGTERM:
                default_action(number)
            return
        now = time.monotonic()
        if self._signal is not None and now - self._signalled_at <= SAME_REQUEST_S:
            return
        if self._signal is not None and (number == signal.SIGINT or number == self._signal == signal.SIGTERM):
            restore_handlers(self._previous)
            os.kill(os.getpid(), number)
        else:
            self._signal, self._signalled_at = signal.Signals(number), now


@contextmanager
def requeued_when_stopped(*, asks: bool) -> Iterator[None]:
    """In a batch job, ask SLURM for the job again before SIGTERM or SIGUSR1 ends this process.

    This is for what comes before and after training, which watches for signals itself: caching, planning, scoring. What
    is done by then is found again when the command is run once more. Outside of batch jobs signals do what they always
    do.

    Args:
        asks: Whether this process asks SLURM. One of several does.
    """
    if _job(os.environ) is None:
        yield
        return
    with ending_in_order():
        try:
            yield
        except StoppedBySignal as stop:
            if asks:
                print(f"mim3d: {stop}; {requeue()}", file=sys.stderr, flush=True)
            raise


def requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Ask SLURM to start this job again with the same script.

    A job that SLURM is ending already, as it does with one that was cancelled, is left alone.

    Args:
        environment: Variables of the process.
    Returns:
        What came of it, in one sentence. None where there is no batch job.
    """
    job = _job(environment)
    if job is None:
        return None
    again = "submit the same script once more, with --resume true in its command"
    words = (_scontrol("show", "job", job)[0] or "").split()
    state = next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), None)
    if state not in (None, "RUNNING"):
        return f"SLURM is ending job {job} ({state}), so it was not asked to start it again; to go on, {again}"
    failure = _scontrol("requeue", job)[1]
    if failure is not None:
        return f"SLURM could not be asked to start job {job} again ({failure}); {again}"
    return f"SLURM was asked to start job {job} again, which goes on here if its command has --resume true"


def _job(environment: Mapping[str, str]) -> str | None:
    """The job's number, with that of the task in a job array. None outside of batch jobs."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit() or environment.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return None
    return f"{array}_{task}" if array.isdigit() and task.isdigit() else job


def _scontrol(*arguments: str) -> tuple[str | None, str | None]:
    """What scontrol prints, or why it does not work."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=_SCONTROL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, " ".join(str(error).split())
    if done.returncode != 0:
        return None, " ".join(done.stderr.split()) or f"scontrol ended with exit code {done.returncode}"
    return done.stdout, None
