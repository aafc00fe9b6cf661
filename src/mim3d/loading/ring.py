"""Batches from reading processes through one shared buffer: no voxel is pickled, sent or copied on the way.

Each process owns a few slots of the buffer. Process ``w`` of ``W`` reads batches ``w``, ``w + W``, ...: the order does
not depend on their speed. The trainer requests a batch in a slot, receives a message of a few bytes that says where its
arrays lie, and requests a later batch in the same slot once nothing reads it any more.

The buffer has no name that could outlive a killed process, and nothing is locked. The first half of this file is what
the reading processes and the trainer tell each other, the second half is the trainer's side.
"""

import multiprocessing
import os
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from mim3d.core.errors import DataError, Mim3dError
from mim3d.core.own_code import OwnCode, own_code
from mim3d.core.signals import STOP_SIGNALS, ignore_signals
from mim3d.kernels.machine import keep_freed_memory
from mim3d.loading.stored_images import MAX_VOXEL_BYTES, Allocate, Packed
from mim3d.scans.intensity import NO_RESCALING

#: Seconds after which an idle reading process checks again that its trainer is still there.
TRAINER_CHECK_S = 1.0

#: Arrays begin at multiples of this many bytes.
ALIGNMENT = 64

#: Batches of each process that are being read or on their way.
SLOTS_PER_WORKER = 2

#: Seconds to wait for the end of a killed process.
_END_S = 5.0

#: Number of waits that the time limit of a batch is divided into.
_NUM_WAITS = 20

# torch has no types for it.
_cuda: Any = torch.cuda


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
    def of(cls, array: np.ndarray, memory: np.ndarray) -> Self:
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

    arrays: dict[str, tuple[SharedArray, ...]]
    damaged: dict[str, str]

    @classmethod
    def of(cls, batch: ReadBatch, memory: np.ndarray) -> Self:
        """The message for a batch whose arrays lie in the shared memory."""
        arrays = {
            key: tuple(SharedArray.of(array, memory) for array in (packed.array, packed.rescaling) if array is not None)
            for key, packed in batch.arrays.items()
        }
        return cls(arrays, batch.damaged)

    def batch(self, memory: np.ndarray) -> ReadBatch:
        """The batch that the message is about."""
        arrays = {key: Packed(*(place.view(memory) for place in places)) for key, places in self.arrays.items()}
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
    def of(cls, error: Exception) -> Self:
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


