"""What a reading process does: write batches into slots of shared memory, and send the trainer where their arrays lie.

It holds nothing that others wait for, and may be killed at any time. It ends when the trainer does.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim3d.core.errors import DataError, Mim3dError
from mim3d.kernels.machine import keep_freed_memory
from mim3d.loading.stored_images import Allocate, Packed

#: Seconds after which an idle reading process checks again that its trainer is still there.
TRAINER_CHECK_S = 1.0

#: Ctrl-C in a terminal and a scheduler's signals reach every process of a job. The trainer alone answers them, and it
#: may need some more batches before it can write a checkpoint.
_TRAINER_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

#: Arrays begin at multiples of this many bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class ReadBatch:
    """A batch as it was read.

    Attributes:
        arrays: Batch key -> its values.
        damaged: Case -> what is wrong with it, for scans that were replaced by others.
    """

    arrays: dict[str, Packed]
    damaged: dict[str, str]


#: Reads the batch of a number into arrays that the second argument allocates.
BatchReader = Callable[[int, Allocate], ReadBatch]


@dataclass(frozen=True)
class SharedArray:
    """An array by its place in the shared memory, which each process has at an address of its own.

    Attributes:
        offset: First byte of the array in the memory.
        shape: Shape of the array.
        type_name: Name that numpy gives its type.
    """

    offset: int
    shape: tuple[int, ...]
    type_name: str

    @classmethod
    def of(cls, array: np.ndarray, memory: np.ndarray) -> "SharedArray":
        """An array that lies within ``memory``."""
        return cls(array.ctypes.data - memory.ctypes.data, array.shape, array.dtype.name)

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The array itself, in this process's ``memory``."""
        return np.ndarray(self.shape, np.dtype(self.type_name), buffer=memory, offset=self.offset)


@dataclass(frozen=True)
class BatchReady:
    """The message that a batch lies in the shared memory.

    Attributes:
        arrays: Batch key -> the values, and the rescaling of images.
        damaged: What is wrong with which case, see ``ReadBatch``.
    """

    arrays: dict[str, tuple[SharedArray, SharedArray | None]]
    damaged: dict[str, str]

    @classmethod
    def of(cls, batch: ReadBatch, memory: np.ndarray) -> "BatchReady":
        """The message for a batch whose arrays lie in the shared memory."""
        arrays = {
            key: (
                SharedArray.of(packed.array, memory),
                None if packed.rescaling is None else SharedArray.of(packed.rescaling, memory),
            )
            for key, packed in batch.arrays.items()
        }
        return cls(arrays, batch.damaged)

    def batch(self, memory: np.ndarray) -> ReadBatch:
        """The batch that the message is about."""
        arrays = {
            key: Packed(values.view(memory), None if rescaling is None else rescaling.view(memory))
            for key, (values, rescaling) in self.arrays.items()
        }
        return ReadBatch(arrays, self.damaged)


@dataclass(frozen=True)
class BatchFailed:
    """The message that a batch could not be read.

    Attributes:
        kind: Class of the error to raise in the trainer.
        text: Its sentence.
    """

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception) -> "BatchFailed":
        """The message for an error, as the nearest class that every process knows.

        Errors other than mim3d's own bring their trace, as their sentence alone explains too little.
        """
        known = (Exception.__module__, Mim3dError.__module__)
        kind = next(kind for kind in type(error).__mro__ if kind.__module__ in known)
        text = str(error) if isinstance(error, Mim3dError) else f"in a reading process:\n{traceback.format_exc()}"
        return cls(kind, text)

    def error(self) -> Exception:
        """The error to raise in the trainer."""
        try:
            return self.kind(self.text)
        except TypeError:
            return RuntimeError(self.text)


class SlotAllocator:
    """Allocates arrays side by side in one slot of the shared memory.

    Args:
        slot: Bytes of the slot.
    """

    def __init__(self, slot: np.ndarray) -> None:
        self._slot = slot
        self._end = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array of undefined content.

        Raises:
            DataError: The slot is full.
        """
        start = aligned(self._end)
        self._end = start + int(np.prod(shape)) * dtype.itemsize
        if self._end > len(self._slot):
            raise DataError(
                f"A batch needs more than the {len(self._slot)} bytes that the first sample gave reason to set aside; "
                "give all samples the same shape, or read them with --num_workers 0."
            )
        return self._slot[start : self._end].view(dtype).reshape(shape)


def aligned(num_bytes: int) -> int:
    """The next place where an array may begin."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def read_batches(channel: Connection, trainer: int, read: BatchReader, memory: Tensor, slot_bytes: int) -> None:
    """Read the batches that the trainer requests, until it closes the channel or is gone.

    Args:
        channel: Gives ``(batch number, slot)``, takes ``BatchReady`` or ``BatchFailed``.
        trainer: Process id of the trainer.
        read: Reads the batches.
        memory: The shared bytes.
        slot_bytes: Number of bytes of each slot in them.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    for number in _TRAINER_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TRAINER_SIGNALS)
    shared = memory.numpy()
    for number, slot in _requests(channel, trainer):
        try:
            allocate = SlotAllocator(shared[slot * slot_bytes : (slot + 1) * slot_bytes])
            message: BatchReady | BatchFailed = BatchReady.of(read(number, allocate), shared)
        except Exception as error:
            message = BatchFailed.of(error)
        with suppress(OSError):
            channel.send(message)


def _requests(channel: Connection, trainer: int) -> Iterator[tuple[int, int]]:
    with suppress(EOFError, OSError):
        while True:
            # A killed trainer's end of the channel stays open in the processes that it started after this one.
            while not channel.poll(TRAINER_CHECK_S):
                if os.getppid() != trainer:
                    return
            yield channel.recv()


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block, in processes started inside, the signals that they ignore once they run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINER_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
