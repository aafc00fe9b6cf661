"""Batches brought to the device while it still works on the step before."""

from collections.abc import Iterator
from typing import Any

import lightning_fabric
import torch

from mim3d.objective import Batch

# torch leaves it without types.
_cuda: Any = torch.cuda


def on_device(fabric: lightning_fabric.Fabric, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each on the device when it is given.

    On a GPU they travel on a stream of their own. A batch is asked for once the step before it is enqueued, so that its
    way to the device, and its conversion there, overlap with that step; the step that uses it waits for it on the
    device, never the host. The ring of the loader asks for a slot's next batch when that stream is done with it, since
    it records its events on the stream that is current while a batch is asked for.
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
