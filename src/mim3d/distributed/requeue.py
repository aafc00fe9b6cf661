"""A SLURM job that had to stop asks to be started again."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

#: Names that SLURM gives to jobs in which somebody sits at a prompt.
_INTERACTIVE = ("interactive", "bash", "sh", "zsh")

_ANSWER_S = 60.0

#: Exit codes of shells for a process that a signal ended, less the signal's number.
_EXIT_SIGNALLED = 128


def requeue(environment: Mapping[str, str] = os.environ) -> str | None:
    """Ask SLURM to start this job again with the same script.

    A job that SLURM is ending already, as it does with one that was cancelled, is left alone.

    Args:
        environment: variables of the process.
    Returns:
        What came of it, in one sentence; None where there is no batch job.
    """
    job = _job(environment)
    if job is None:
        return None
    again = "submit the same script once more, with --resume true in its command"
    state = _state(job)
    if state not in (None, "RUNNING"):
        return f"SLURM is ending job {job} ({state}), so it was not asked to start it again; to go on, {again}"
    failure = _scontrol("requeue", job)[1]
    if failure is not None:
        return f"SLURM could not be asked to start job {job} again ({failure}); {again}"
    return f"SLURM was asked to start job {job} again, which goes on here if its command has --resume true"


@contextmanager
def requeued_when_stopped(*, asks: bool) -> Iterator[None]:
    """In a batch job, have SIGTERM and SIGUSR1 end this process only after the job was asked for again.

    For what comes before and after training, which watches for signals itself: caching, planning, scoring. What is done
    by then is found again by the command when it is run once more. Elsewhere signals do what they always do.

    Args:
        asks: whether this process asks SLURM; one of several does.
    """
    if _job(os.environ) is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            # A process started from this one, which inherits the handler.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if asks:
            print(f"mim3d: ended by {signal.Signals(number).name}; {requeue()}", file=sys.stderr, flush=True)
        raise SystemExit(_EXIT_SIGNALLED + number)

    previous: dict[int, Any] = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _job(environment: Mapping[str, str]) -> str | None:
    """The job's number, that of one task for an array; None outside of batch jobs."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID", ""), environment.get("SLURM_ARRAY_TASK_ID", "")
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit() or environment.get("SLURM_JOB_NAME") in _INTERACTIVE:
        return None
    return f"{array}_{task}" if array.isdigit() and task.isdigit() else job


def _state(job: str) -> str | None:
    """Such as RUNNING or COMPLETING; None where SLURM does not say."""
    words = (_scontrol("show", "job", job)[0] or "").split()
    return next((word.removeprefix("JobState=") for word in words if word.startswith("JobState=")), None)


def _scontrol(*arguments: str) -> tuple[str | None, str | None]:
    """What scontrol prints, or why it does not work."""
    try:
        done = subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, " ".join(str(error).split())
    if done.returncode != 0:
        return None, " ".join(done.stderr.split()) or f"scontrol ended with exit code {done.returncode}"
    return done.stdout, None
