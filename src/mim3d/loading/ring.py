"""Batches from reading processes through one shared buffer: no voxel is pickled, sent or copied on the way.

Each process owns a few slots of the buffer. Process ``w`` of ``W`` reads batches ``w``, ``w + W``, ...: the order does
not depend on their speed. The trainer requests a batch in a slot, receives a message of a few bytes that says where its
arrays lie, and requests a later batch in the same slot once nothing reads it any more.

The buffer has no name that could outlive a killed process, and nothing is locked.
"""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any, Self

import torch
from torch import Tensor

from mim3d.core.errors import Mim3dError
from mim3d.loading.reading_processes import (
    BatchFailed,
    BatchReader,
    BatchReady,
    ReadBatch,
    aligned,
    read_batches,
    signals_blocked,
)
from mim3d.loading.stored_images import MAX_VOXEL_BYTES
from mim3d.scans.intensity import NO_RESCALING

#: Batches of each process that are being read or on their way.
SLOTS_PER_WORKER = 2

#: Seconds to wait for the end of a killed process.
_END_S = 5.0

#: Number of waits that the time limit of a batch is divided into.
_NUM_WAITS = 20

# torch has no types for it.
_cuda: Any = torch.cuda


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
            arguments = (theirs, os.getpid(), read, memory, slot_bytes)
            process = context.Process(target=read_batches, args=arguments, daemon=True)
            with signals_blocked():
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
            raise self._hangs(worker)
        for other in self._workers:
            if other.process.sentinel in ready:
                raise _ended(other)
        try:
            message: BatchReady | BatchFailed = worker.channel.recv()
        except (EOFError, OSError):
            raise _ended(worker) from None
        return message

    def _hangs(self, worker: _Worker) -> Mim3dError:
        return Mim3dError(
            f"A reading process (id {worker.process.pid}) has been at {self._describe(self._number)} for "
            f"{(self._timeout_s or 0) / 60:.3g} min; look whether the disk answers, or raise --read_timeout."
        )


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
