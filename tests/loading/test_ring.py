"""Batches come in order through shared memory, errors at once, and no process is left behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch

from mim3d.core.errors import DamagedError, DataError, Mim3dError
from mim3d.loading import ring as ring_module
from mim3d.loading.ring import BatchFailed, BatchReady, ReadBatch, Ring, SharedArray, SlotAllocator, slot_bytes
from mim3d.loading.stored_images import Packed, StoredImages

ROOT = Path(__file__).parents[2]
SLOT_BYTES = 1024


def numbered(number, allocate):
    """A batch that holds its number."""
    array = allocate((2, 3), np.dtype(np.int32))
    array[...] = number
    return ReadBatch({"x": Packed(array)}, {})


class Uneven:
    """Every ``period``-th batch takes much longer."""

    def __init__(self, period):
        self.period = period

    def __call__(self, number, allocate):
        time.sleep(0.05 * (number % self.period == 0))
        return numbered(number, allocate)


class Failing:
    def __init__(self, error, number=3):
        self.error = error
        self.number = number

    def __call__(self, number, allocate):
        if number == self.number:
            raise self.error
        return numbered(number, allocate)


class Stuck:
    """Never finishes batch 1."""

    def __call__(self, number, allocate):
        time.sleep(60 * (number == 1))
        return numbered(number, allocate)


def value(filled):
    array = filled.arrays["x"].array
    assert (array == array.flat[0]).all()
    return int(array.flat[0])


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie waits for the init process of the container, if there is one.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_batches_come_in_order_whoever_is_quickest(num_workers):
    with Ring(Uneven(num_workers), num_workers, SLOT_BYTES) as ring:
        assert [value(next(ring)) for _ in range(11)] == list(range(11))


def test_a_batch_stays_as_it_is_until_the_next_one_is_asked_for():
    with Ring(numbered, 1, SLOT_BYTES) as ring:
        for number in range(5):
            filled = next(ring)
            time.sleep(0.03)
            assert value(filled) == number


def test_processes_that_are_not_forked_give_the_same():
    with Ring(numbered, 1, SLOT_BYTES, start_method="spawn") as ring:
        assert [value(next(ring)) for _ in range(4)] == list(range(4))


def test_a_killed_process_is_an_error_at_once():
    with Ring(Stuck(), 2, SLOT_BYTES) as ring:
        next(ring)
        _, stuck = ring._workers
        threading.Timer(0.2, stuck.process.kill).start()
        start = time.monotonic()
        with pytest.raises(Mim3dError, match=rf"id {stuck.process.pid}\) was ended by SIGKILL; .*--num_workers"):
            next(ring)
        assert time.monotonic() - start < 2


def test_a_process_that_hangs_is_an_error_that_says_what_it_is_at():
    with Ring(Stuck(), 2, SLOT_BYTES, timeout_s=0.6, describe="scans of batch {}".format) as ring:
        next(ring)
        start = time.monotonic()
        with pytest.raises(Mim3dError, match=r"\) has been at scans of batch 1 for 0.01 min; .*--read_timeout"):
            next(ring)
        assert 0.5 < time.monotonic() - start < 5


def test_a_scheduler_s_signals_to_every_process_of_a_job_are_left_to_the_trainer():
    with Ring(numbered, 2, SLOT_BYTES) as ring:
        assert value(next(ring)) == 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            for worker in ring._workers:
                os.kill(worker.process.pid, number)
        assert [value(next(ring)) for _ in range(6)] == list(range(1, 7))


def test_a_process_that_was_killed_before_its_turn_is_an_error_all_the_same():
    with Ring(numbered, 3, SLOT_BYTES) as ring:
        next(ring)
        killed = ring._workers[2].process
        killed.kill()
        killed.join()
        with pytest.raises(Mim3dError, match="SIGKILL"):
            next(ring)


def test_an_error_arrives_as_what_it_is_in_the_turn_of_its_batch():
    sentence = "a/scan.nii.gz: missing or damaged; run it again."
    for error in (DataError(sentence), DamagedError(sentence)):
        with Ring(Failing(error), 2, SLOT_BYTES) as ring:
            assert [value(next(ring)) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(DataError) as raised:
                next(ring)
            assert type(raised.value) is type(error)
            assert str(raised.value) == sentence


class OwnError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OwnError("too wide"), ValueError),
        (MemoryError("too wide"), MemoryError),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "too wide"), RuntimeError),
    ],
)
def test_any_other_error_brings_its_trace(error, kind):
    with Ring(Failing(error, 0), 1, SLOT_BYTES) as ring, pytest.raises(kind) as raised:
        next(ring)
    assert type(raised.value) is kind
    assert "too wide" in str(raised.value)
    assert "in __call__" in str(raised.value)
    assert BatchFailed.of(DataError("x")) == BatchFailed(DataError, "x")


def test_no_process_is_left_when_a_ring_is_closed_dropped_or_failed():
    def pids(ring):
        return [worker.process.pid for worker in ring._workers]

    closed = Ring(Stuck(), 2, SLOT_BYTES)
    left = pids(closed)
    closed.close()
    closed.close()
    dropped = Ring(numbered, 2, SLOT_BYTES)
    left += pids(dropped)
    next(dropped)
    del dropped
    gc.collect()
    with pytest.raises(DataError), Ring(Failing(DataError("x"), 0), 2, SLOT_BYTES) as failed:
        left += pids(failed)
        next(failed)
    assert len(left) == 6
    assert not any(is_alive(pid) for pid in left)
    assert not {child.pid for child in multiprocessing.active_children()} & set(left)


TRAINER = """
    import os, sys, time
    from mim3d.loading.ring import Ring
    from tests.loading.test_ring import SLOT_BYTES, numbered

    ring = Ring(numbered, 3, SLOT_BYTES)
    next(ring)
    print(*(worker.process.pid for worker in ring._workers), flush=True)
    {then}
