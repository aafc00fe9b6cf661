"""Micro-batches on the device: brought there while it still works on the step before, and read again when asked."""

from collections.abc import Generator, Iterator
from typing import Any

import lightning_fabric
import torch

from mim3d.objective import Batch
from mim3d.training.settings import BatchSource

# torch leaves it without types.
_cuda: Any = torch.cuda


class DeviceBatches(Iterator[Batch]):
    """The micro-batches of this process, on its device.

    Args:
        fabric: Lightning Fabric of this process.
        source: Where the micro-batches come from.
        effective_batch: Samples per optimiser step over all processes.
        done: Optimiser steps that were done before.
    """

    def __init__(self, fabric: lightning_fabric.Fabric, source: BatchSource, effective_batch: int, done: int) -> None:
        self._fabric = fabric
        self._source = source
        self._effective_batch = effective_batch
        self._open(done)

    def __next__(self) -> Batch:
        return next(self._batches)

    def restart_after(self, done: int) -> None:
        """Close the readers and go back to the first micro-batch after optimiser step ``done``."""
        for batches in (self._batches, self._read):
            if isinstance(batches, Generator):
                batches.close()
        self._open(done)

    def _open(self, done: int) -> None:
        first_sample, fabric = done * self._effective_batch, self._fabric
        self._read = self._source.batches(first_sample, rank=fabric.global_rank, world_size=fabric.world_size)
        self._batches = on_device(fabric, self._read)


def on_device(fabric: lightning_fabric.Fabric, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each on the device when it is given.

    On a GPU they travel on a stream of their own. A batch is asked for once the step before it is enqueued, so that its
    way to the device, and its conversion there, overlap with that step. The step that uses it waits for it on the
    device, never on the host. The ring of the loader asks for a slot's next batch when that stream is done with it,
    since it records its events on the stream that is current while a batch is asked for.
    """
    if fabric.device.type != "cuda":
        for batch in batches:
            yield fabric.to_device(batch)
        return
    uploads = _cuda.Stream(fabric.device)
    while True:
        with _cuda.stream(uploads):
            batch = fabric.to_device(next(batches))
        computing = _cuda.current_stream(fabric.device)
        computing.wait_stream(uploads)
        for value in batch.values():
            # Its memory is the upload stream's; it must not be given to a later batch while this step reads it.
            value.record_stream(computing)
        yield batch
