"""Item after item in three stages that overlap: the next is prepared and the last finished while one computes.

Two threads beside the caller's own. No more items are in memory than one ahead, one that computes and one behind.
What is computed, what fails and in which order that is recorded is as if one item came after the other.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from mim3d.core.errors import TooLargeError
from mim3d.core.left_out import Failure
from mim3d.core.resources import sharing_memory
from mim3d.core.warned import Held, held_warnings, holding_apart

#: Share of the available memory that is enough for the item ahead; one that needs more waits for its turn.
AHEAD_SHARE = 0.25

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Done = TypeVar("Done")
Result = TypeVar("Result")


class Stages(ABC, Generic[Item, Ready, Done, Result]):
    """What becomes of each item. An error of one stage is the item's own and stops no other item."""

    @abstractmethod
    def prepare(self, item: Item) -> Ready:
        """Read an item. It runs in a thread of its own, before the item's turn."""

    @abstractmethod
    def compute(self, item: Item, ready: Ready) -> Done:
        """Compute an item in the caller's thread."""

    @abstractmethod
    def finish(self, item: Item, done: Done) -> Result:
        """Write what was computed of an item. It runs in another thread, while the next item computes."""

    @abstractmethod
    def record(self, item: Item, result: Result | Exception) -> None:
        """Take what :meth:`finish` returned, or the error of the stage that failed.

        It runs in the thread of :meth:`finish`, once for each item and in their order. An error of its own ends the
        whole run.
        """

    def lacks_memory(self, outcome: Ready | Done | Exception) -> bool:
        """Whether memory was short for what a stage returned or raised. The item is then done again with all of it."""
        return is_too_large(outcome)


def is_too_large(outcome: object) -> bool:
    """Whether an error says that the memory of the machine (not that of a GPU) was too small."""
    return isinstance(outcome, (MemoryError, TooLargeError))


def failure_of(error: Exception, name: str, memory_remedy: str) -> Failure:
    """Why an item, whose first file has a name, could not be done, and what helps where memory was short."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return Failure(f"{name}: not enough memory; {memory_remedy}.")
    return Failure.of(error, name)


def run_overlapped(items: Sequence[Item], stages: Stages[Item, Ready, Done, Result]) -> None:
    """Prepare, compute and finish items so that the stages of neighbours overlap.

    What a stage warns of is shown when it is the item's turn. On the way out after an error or an interruption the item
    ahead is dropped, and what was computed is finished and recorded.

    Raises:
        Exception: What ``record`` raised.
    """

    def prepared(item: Item, share: float) -> tuple[Ready | Exception, list[Held]]:
        with sharing_memory(share), held_warnings() as said:
            return outcome_of(stages.prepare, item), said

    def close(item: Item, done: Done | Exception) -> None:
        with held_warnings() as said:
            result = done if isinstance(done, Exception) else outcome_of(stages.finish, item, done)
        _show(said)
        stages.record(item, result)

    ahead: Future[tuple[Ready | Exception, list[Held]]] | None = None
    behind: Future[None] | None = None
    with holding_apart(), _thread("ahead") as reader, _thread("behind") as writer:
        for place, item in enumerate(items):
            ready, said = (ahead or reader.submit(prepared, item, 1.0)).result()
            _show(said)
            if ahead is not None and stages.lacks_memory(ready):
                # It may have been for want of what the items before it held.
                _wait(behind)
                ready = outcome_of(stages.prepare, item)
            rest = items[place + 1 : place + 2]
            ahead = reader.submit(prepared, rest[0], AHEAD_SHARE) if rest else None
            done = ready if isinstance(ready, Exception) else outcome_of(stages.compute, item, ready)
            if stages.lacks_memory(done) and not isinstance(ready, Exception) and (ahead or behind):
                del ready, done
                _wait(behind)
                if ahead is not None:
                    _show(ahead.result()[1])
                    ahead = None
                ready = outcome_of(stages.prepare, item)
                done = ready if isinstance(ready, Exception) else outcome_of(stages.compute, item, ready)
            _wait(behind)
            behind = writer.submit(close, item, done)
            # From here on they are the writer's.
            del ready, done
        _wait(behind)


def outcome_of(stage: Callable[..., Any], *arguments: Any) -> Any:
    """What a stage returns, or the error that it raises."""
    try:
        return stage(*arguments)
    except Exception as error:  # Whatever it is, it must not stop the other items.
        return error


def _show(said: list[Held]) -> None:
    for warning in said:
        warning()


def _wait(future: Future[Any] | None) -> None:
    """Wait for a thread, and raise what it raised."""
    if future is not None:
        future.result()


@contextmanager
def _thread(name: str) -> Iterator[ThreadPoolExecutor]:
    """One thread, joined on the way out; it ends what it does, and begins nothing more after an error."""
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
    try:
        yield executor
    finally:
        executor.shutdown(wait=True, cancel_futures=name == "ahead")
