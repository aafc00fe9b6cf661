"""Batches on their way to the trainer: through mim3d's shared ring and through torch's DataLoader, in turns.

Both read, unpack and pack the same samples with the same code in the same number of processes; every form of the
DataLoader is checked to give the ring's batches bit for bit before anything is timed.
"""

import itertools
import multiprocessing
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import mim3d
from mim3d.backbones import create_recipe
from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.datasets.cases import read_cases
from mim3d.kernels.machine import keep_freed_memory
from mim3d.loading.loader import Loader
from mim3d.loading.ring import SharedArray, SlotAllocator, aligned, slot_bytes
from mim3d.loading.samples import Augment, Crop, Sample
from mim3d.loading.samples import Sampler as CropSource
from mim3d.loading.stored_images import Allocate, Packed, pack
from mim3d.methods.mim.hierarchy import full_levels
from mim3d.methods.mim.method import MiM
from mim3d.planning.plan import plan_intensity
from mim3d.tasks.augmentation import Augmentation
from mim3d.tasks.segmentation.crops import CropSampler
from mim3d.tasks.transforms import Augmenter
from yardstick.loader_rates import close
from yardstick.machine import Row
from yardstick.marks import Ratio

# torch leaves it without types.
_multiprocessing: Any = torch.multiprocessing

RING = "ring"

#: The ring must hand over so many times as many samples as the DataLoader, or it is not worth its code.
MARK = 1.3

#: Arrays of fewer bytes travel in the message itself, which costs less than shared memory of their own.
SMALL_BYTES = 2**16

Batches = Iterator[Mapping[str, Any]]


@dataclass(frozen=True)
class Material:
    """What is read.

    Attributes:
        title: Name for people.
        scans: The scans, from one cache.
        sampler: Draws the crops of a sample.
        num_samples: Number of samples that are timed in one round.
        augment: Varies a sample after it was read, as fine-tuning does.
    """

    title: str
    scans: Sequence[CachedScan]
    sampler: CropSource
    num_samples: int
    augment: Augment | None = None


