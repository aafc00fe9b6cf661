"""What a reading process does: fill slots of shared memory with batches, and say in a few bytes what lies where.

It asks for nothing, holds nothing that others wait for, and may be killed at any time. It ends when the trainer does.
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
from mim3d.kernels.allocator import keep_freed_memory
from mim3d.loading.stored_images import Allocate, Packed

#: Seconds between two looks of an idle reading process at whether its trainer is still there.
TRAINER_CHECK_S = 1.0

#: Ctrl-C in a terminal and a scheduler's signals reach every process of a job. What becomes of them is the trainer's to
#: decide, which may need some more batches before it can write a checkpoint.
_OF_THE_TRAINER = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]

#: Arrays begin at multiples of so many bytes.
ALIGNMENT = 64


@dataclass(frozen=True)
class Filled:
    """A finished batch.

    Attributes:
        arrays: by batch key.
        damaged: case -> what is wrong with it, of scans that others stood in for.
    """

    arrays: dict[str, Packed]
    damaged: dict[str, str]


#: Makes batch ``number`` in arrays that the second argument gives.
Fill = Callable[[int, Allocate], Filled]


@dataclass(frozen=True)
class Place:
    """Where an array lies in the shared memory, which both sides have at addresses of their own."""

    offset: int
    shape: tuple[int, ...]
    type_name: str

    @classmethod
    def of(cls, array: np.ndarray, memory: np.ndarray) -> "Place":
        """The place of an array within ``memory``."""
        return cls(array.ctypes.data - memory.ctypes.data, array.shape, array.dtype.name)

    def array(self, memory: np.ndarray) -> np.ndarray:
        """The array there."""
        return np.ndarray(self.shape, np.dtype(self.type_name), buffer=memory, offset=self.offset)


@dataclass(frozen=True)
class Done:
    """The message that a batch is there.

    Attributes:
        places: batch key -> place of the array, and of the rescaling of images.
        damaged: see ``Filled``.
    """

    places: dict[str, tuple[Place, Place | None]]
    damaged: dict[str, str]

    @classmethod
    def of(cls, filled: Filled, memory: np.ndarray) -> "Done":
        """The message for a batch in the shared memory."""
        places = {
            key: (
                Place.of(packed.array, memory),
                None if packed.rescaling is None else Place.of(packed.rescaling, memory),
            )
            for key, packed in filled.arrays.items()
        }
        return cls(places, filled.damaged)

    def filled(self, memory: np.ndarray) -> Filled:
        """The batch that the message is about."""
        arrays = {
            key: Packed(array.array(memory), None if rescaling is None else rescaling.array(memory))
            for key, (array, rescaling) in self.places.items()
        }
        return Filled(arrays, self.damaged)


@dataclass(frozen=True)
class Failed:
    """The message that a batch could not be made."""

    kind: type[Exception]
    text: str

    @classmethod
    def of(cls, error: Exception) -> "Failed":
        """As the nearest class that every process knows; with the trace where the sentence alone would not do."""
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


class Shelf:
    """Gives arrays side by side in one slot of the shared memory.

    Args:
        slot: the slot's bytes.
    """

    def __init__(self, slot: np.ndarray) -> None:
        self._slot = slot
        self._end = 0

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """An array of undefined content.

        Raises:
            DataError: the slot is full.
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


def read_batches(channel: Connection, trainer: int, fill: Fill, memory: Tensor, slot_bytes: int) -> None:
    """Fill the slots that the trainer asks for, until it closes the channel or is gone.

    Args:
        channel: gives ``(batch number, slot)``, takes ``Done`` or ``Failed``.
        trainer: process id of the trainer.
        fill: makes the batches.
        memory: the shared bytes.
        slot_bytes: bytes of each slot in them.
    """
    _prepare()
    shared = memory.numpy()
    for number, slot in _requests(channel, trainer):
        try:
            shelf = Shelf(shared[slot * slot_bytes : (slot + 1) * slot_bytes])
            message: Done | Failed = Done.of(fill(number, shelf), shared)
        except Exception as error:
            message = Failed.of(error)
        with suppress(OSError):
            channel.send(message)


def _requests(channel: Connection, trainer: int) -> Iterator[tuple[int, int]]:
    with suppress(EOFError, OSError):
        while True:
            # A killed trainer's end stays open in the processes that it started after this one.
            while not channel.poll(TRAINER_CHECK_S):
                if os.getppid() != trainer:
                    return
            yield channel.recv()


def _prepare() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    for number in _OF_THE_TRAINER:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_TRAINER)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold back, in processes started inside, what they will ignore once they run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_TRAINER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
