"""Processes that train together watch each other: one that hangs is named, and in the end all of them are ended.

A thread in each process writes every few seconds how far its training has come into the key-value store through which
the processes met. The thread of the first process reads what all have written. This works while the training itself is
stuck in a collective operation.
"""

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import torch

from mim3d.core.errors import first_line

READING, COMPUTING, BETWEEN = "waits for data", "computes", "is done with the step"

#: In the order of a step. Whatever else is done between two steps (validating, saving) may take any time.
_PHASES = (READING, COMPUTING, BETWEEN)

#: Share of the patience after which the first process says which one keeps the others waiting.
_WARN_SHARE = 1 / 6

#: Seconds that a process has to end by itself, after the one that keeps the store, or another one, has failed.
_FAREWELL_S = 60.0

_LONGEST_BEAT_S = 5.0

#: What gloo and NCCL say where the process at the other end has gone.
_LOST = re.compile(r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited|nccl", re.IGNORECASE)


class Heartbeat:
    """Reports how far this process is and ends it when the run is stuck. Does nothing in a run of one process.

    Args:
        rank: Number of this process.
        world_size: Number of all processes.
        report: Called with one sentence when something is wrong.
        patience_s: Seconds without progress after which all processes are ended.
        store: Key-value store through which the processes talk. The store of the default process group if not given.
        end: Ends the process with an exit code.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        report: Callable[[str], None],
        patience_s: float,
        *,
        store: Any = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._report = report
        self._patience_s = patience_s
        self._beat_s = min(_LONGEST_BEAT_S, _WARN_SHARE * patience_s / 4)
        self._store = store
        self._end = end
        self._progress = (0, BETWEEN)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._world_size > 1:
            if self._store is None:
                self._store = torch.distributed.distributed_c10d._get_default_store()
            # A connection of its own, since a process waits for the answer on the one it has.
            self._store = self._store.clone()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(_FAREWELL_S)
            if error is not None:
                self._write(f"failed {first_line(error)}")

    def at(self, step: int, phase: str) -> None:
        """Note how far this process is. Costs nothing."""
        self._progress = (step, phase)

    def _run(self) -> None:
        monitor = StallMonitor(self._world_size, self._patience_s) if self._rank == 0 else None
        lost_s = 0.0
        at = time.monotonic()
        while not self._over.wait(self._beat_s):
            # While all of a job is suspended, clocks go on and nothing else does: no process is to blame for that.
            passed_s = min(time.monotonic() - at, 2 * self._beat_s)
            at = time.monotonic()
            written = self._write("{} {}".format(*self._progress))
            lost_s = 0.0 if written else lost_s + passed_s
            if lost_s > min(_FAREWELL_S, self._patience_s):
                self._finish("the first process has ended")
            if monitor is not None and written:
                messages: dict[int, str] = {}
                with suppress(RuntimeError, ValueError):
                    keys = {rank: f"mim3d/heartbeat/{rank}" for rank in range(self._world_size)}
                    there = {rank: key for rank, key in keys.items() if self._store.check([key])}
                    messages = {rank: self._store.get(key).decode() for rank, key in there.items()}
                warning = monitor.update(messages, passed_s)
                if warning is not None:
                    self._report(f"warning: {warning}")
                if monitor.verdict is not None:
                    self._finish(monitor.verdict)

    def _finish(self, why: str) -> None:
        if not self._over.is_set():
            self._report(f"process {self._rank} is ended, because {why}")
            self._over.set()
            self._end(1)

    def _write(self, text: str) -> bool:
        """Whether the store has taken the text. It ends with the first process."""
        try:
            self._store.set(f"mim3d/heartbeat/{self._rank}", f"{time.time()} {text}")
        except (RuntimeError, ValueError):
            return False
        return True


class StallMonitor:
    """Finds from the messages of all processes which one keeps the others waiting.

    Args:
        world_size: Number of all processes.
        patience_s: Seconds without progress after which the processes are to be ended.
    Attributes:
        verdict: Why all processes must end. None while they may go on.
    """

    def __init__(self, world_size: int, patience_s: float) -> None:
        self._world_size = world_size
        self._patience_s = patience_s
        self._now = 0.0
        self._last_message: dict[int, tuple[str, float]] = {}
        self._last_progress: tuple[Any, float] = (None, 0.0)
        self._warned = False
        self.verdict: str | None = None

    def update(self, messages: dict[int, str], passed_s: float) -> str | None:
        """Take in what the processes have written.

        Args:
            messages: Last message of each process: when it wrote, then its step and phase, or that it failed and why.
            passed_s: Seconds since the last update.
        Returns:
            A warning, once, when a process keeps the others waiting; else None.
        """
        self._now += passed_s
        for rank in range(self._world_size):
            message = messages.get(rank, "")
            if rank not in self._last_message or self._last_message[rank][0] != message:
                self._last_message[rank] = (message, self._now)
        parts = {rank: message.split(" ", 2)[1:] for rank, message in messages.items()}
        failed = {rank: rest for rank, (step, rest) in parts.items() if step == "failed"}
        reached = {rank: (int(step), phase) for rank, (step, phase) in parts.items() if step != "failed"}
        if self._last_progress[0] != (reached, failed):
            self._last_progress, self._warned = ((reached, failed), self._now), False
        still_s = self._now - self._last_progress[1]
        if failed:
            if still_s > min(_FAREWELL_S, self._patience_s):
                self.verdict = "; ".join(f"process {rank} has failed: {why}" for rank, why in failed.items())
        elif all(phase in _PHASES for _, phase in reached.values()):
            if still_s > self._patience_s:
                self.verdict = self._describe(reached, still_s)
            elif still_s > _WARN_SHARE * self._patience_s and not self._warned:
                self._warned = True
                return self._describe(reached, still_s)
        return None

    def _describe(self, reached: dict[int, tuple[int, str]], still_s: float) -> str:
        """Which processes keep the others waiting, and where they are."""
        after = f"for {still_s / 60:.0f} min" if still_s >= 60 else f"for {still_s:.0f} s"
        longest_s = 0.8 * _WARN_SHARE * self._patience_s
        silent = [rank for rank, (_, at) in self._last_message.items() if self._now - at > longest_s]
        if silent:
            return f"nothing was heard {after} of {_named(silent)}; look whether its machine is still there"
        progress = {rank: (step, _PHASES.index(phase)) for rank, (step, phase) in reached.items()}
        behind = [rank for rank in progress if progress[rank] == min(progress.values())]
        step, phase = reached[behind[0]]
        if len(behind) == self._world_size:
            return f"no process went on {after}: each {phase} at step {step}"
        return f"the others wait {after} for {_named(behind)} at step {step}: it {phase}"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error of a collective call says that another process cannot be reached any more."""
    return _LOST.search(str(error)) is not None