@dataclass(frozen=True)
class OneCrop:
    """A sampler of one cube anywhere in the scan, without masks."""

    size: Triple

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw one sample."""
        x, y, z = (int(rng.integers(voxels - edge + 1)) for voxels, edge in zip(scan.shape, self.size, strict=True))
        return Sample(images={"image": (Crop((x, y, z), self.size, self.size),)})


def materials(large: Path, scratch: Path, quick: bool) -> list[Material]:
    """Pre-training on large and small scans, single crops, and fine-tuning on labels.

    Args:
        large: Folder of large CTs.
        scratch: Folder for the caches and for a labelled set of small scans.
        quick: Time fewer samples.
    """
    labelled = mim3d.phantom(out=str(scratch / "small"), num_cases=6, size=(96, 96, 96))
    eight, lossless = Preprocessing(intensities="8-bit"), Preprocessing(intensities="lossless")
    wide = list(build_cache(read_cases(large), scratch / "large_8_bit", eight))
    small = list(build_cache(read_cases(labelled), scratch / "small_8_bit", eight))
    exact = list(build_cache(read_cases(labelled), scratch / "small_lossless", lossless))
    mim = MiM(levels=full_levels((16, 16, 16))).sampler(create_recipe("hybrid_base"))
    nano = MiM(levels=full_levels((8, 8, 8))).sampler(create_recipe("hybrid_nano"))
    crop: Triple = (64, 64, 64)
    varied = Augmenter(Augmentation().planned({}, (1.0, 1.0, 1.0)), crop, (1.0, 1.0, 1.0))
    return [
        Material("MiM, 192^3 as 96^3 and 4 of 96^3, 8 bits", wide, mim, 12 if quick else 32),
        Material("one crop of 96^3, 8 bits", wide, OneCrop((96, 96, 96)), 32 if quick else 96),
        Material("MiM, 64^3 as 32^3 and 4 of 32^3, 8 bits", small, nano, 48 if quick else 128),
        Material("fine-tuning, 64^3 varied, with labels", exact, CropSampler(crop, 0.5), 12 if quick else 32, varied),
    ]


class TorchBatches(Dataset[Any], ABC):
    """Micro-batch ``number`` of a loader, read and packed as the ring's processes do it.

    Args:
        loader: What is compared with.
        prefetch: Batches that each process of the DataLoader may be ahead.
    """

    #: How torch names shared memory in these processes; None leaves it as torch has it.
    strategy: str | None = None

    def __init__(self, loader: Loader, prefetch: int) -> None:
        self._loader = loader
        self._prefetch = prefetch

    def read(self, number: int, allocate: Allocate) -> dict[str, Packed]:
        """Read the batch; the process's next one is announced to the disk first."""
        dataset = self._loader.dataset
        for index in self._indices(number + self._loader.num_workers):
            dataset.announce(index)
        return pack([dataset.sample(index) for index in self._indices(number)], allocate)

    @abstractmethod
    def __getitem__(self, number: int) -> Any:
        """The message of a reading process that a batch is there."""

    @abstractmethod
    def opened(self, message: Any) -> Mapping[str, Any]:
        """The batch of a message as the trainer sees it."""

    def batches(self) -> Batches:
        """Endless batches of a DataLoader that was just started; its processes end with the iterator."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=Numbers(),
            num_workers=self._loader.num_workers,
            prefetch_factor=self._prefetch,
            persistent_workers=True,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=self._prepare,
        )
        for message in loader:
            yield self.opened(message)

    def _indices(self, number: int) -> range:
        return range(number * self._loader.batch_size, (number + 1) * self._loader.batch_size)

    def _prepare(self, _: int) -> None:
        torch.set_num_threads(1)
        keep_freed_memory()
        if self.strategy is not None:
            _multiprocessing.set_sharing_strategy(self.strategy)


class Numbers(Sampler[int]):
    """0, 1, 2 and so on, without an end."""

    def __iter__(self) -> Iterator[int]:
        return itertools.count()


class Tensors(TorchBatches):
    """Each image is a tensor of stored numbers, which torch moves to shared memory; the rest travels in the message."""

    def __getitem__(self, number: int) -> Any:
        message = {}
        for key, packed in self.read(number, np.empty).items():
            array, type_name = packed.array, packed.array.dtype.name
            large = array.nbytes >= SMALL_BYTES
            message[key] = torch.from_numpy(array.view(_signed(array))) if large else array, packed.rescaling, type_name
        return message

    def opened(self, message: Any) -> Mapping[str, Any]:
        """See ``TorchBatches``."""
        return {
            key: Packed(np.asarray(values).view(type_name), rescaling).unpacked()
            for key, (values, rescaling, type_name) in message.items()
        }


class OneBuffer(TorchBatches):
    """All arrays of a batch are written to one piece of shared memory of exactly their size, without another copy."""

    strategy = "file_system"

    def __init__(self, loader: Loader, prefetch: int) -> None:
        super().__init__(loader, prefetch)
        arrays = [array for packed in self.read(0, np.empty).values() for array in (packed.array, packed.rescaling)]
        self._num_bytes = sum(aligned(array.nbytes) for array in arrays if array is not None)

    def __getitem__(self, number: int) -> Any:
        memory = _new_shared(self._num_bytes)
        return _places(self.read(number, SlotAllocator(memory.numpy())), memory.numpy()), memory

    def opened(self, message: Any) -> Mapping[str, Any]:
        """See ``TorchBatches``."""
        places, memory = message
        return _at(places, memory.numpy())


class KeptBuffer(TorchBatches):
    """The DataLoader's processes write to shared memory that was there before them, as the ring's do.

    A process writes again to a slot when the batch after the one in it was asked for, which is safe on a CPU alone.
    """

    def __init__(self, loader: Loader, prefetch: int) -> None:
        super().__init__(loader, prefetch)
        self._slot_bytes = slot_bytes(loader.dataset[0].values(), loader.batch_size)
        num_bytes = loader.num_workers * (prefetch + 1) * self._slot_bytes
        self._memory = np.frombuffer(mmap(-1, num_bytes), dtype=np.uint8)

    def __getitem__(self, number: int) -> Any:
        turn, worker = divmod(number, self._loader.num_workers)
        slot = worker * (self._prefetch + 1) + turn % (self._prefetch + 1)
        allocate = SlotAllocator(self._memory[slot * self._slot_bytes : (slot + 1) * self._slot_bytes])
        return _places(self.read(number, allocate), self._memory)

    def opened(self, message: Any) -> Mapping[str, Any]:
        """See ``TorchBatches``."""
        return _at(message, self._memory)


#: Name -> form of the DataLoader. The last one is half the ring.
FORMS: dict[str, type[TorchBatches]] = {
    "DataLoader, tensors": Tensors,
    "DataLoader, one buffer": OneBuffer,
    "DataLoader, kept buffer": KeptBuffer,
}


def _signed(array: np.ndarray) -> np.dtype[Any]:
    """The type as which torch takes the bits of an array."""
    return np.dtype(f"i{array.itemsize}") if array.dtype.kind == "u" and array.itemsize > 1 else array.dtype


def _new_shared(num_bytes: int) -> Tensor:
    """Bytes in shared memory from the beginning, as torch's own collation makes them."""
    storage: Any = torch.UntypedStorage
    return torch.empty(0, dtype=torch.uint8).set_(storage._new_shared(num_bytes))