def read_batches(
    code: tuple[OwnCode, ...],
    channel: Connection,
    trainer: int,
    read: BatchReader,
    memory: Tensor,
    slot_bytes: int,
) -> None:
    """Read, in a process of its own, the batches that the trainer requests, until that closes the channel or is gone.

    The process holds nothing that others wait for, and may be killed at any time.

    Args:
        code: What finds the user's own code, which ``read`` may be part of.
        channel: Gives ``(batch number, slot)``, takes ``BatchReady`` or ``BatchFailed``.
        trainer: Process id of the trainer.
        read: Reads the batches.
        memory: The shared bytes.
        slot_bytes: Number of bytes of each slot in them.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    # Ctrl-C in a terminal and a scheduler's signals reach every process of a job. The trainer alone answers them, and
    # may need some more batches before it can write a checkpoint.
    ignore_signals(STOP_SIGNALS)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    shared = memory.numpy()
    with suppress(EOFError, OSError):
        while True:
            # A killed trainer's end of the channel stays open in the processes that it started after this one.
            while not channel.poll(TRAINER_CHECK_S):
                if os.getppid() != trainer:
                    return
            number, slot = channel.recv()
            try:
                allocate = SlotAllocator(shared[slot * slot_bytes : (slot + 1) * slot_bytes])
                message: BatchReady | BatchFailed = BatchReady.of(read(number, allocate), shared)
            except Exception as error:
                message = BatchFailed.of(error)
            channel.send(message)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block, in processes started inside, the signals that they ignore once they run."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def slot_bytes(sample: Iterable[Tensor], batch_size: int) -> int:
    """Number of bytes that hold a batch of any stored type.

    Args:
        sample: All tensors of one finished sample, images ``(N, C, X, Y, Z)`` in float32.
        batch_size: Number of samples in a batch.
    """
    total = 0
    for tensor in sample:
        channels = tensor.shape[1] if tensor.ndim == 5 else 0
        total += aligned(batch_size * tensor.nbytes)
        total += aligned(batch_size * channels * len(NO_RESCALING) * MAX_VOXEL_BYTES)
    return total


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    channel: Connection


@dataclass
class _BatchInUse:
    """A batch that the trainer received.

    Attributes:
        number: Number of the batch.
        copied: CUDA event that passes when its copies to the device are done; None where they are done at once.
    """

    number: int
    copied: Any = None


class Ring(Iterator[ReadBatch]):
    """Endless batches, numbered from 0; each stays as it is until the next one is asked for.

    Beside a GPU the buffer is pinned. A slot is then written to again only once all copies have passed that were put
    on the current stream before the next batch was asked for, and the trainer waits for that only if no slot is left.

    Args:
        read: Reads a batch; runs in the reading processes.
        num_workers: Number of reading processes.
        slot_bytes: Number of bytes of the largest batch.
        start_method: How processes are started; chosen for the system if not given.
        timeout_s: Seconds to wait for a batch; None waits for ever.
        describe: Says what a batch is read from, by its number.
    """

    def __init__(
        self,
        read: BatchReader,
        num_workers: int,
        slot_bytes: int,
        *,
        start_method: str | None = None,
        timeout_s: float | None = None,
        describe: Callable[[int], str] = "batch {}".format,
    ) -> None:
        method = start_method or ("fork" if sys.platform == "linux" else "spawn")
        self._num_slots = SLOTS_PER_WORKER * num_workers
        self._timeout_s = timeout_s
        self._describe = describe
        memory = _shared_bytes(self._num_slots * slot_bytes, method)
        self._memory = memory.numpy()
        self._workers: list[_Worker] = []
        self._pinned: list[Tensor] = []
        self._number = 0
        self._in_use: deque[_BatchInUse] = deque()
        # Runs before the interpreter, on its way out, waits for processes that would not end by themselves.
        self._finalizer = Finalize(self, _end, args=(self._workers, self._pinned), exitpriority=0)
        context: Any = multiprocessing.get_context(method)
        for _ in range(num_workers):
            ours, theirs = context.Pipe()
            # What finds the user's own code comes first: the reader may be of it.
            arguments = (own_code(), theirs, os.getpid(), read, memory, slot_bytes)
            process = context.Process(target=read_batches, args=arguments, daemon=True)
            with _signals_blocked():
                process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
        for number in range(self._num_slots):
            self._request(number)
        _pin(memory, self._pinned)

    def __next__(self) -> ReadBatch:
        """The next batch.

        Raises:
            Mim3dError: A reading process ended by itself, or hangs. Any error that one met is raised here.
        """
        self._reuse_slots()
        message = self._receive(self._workers[self._number % len(self._workers)])
        if isinstance(message, BatchFailed):
            raise message.error()
        self._in_use.append(_BatchInUse(self._number))
        self._number += 1
        return message.batch(self._memory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the reading processes; may be called again."""
        self._finalizer()

    def _request(self, number: int) -> None:
        worker = self._workers[number % len(self._workers)]
        try:
            worker.channel.send((number, number % self._num_slots))
        except OSError:
            raise _ended(worker) from None

    def _reuse_slots(self) -> None:
        """Request batches in the slots that nothing reads any more."""
        if self._in_use and self._pinned:
            self._in_use[-1].copied = _cuda.Event()
            self._in_use[-1].copied.record()
        while self._in_use:
            oldest = self._in_use[0]
            if oldest.copied is not None and not oldest.copied.query():
                if self._number - oldest.number < self._num_slots:
                    break
                oldest.copied.synchronize()
            self._in_use.popleft()
            self._request(oldest.number + self._num_slots)

    def _receive(self, worker: _Worker) -> BatchReady | BatchFailed:
        # All of them are watched: a process that is gone is an error at once, not when its turn comes.
        watched: list[Any] = [worker.channel, *(other.process.sentinel for other in self._workers)]
        # In several waits: a job that was suspended for hours loses one of them, not the whole time limit.
        wait_s = None if self._timeout_s is None else self._timeout_s / _NUM_WAITS
        ready = next((ready for _ in range(_NUM_WAITS) if (ready := wait(watched, wait_s))), [])
        if not ready:
            raise Mim3dError(
                f"A reading process (id {worker.process.pid}) has been at {self._describe(self._number)} for "
                f"{(self._timeout_s or 0) / 60:.3g} min; look whether the disk answers, or raise --read_timeout."
            )
        for other in self._workers:
            if other.process.sentinel in ready:
                raise _ended(other)
        try:
            message: BatchReady | BatchFailed = worker.channel.recv()
        except (EOFError, OSError):
            raise _ended(worker) from None
        return message


def _shared_bytes(num_bytes: int, start_method: str) -> Tensor:
    """Bytes that processes started by this one share with it."""
    if start_method == "fork":
        # Not in /dev/shm, which containers keep small, and gone with the last process that has it.
        return torch.frombuffer(mmap(-1, num_bytes), dtype=torch.uint8)
    memory: Any = torch.empty(num_bytes, dtype=torch.uint8)
    shared: Tensor = memory.share_memory_()
    return shared


def _pin(memory: Tensor, pinned: list[Tensor]) -> None:
    """Let the GPU that is in use, if any, read the bytes by itself; where that is refused, uploads are slower."""
    if not _cuda.is_initialized():
        return
    if int(_cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        pinned.append(memory)
        return
    with suppress(RuntimeError):
        # CUDA remembers the refusal, and would report it for the next kernel.
        torch.zeros(1, device="cuda")


def _end(workers: list[_Worker], pinned: list[Tensor]) -> None:
    for worker in workers:
        worker.process.kill()
        worker.channel.close()
    for worker in workers:
        worker.process.join(_END_S)
    for memory in pinned:
        with suppress(RuntimeError):
            _cuda.synchronize()
        _cuda.cudart().cudaHostUnregister(memory.data_ptr())


def _ended(worker: _Worker) -> Mim3dError:
    worker.process.join(_END_S)
    code = worker.process.exitcode
    how = f"by {signal.Signals(-code).name}" if code is not None and code < 0 else f"with exit code {code}"
    return Mim3dError(
        f"A reading process (id {worker.process.pid}) was ended {how}; if memory ran out, use fewer --num_workers or a "
        "smaller --batch_size."
    )
