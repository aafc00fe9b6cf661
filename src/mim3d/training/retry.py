"""A step that fails: once more when only memory was short, and otherwise the state before it is saved."""

import gc
from collections.abc import Callable, Generator, Iterator

import torch

from mim3d.objective import Batch
from mim3d.training.memory import is_out_of_memory
from mim3d.training.session import Session
from mim3d.training.settings import BatchSource
from mim3d.training.upload import on_device


class Feed(Iterator[Batch]):
    """The micro-batches of this process, on its device; they can begin anew at any step.

    Args:
        session: the run.
        source: where they come from.
        done: steps that were done before.
    """

    def __init__(self, session: Session, source: BatchSource, done: int) -> None:
        self._session = session
        self._source = source
        self._open(done)

    def __next__(self) -> Batch:
        return next(self._batches)

    def begin_after(self, done: int) -> None:
        """Go back to the first micro-batch after step ``done``; what reads now is closed first."""
        for batches in (self._batches, self._read):
            if isinstance(batches, Generator):
                batches.close()
        self._open(done)

    def _open(self, done: int) -> None:
        fabric, first_sample = self._session.fabric, done * self._session.plan.effective_batch
        self._read = self._source.batches(first_sample, rank=fabric.global_rank, world_size=fabric.world_size)
        self._batches = on_device(fabric, self._read)


def attempt(session: Session, feed: Feed, step: int, take: Callable[[], Batch]) -> Batch:
    """Take a step; where it runs out of memory, free what there is and take it once more, drawing the same numbers.

    A process among several is not given a second try, as the others would not know of it.

    Args:
        session: the run.
        feed: gives the step its micro-batches.
        step: the optimiser step.
        take: takes it.
    Raises:
        Exception: what ``take`` raised; the state before the step is saved.
    """
    try:
        return take()
    except Exception as error:
        if not _may_retry(session, step, error):
            session.rescue()
            raise
    # Out of the handler: the error holds on to the tensors of the failed step.
    session.forget_step(step)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    feed.begin_after(step - 1)
    try:
        return take()
    except Exception:
        session.rescue()
        raise


def _may_retry(session: Session, step: int, error: Exception) -> bool:
    short = isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)
    return short and session.fabric.world_size == 1 and not session.updating and session.meter.bad_steps.may_retry(step)
