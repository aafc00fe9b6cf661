"""Work in processes of its own: one that crashes, is killed or hangs costs its item alone, and the reason is known.

Processes are spawned, not forked: the caller may run threads (torch, progress bars), which a fork would freeze. They do
not run the caller's script again, and they end with the process that started them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

from mim3d.core.errors import DataError
from mim3d.core.resources import num_oom_kills
from mim3d.core.signals import STOP_SIGNALS, ignore_signals

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Seconds after which an item that is still not done is given up, where nothing else is asked for.
ITEM_TIMEOUT_S = 3600.0

#: Seconds for items to come to an end when no more results are wanted.
_CLOSING_S = 5.0

#: Items that may end their process before the first is done: beyond that the items are not to blame.
MAX_LOST_AT_FIRST = 8

#: Times that an item is tried: one that was killed might not have been to blame, and is tried with nothing beside it.
_MAX_TRIES = {True: 3, False: 2}


@contextmanager
def without_main_module() -> Iterator[None]:
    """Start processes that do not run the caller's script again.

    A spawned process imports the main module, so that a script without ``if __name__ == "__main__"`` would call itself
    in every worker; these workers need nothing of it.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def prepare_worker() -> None:
    """Prepare a new worker process: its parent answers signals that ask to stop, and it ends when its parent ends."""

    def end_with_parent() -> None:
        # Without this, the workers of a pool outlive a parent that was killed.
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    ignore_signals(STOP_SIGNALS)
    threading.Thread(target=end_with_parent, daemon=True).start()


@dataclass(frozen=True)
class Ended:
    """How a process ended before its item was done.

    Attributes:
        exit_code: Its exit code, below 0 for a signal; None where it was ended after the deadline.
        timeout_s: Deadline in seconds.
        out_of_memory: Whether the system ended a process for lack of memory meanwhile; None where it does not say.
    """

    exit_code: int | None
    timeout_s: float
    out_of_memory: bool | None = None

    @property
    def was_killed(self) -> bool:
        """Whether it was ended from outside, perhaps because of what ran beside it."""
        return self.exit_code == -signal.SIGKILL

    def __str__(self) -> str:
        """What became of the process, and the remedy, to stand behind "the process that worked on it"."""
        if self.exit_code is None:
            return f"was not done after {self.timeout_s:g} s; look at the file and its disk, or allow more time"
        if self.was_killed and self.out_of_memory is not False:
            why = "because it" if self.out_of_memory else "perhaps because it"
            return f"was killed, {why} ran out of memory; crop the scan, or run again where there is more memory"
        if self.was_killed:
            return "was killed from outside, though not for lack of memory; run again to try once more"
        if self.exit_code < 0:
            name = signal.Signals(-self.exit_code).name
            return f"crashed ({name}): the file makes a library fail; convert it by another program, and report it"
        return f"ended with exit code {self.exit_code}; please report it"


@dataclass
class _WorkingProcess(Generic[Item]):
    """A process, and what it works on."""

    process: BaseProcess
    connection: Connection
    is_ready: bool = False
    item: Item | None = None
    since: float = 0.0