"""


def start_trainer(then):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER.format(then=then))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_killed_trainer_leaves_no_process():
    trainer = start_trainer("time.sleep(60)")
    pids = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(pids) == 3
    assert all(is_alive(pid) for pid in pids)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))


def test_a_program_that_ends_without_closing_is_not_kept_waiting():
    trainer = start_trainer("print(time.monotonic())")
    out, err = trainer.communicate(timeout=60)
    assert trainer.returncode == 0
    assert "Traceback" not in err
    assert time.monotonic() - float(out.splitlines()[1]) < 5


def test_what_is_sent_is_small_and_holds_no_voxel():
    memory = np.zeros(40 * 2**20, dtype=np.uint8)
    slot = SlotAllocator(memory)
    images = {f"image{i}": Packed(slot((2, 4, 1, 96, 96, 96), np.dtype(np.uint8)), np.ones((2, 1, 4))) for i in "abc"}
    placed = {key: Packed(p.array, slot((2, 1, 4), np.dtype(np.float32))) for key, p in images.items()}
    masks = {f"hidden/{i}": Packed(slot((2, 16, 1728), np.dtype(bool))) for i in "abc"}
    message = BatchReady.of(ReadBatch({**placed, **masks}, {}), memory)
    assert len(ForkingPickler.dumps(message)) < 2000
    for key, packed in message.batch(memory).arrays.items():
        assert np.shares_memory(packed.array, {**placed, **masks}[key].array)


def test_arrays_of_a_slot_lie_side_by_side_and_must_fit():
    memory = np.zeros(1024, dtype=np.uint8)
    slot = SlotAllocator(memory[256:512])
    places = [
        SharedArray.of(slot((3, 5), np.dtype(np.uint8)), memory),
        SharedArray.of(slot((16,), np.dtype("<f4")), memory),
    ]
    assert [(place.offset, place.shape) for place in places] == [(256, (3, 5)), (320, (16,))]
    places[1].view(memory)[...] = 1.5
    assert (memory[320:384].view(np.float32) == 1.5).all()
    with pytest.raises(DataError, match=r"more than the 256 bytes .*same shape"):
        slot((1000,), np.dtype(np.uint8))


def test_a_batch_larger_than_the_slot_is_an_error_with_a_remedy():
    with Ring(numbered, 1, 16) as ring, pytest.raises(DataError, match="--num_workers 0"):
        next(ring)


def test_a_slot_holds_the_widest_batch():
    sample = [torch.zeros(2, 3, 5, 5, 5), torch.zeros(2, 7, dtype=torch.bool), torch.zeros(1)]
    slot = SlotAllocator(np.zeros(slot_bytes(sample, 3), dtype=np.uint8))
    slot((3, 2, 3, 5, 5, 5), np.dtype(np.float32))
    slot((3, 3, 4), np.dtype(np.float32))
    slot((3, 2, 7), np.dtype(bool))
    slot((3, 1), np.dtype(np.float32))


class FakeCuda:
    """A GPU whose copies are done when it is told so, or waited for."""

    def __init__(self, refuses=False):
        self.refuses = refuses
        self.recorded = []
        self.waited = 0

    def is_initialized(self):
        return True

    def cudart(self):
        return self

    def synchronize(self):
        pass

    def cudaHostRegister(self, address, size, flags):
        return int(self.refuses)

    def cudaHostUnregister(self, address):
        return 0

    def Event(self):
        cuda = self

        class Event:
            done = False

            def record(self):
                cuda.recorded.append(self)

            def query(self):
                return self.done

            def synchronize(self):
                cuda.waited += 1
                self.done = True

        return Event()


def test_beside_a_gpu_a_slot_is_given_back_only_when_it_was_copied(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(ring_module, "_cuda", cuda)
    with Ring(numbered, 2, SLOT_BYTES) as ring:
        held = [next(ring) for _ in range(4)]
        time.sleep(0.1)
        assert [value(filled) for filled in held] == [0, 1, 2, 3]
        assert cuda.waited == 0
        # No slot is left: the oldest is waited for, and it alone.
        assert value(next(ring)) == 4
        assert cuda.waited == 1
        assert [value(filled) for filled in held[1:]] == [1, 2, 3]
        for event in cuda.recorded:
            event.done = True
        assert value(next(ring)) == 5
        assert cuda.waited == 1
        assert [used.number for used in ring._in_use] == [4, 5]


def test_where_pinning_is_refused_batches_come_all_the_same(monkeypatch):
    monkeypatch.setattr(ring_module, "_cuda", FakeCuda(refuses=True))
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("refused before")))
    with Ring(numbered, 1, SLOT_BYTES) as ring:
        assert [value(next(ring)) for _ in range(5)] == list(range(5))


def images_of(number, allocate):
    """Many bytes, so that a copy takes a while."""
    numbers = allocate((1, 1, 1, 256, 256, 64), np.dtype(np.uint16))
    numbers[...] = 60000 + number
    rescaling = allocate((1, 1, 4), np.dtype(np.float32))
    rescaling[...] = 1, 0, -np.inf, np.inf
    return ReadBatch({"x": Packed(numbers, rescaling)}, {})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_given_every_batch_whole():
    torch.zeros(1, device="cuda")
    with Ring(images_of, 2, 9 * 2**20) as ring:
        assert ring._pinned
        means = []
        for filled in (next(ring) for _ in range(40)):
            images = filled.arrays["x"].unpacked()
            assert isinstance(images, StoredImages)
            assert images.numbers.is_pinned()
            means.append(images.to("cuda").mean(dtype=torch.float64))
        assert [round(float(mean)) for mean in means] == list(range(60000, 60040))