def _places(arrays: Mapping[str, Packed], memory: np.ndarray) -> dict[str, tuple[SharedArray, SharedArray | None]]:
    return {
        key: (
            SharedArray.of(packed.array, memory),
            None if packed.rescaling is None else SharedArray.of(packed.rescaling, memory),
        )
        for key, packed in arrays.items()
    }


def _at(places: Mapping[str, tuple[SharedArray, SharedArray | None]], memory: np.ndarray) -> Mapping[str, Any]:
    return {
        key: Packed(array.view(memory), None if rescaling is None else rescaling.view(memory)).unpacked()
        for key, (array, rescaling) in places.items()
    }


@dataclass(frozen=True)
class Taken:
    """What one round of one loader took.

    Attributes:
        wall_s: Wall seconds per sample.
        trainer_s: Processor seconds per sample in this process.
        workers_s: Processor seconds per sample in the reading processes.
    """

    wall_s: float
    trainer_s: float
    workers_s: float

    @property
    def cpu_s(self) -> float:
        """Processor seconds per sample of all processes."""
        return self.trainer_s + self.workers_s


def measure_hand_over(
    material: Material,
    device: torch.device,
    *,
    batch_size: int,
    num_workers: int,
    prefetch: int,
    num_rounds: int,
) -> list[Row]:
    """Print and return the rates of the ring and of every form of the DataLoader, in turns.

    Every round starts each loader anew, in the reverse order of the round before. The batches that are made while it
    starts are taken untimed. ``received`` takes a batch and does nothing with it, ``float32`` makes of it what the
    trainer does. Ratios are medians over the rounds of what followed one another.
    """
    loader = Loader(
        material.scans,
        material.sampler,
        plan_intensity(material.scans),
        batch_size=batch_size,
        seed=0,
        num_workers=num_workers,
        augment=material.augment,
    )
    forms = {name: form(loader, prefetch) for name, form in FORMS.items() if not _unsafe(name, device)}
    starts: dict[str, Callable[[], Batches]] = {RING: lambda: loader.batches(0)}
    starts |= {name: form.batches for name, form in forms.items()}
    _check_equal({name: start() for name, start in starts.items()})
    num_batches = max(8, material.num_samples // batch_size)
    rows = []
    for consumer, use in (("received", _leave), ("float32", _converting(device))):
        taken: dict[str, list[Taken]] = {name: [] for name in starts}
        for number in range(num_rounds):
            for name in list(starts)[:: -1 if number % 2 else 1]:
                round_ = _round(starts[name](), use, num_batches, num_workers * (prefetch + 1) + 2, batch_size)
                taken[name].append(round_)
        row: Row = {"part": "hand_over", "data": material.title, "batch_size": batch_size, "num_workers": num_workers}
        row |= {"consumer": consumer, "prefetch": prefetch, "rounds": num_rounds, "batches_a_round": num_batches}
        rows.append(row | {"loaders": {name: _summary(rounds, taken[RING]) for name, rounds in taken.items()}})
        _print(rows[-1])
    return rows


def _unsafe(name: str, device: torch.device) -> bool:
    return device.type == "cuda" and FORMS[name] is KeptBuffer


def _check_equal(batches: Mapping[str, Batches]) -> None:
    """Refuse to compare loaders whose first batches differ."""
    for _ in range(3):
        ring = {key: value.to("cpu").clone() for key, value in next(batches[RING]).items()}
        for name in batches:
            found = ring if name == RING else next(batches[name])
            if found.keys() != ring.keys() or not all(torch.equal(found[key].to("cpu"), ring[key]) for key in ring):
                raise AssertionError(f"{name} gives other batches than the {RING}")
    for running in batches.values():
        close(running)


def _leave(batch: Mapping[str, Any]) -> None:
    pass


def _converting(device: torch.device) -> Callable[[Mapping[str, Any]], None]:
    def use(batch: Mapping[str, Any]) -> None:
        # Held until the batch is whole, as the trainer holds them.
        moved = {name: values.to(device) for name, values in batch.items()}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        del moved

    return use


def _round(
    batches: Batches, use: Callable[[Mapping[str, Any]], None], num_batches: int, num_untimed: int, batch_size: int
) -> Taken:
    for _ in range(num_untimed):
        use(next(batches))
    clocks = _clocks_s()
    for _ in range(num_batches):
        use(next(batches))
    passed = [(after - before) / (num_batches * batch_size) for before, after in zip(clocks, _clocks_s(), strict=True)]
    close(batches)
    return Taken(*passed)


def _clocks_s() -> tuple[float, float, float]:
    """Wall time, processor time of this process, and of the processes that it started and that still run."""
    others = sum(_processor_s(child.pid) for child in multiprocessing.active_children() if child.pid is not None)
    return time.perf_counter(), _processor_s(os.getpid()), others


def _processor_s(process: int) -> float:
    # The number of another process's processor clock, as clock_getcpuclockid(3) makes it on Linux.
    return time.clock_gettime((~process << 3) | 2)


def _summary(rounds: Sequence[Taken], ring: Sequence[Taken]) -> Row:
    return {
        "samples_per_s": round(1 / median(one.wall_s for one in rounds), 2),
        "samples_per_cpu_s": round(1 / median(one.cpu_s for one in rounds), 2),
        "trainer_cpu_ms": round(1e3 * median(one.trainer_s for one in rounds), 3),
        "workers_cpu_ms": round(1e3 * median(one.workers_s for one in rounds), 3),
        "ring_times_as_fast": round(median(a.wall_s / b.wall_s for a, b in zip(rounds, ring, strict=True)), 3),
        "ring_times_as_fast_per_cpu_s": round(median(a.cpu_s / b.cpu_s for a, b in zip(rounds, ring, strict=True)), 3),
    }


def _print(row: Row) -> None:
    where = f"{row['data']}; batches of {row['batch_size']}, {row['num_workers']} workers, {row['consumer']}"
    print(f"\n  {where}: per second and CPU second; CPU of trainer and workers; ring is faster by (wall, CPU)")
    for name, found in row["loaders"].items():
        print(f"    {name:24} {found['samples_per_s']:8.1f}/s {found['samples_per_cpu_s']:8.1f}/CPU s", end="  ")
        print(f"{found['trainer_cpu_ms']:7.2f} + {found['workers_cpu_ms']:6.2f} ms", end="  ")
        print(f"{found['ring_times_as_fast']:6.2f}x {found['ring_times_as_fast_per_cpu_s']:6.2f}x", flush=True)


def judge_hand_over(rows: Sequence[Row]) -> list[Ratio]:
    """How many times as many samples the ring gives as each form of the DataLoader: geometric means over settings."""
    rows = [row for row in rows if row["part"] == "hand_over"]
    ratios = []
    for name, form in FORMS.items():
        for key, unit in (("ring_times_as_fast", "second"), ("ring_times_as_fast_per_cpu_s", "CPU second")):
            found = [row["loaders"][name][key] for row in rows if name in row["loaders"]]
            if found:
                title = f"samples per {unit}, geometric mean of {len(found)}: ring / {name}"
                mark = None if form is KeptBuffer else MARK
                ratios.append(Ratio(title, geometric_mean(found), at_least=mark))
    return ratios