class Workers(Generic[Item, Result]):
    """Processes that do one item after the other; closed by ``with``, which soon ends what is still in work.

    Args:
        work: Makes a result of an item, in every process; it and all results are pickled.
        timeout_s: Seconds that an item may take.
    """

    def __init__(self, work: Callable[[Item], Result], timeout_s: float) -> None:
        self._work = work
        self._timeout_s = timeout_s
        self._workers: list[_WorkingProcess[Item]] = []
        self._oom_kills = num_oom_kills()

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *_error: object) -> None:
        end = time.monotonic() + _CLOSING_S
        working = {worker.connection for worker in self._workers if worker.item is not None and worker.is_ready}
        while working and (done := wait(list(working), end - time.monotonic())):
            working.difference_update(done)
        for worker in self._workers:
            worker.connection.close()
            if not worker.is_ready or worker.connection in working:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join()

    @property
    def num_busy(self) -> int:
        """Number of items in work."""
        return sum(worker.item is not None for worker in self._workers)

    def give(self, item: Item) -> None:
        """Hand an item to a process that has none, or to a new one.

        Raises:
            OSError: No process can be started.
        """
        worker = next((each for each in self._workers if each.item is None), None)
        if worker is None:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, self._work))
            with without_main_module():
                process.start()
            theirs.close()
            worker = _WorkingProcess(process, ours)
            self._workers.append(worker)
        worker.item = item
        if worker.is_ready:
            self._send(worker)

    def _send(self, worker: _WorkingProcess[Item]) -> None:
        worker.since = time.monotonic()
        try:
            worker.connection.send(worker.item)
        except OSError:
            # It has ended: the next wait finds that.
            return

    def take(self) -> tuple[Item, Result | Ended]:
        """Wait until an item in work is done, or its process has ended or is late."""
        while True:
            busy = {worker.connection: worker for worker in self._workers if worker.item is not None}
            started = [worker.since for worker in busy.values() if worker.is_ready]
            left_s = None if not started else max(0.0, min(started) + self._timeout_s - time.monotonic())
            for connection in wait(list(busy), left_s):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                item = worker.item
                assert item is not None
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    return item, self._ended(worker)
                if worker.is_ready:
                    worker.item = None
                    return item, answer
                worker.is_ready = True
                self._send(worker)
            for worker in busy.values():
                if worker.is_ready and time.monotonic() - worker.since >= self._timeout_s:
                    item = worker.item
                    assert item is not None
                    worker.process.kill()
                    self._ended(worker)
                    return item, Ended(None, self._timeout_s)

    def _ended(self, worker: _WorkingProcess[Item]) -> Ended:
        self._workers.remove(worker)
        worker.connection.close()
        worker.process.join()
        before, self._oom_kills = self._oom_kills, num_oom_kills()
        known = before is not None and self._oom_kills is not None
        return Ended(worker.process.exitcode, self._timeout_s, self._oom_kills != before if known else None)


def _serve(connection: Connection, work: Callable[[Item], Result]) -> None:
    """Runs in a process: says that it is ready, then answers items until its parent closes the connection."""
    prepare_worker()
    try:
        connection.send(None)
        while True:
            connection.send(work(connection.recv()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def work_through(
    items: Sequence[Item],
    work: Callable[[Item], Result],
    num_workers: int,
    *,
    timeout_s: float = ITEM_TIMEOUT_S,
    place: str,
) -> Generator[tuple[Item, Result | Ended], None, None]:
    """Do items in processes; each with its result, or how its process ended, in the order in which they are done.

    A process may be killed by a system that runs out of memory, guilty or not. Such an item is done again with nothing
    beside it; where that works, fewer processes go on. One that crashes its process is tried twice, one that takes too
    long is not.

    Args:
        items: The items, each of them once.
        work: Makes a result of an item. It raises nothing.
        num_workers: Number of processes, at least 1.
        timeout_s: Seconds that an item may take.
        place: What is worked on, for messages.

    Raises:
        DataError: Processes cannot be started, or end at every item.
    """
    waiting, suspects, tries = deque(items), deque[Item](), Counter[int]()
    num_done, num_lost, guilty, is_alone = 0, 0, False, False
    with Workers[Item, Result](work, timeout_s) as workers:
        while waiting or suspects or workers.num_busy:
            try:
                if suspects and not workers.num_busy:
                    workers.give(suspects.popleft())
                    is_alone = True
                # No more than are done at once, so that few are under suspicion.
                while waiting and not suspects and not is_alone and workers.num_busy < num_workers:
                    workers.give(waiting.popleft())
            except OSError as error:
                raise DataError(
                    f"{place}: no process can be started ({error.strerror or error}); run again with fewer "
                    "num_workers: what is finished is kept."
                ) from error
            item, answer = workers.take()
            was_alone, is_alone = is_alone, False
            if isinstance(answer, Ended):
                tries[id(item)] += 1
                if answer.exit_code is not None and tries[id(item)] < _MAX_TRIES[answer.was_killed]:
                    (suspects if answer.was_killed else waiting).append(item)
                    continue
                num_lost, guilty = num_lost + 1, True
            else:
                num_done += 1
            yield item, answer
            if num_done == 0 and num_lost >= MAX_LOST_AT_FIRST:
                raise DataError(f"{place}: {num_lost} times out of {num_lost} the process that works {answer}.")
            if was_alone and not suspects:
                if not guilty and num_workers > 1:
                    # Each of them fits into memory alone, so they did not fit all at once.
                    num_workers = (num_workers + 1) // 2
                    warnings.warn(f"{place}: a process was killed; going on with {num_workers}.", stacklevel=2)
                guilty = False
