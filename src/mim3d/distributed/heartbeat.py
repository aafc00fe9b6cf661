"""Processes that train together keep an eye on each other: one that hangs is named, and ends them all in the end.

A thread in each writes every few seconds how far its training has come into the key-value store by which the processes
met; that of the first process reads. It works while the training itself is stuck in a collective operation.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import torch

READING, COMPUTING, BETWEEN = "waits for data", "computes", "is done with the step"

#: In the order of a step; whatever else is done between two steps (validating, saving) may take as long as it takes.
_PHASES = (READING, COMPUTING, BETWEEN)

#: Share of the patience after which the first process says who keeps the others waiting.
_WARN_SHARE = 1 / 6

#: Seconds that a process goes on after the one that keeps the store, or another, has failed: to end by itself.
_FAREWELL_S = 60.0

_LONGEST_BEAT_S = 5.0


class Heartbeat:
    """This process's part; does nothing in a run of one process.

    Args:
        rank: of this process.
        world_size: number of processes.
        tell: told one sentence when something is wrong.
        patience_s: seconds without progress after which all processes are ended.
        store: by which the processes meet; that of the default process group if not given.
        end: ends the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        tell: Callable[[str], None],
        patience_s: float,
        *,
        store: Any = None,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._tell = tell
        self._patience_s = patience_s
        self._beat_s = min(_LONGEST_BEAT_S, _WARN_SHARE * patience_s / 4)
        self._store = store
        self._end = end
        self._place = (0, BETWEEN)
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
                self._write(f"failed {(str(error).strip() or type(error).__name__).splitlines()[0]}")

    def at(self, step: int, phase: str) -> None:
        """Note how far this process is; costs nothing."""
        self._place = (step, phase)

    def _run(self) -> None:
        watch = _Watch(self._world_size, self._patience_s) if self._rank == 0 else None
        lost_s = 0.0
        at = time.monotonic()
        while not self._over.wait(self._beat_s):
            # While all of a job is suspended, clocks go on and nothing else does: that is nobody's fault.
            passed_s = min(time.monotonic() - at, 2 * self._beat_s)
            at = time.monotonic()
            kept = self._write("{} {}".format(*self._place))
            lost_s = 0.0 if kept else lost_s + passed_s
            if lost_s > min(_FAREWELL_S, self._patience_s):
                self._finish("the first process has ended")
            if watch is not None and kept:
                sentence = watch.look(self._read(), passed_s)
                if sentence is not None:
                    self._tell(f"warning: {sentence}")
                if watch.verdict is not None:
                    self._finish(watch.verdict)

    def _finish(self, why: str) -> None:
        if not self._over.is_set():
            self._tell(f"process {self._rank} is ended, because {why}")
            self._over.set()
            self._end(1)

    def _write(self, text: str) -> bool:
        """Whether the store has taken it; it is gone with the first process."""
        try:
            self._store.set(f"mim3d/heartbeat/{self._rank}", f"{time.time()} {text}")
        except (RuntimeError, ValueError):
            return False
        return True

    def _read(self) -> dict[int, str]:
        """What each process wrote last."""
        keys = {rank: f"mim3d/heartbeat/{rank}" for rank in range(self._world_size)}
        try:
            return {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        except (RuntimeError, ValueError):
            return {}


class _Watch:
    """What the first process makes of the words of all.

    Attributes:
        verdict: why all must end; None while they may go on.
    """

    def __init__(self, world_size: int, patience_s: float) -> None:
        self._world_size = world_size
        self._patience_s = patience_s
        self._now = 0.0
        self._seen: dict[int, tuple[str, float]] = {}
        self._moved: tuple[Any, float] = (None, 0.0)
        self._warned = False
        self.verdict: str | None = None

    def look(self, words: dict[int, str], passed_s: float) -> str | None:
        """Take note of what the processes wrote; a warning, once, when something keeps them.

        Args:
            words: of each process: when it wrote, its step and phase, or that it failed and why.
            passed_s: seconds since the last look.
        """
        self._now += passed_s
        for rank in range(self._world_size):
            word = words.get(rank, "")
            if rank not in self._seen or self._seen[rank][0] != word:
                self._seen[rank] = (word, self._now)
        places = {rank: word.split(" ", 2)[1:] for rank, word in words.items()}
        failed = {rank: rest for rank, (step, rest) in places.items() if step == "failed"}
        reached = {rank: (int(step), phase) for rank, (step, phase) in places.items() if step != "failed"}
        if self._moved[0] != (reached, failed):
            self._moved, self._warned = ((reached, failed), self._now), False
        still_s = self._now - self._moved[1]
        if failed:
            if still_s > min(_FAREWELL_S, self._patience_s):
                self.verdict = "; ".join(f"process {rank} has failed: {why}" for rank, why in failed.items())
        elif all(phase in _PHASES for _, phase in reached.values()):
            if still_s > self._patience_s:
                self.verdict = self._sentence(reached, still_s)
            elif still_s > _WARN_SHARE * self._patience_s and not self._warned:
                self._warned = True
                return self._sentence(reached, still_s)
        return None

    def _sentence(self, reached: dict[int, tuple[int, str]], still_s: float) -> str:
        after = f"for {still_s / 60:.0f} min" if still_s >= 60 else f"for {still_s:.0f} s"
        quiet = [rank for rank, (_, at) in self._seen.items() if self._now - at > 0.8 * _WARN_SHARE * self._patience_s]
        if quiet:
            return f"nothing was heard {after} of {_named(quiet)}; look whether its machine is still there"
        # The others wait for those that are behind.
        progress = {rank: (step, _PHASES.index(phase)) for rank, (step, phase) in reached.items()}
        behind = [rank for rank in progress if progress[rank] == min(progress.values())]
        step, phase = reached[behind[0]]
        if len(behind) == self._world_size:
            return f"no process went on {after}: each {phase} at step {step}"
        return f"the others wait {after} for {_named(behind)} at step {step}: it {phase}"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")
    return f"process {shown}" if len(ranks) == 1 else f"processes {shown}"
