"""Batches for the training loop, read in this process or in several."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mim3d.caching.scan import CachedScan
from mim3d.core.errors import DamagedError, DataError
from mim3d.core.warned import LeftOutWarning
from mim3d.loading.ring import ReadBatch, Ring, slot_bytes
from mim3d.loading.samples import Augment, SampleDataset, Sampler
from mim3d.loading.stored_images import Allocate, pack
from mim3d.scans.intensity import Intensity


@dataclass(frozen=True)
class _BatchReader:
    """Reads micro-batch ``number`` of one process: micro-batches are assigned to the ranks in turn.

    The one after it, ``num_readers`` later, is announced to the disk first: while one is unpacked, the next is fetched.
    """

    dataset: SampleDataset
    first_sample: int
    batch_size: int
    rank: int
    world_size: int
    num_readers: int

    def __call__(self, number: int, allocate: Allocate) -> ReadBatch:
        for index in self._indices(number + self.num_readers):
            self.dataset.announce(index)
        samples = [self.dataset.sample(index) for index in self._indices(number)]
        damaged, self.dataset.damaged = self.dataset.damaged, {}
        return ReadBatch(pack(samples, allocate), damaged)

    def cases(self, number: int) -> str:
        """The scans that a micro-batch is read from, in words."""
        return "scan " + ", ".join(dict.fromkeys(self.dataset.case_id(index) for index in self._indices(number)))

    def _indices(self, number: int) -> range:
        start = self.first_sample + (number * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)


class Loader:
    """Endless batches for the training loop.

    Reading processes share memory with the trainer: two batches for each of them, reserved as if images were float32.
    On a CPU only what is written to is taken, a quarter of that for images of 8 bits; beside a GPU all of it is pinned.

    Args:
        scans: Scans to draw from.
        sampler: Draws the crops and masks of a sample.
        intensity: How stored intensities become network input.
        batch_size: Samples per micro-batch and process.
        seed: Seed of the order of scans and of every draw.
        num_workers: Number of reading processes; 0 reads in the training process.
        augment: Changes one finished sample, given an integer seed.
        strict: Whether to raise where a scan is damaged, instead of leaving it out with a warning.
        timeout_s: Seconds to wait for a batch of a reading process; None waits for ever.
        on_damage: Is told of each scan that proves damaged in this process, once: its case, and what is wrong.

    Raises:
        DataError: There is no scan.
    """

    def __init__(
        self,
        scans: Sequence[CachedScan],
        sampler: Sampler,
        intensity: Intensity,
        *,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        augment: Augment | None = None,
        strict: bool = False,
        timeout_s: float | None = None,
        on_damage: Callable[[str, str], None] | None = None,
    ) -> None:
        if not scans:
            raise DataError("There is no scan to train on; check the data folder and the split.")
        self.dataset = SampleDataset(scans, sampler, intensity, seed, augment, strict=strict)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self._on_damage = on_damage
        self._named: set[str] = set()

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the scans."""
        return len(self.dataset.scans)

    @property
    def voxels_per_sample(self) -> int | None:
        """Values read of the first sample's scan, labels among them; None where that scan is damaged.

        The other samples are alike, unless their scans have fewer reduced levels to read from.
        """
        with suppress(DamagedError):
            return self.dataset.num_values(0)
        return None

    @property
    def slow_levels(self) -> str | None:
        """Why coarse crops of some scans are averaged from full resolution, and the remedy; None where none is."""
        scans, bounds = self.dataset.scans, self.dataset.intensity.bounds
        with suppress(DamagedError):
            if self.dataset.num_coarse_crops(0):
                other = sum(not scan.clips_like(bounds) for scan in scans)
                odd = [any(size % 2 ** (scan.num_levels - 1) for size in scan.shape) for scan in scans]
                edges = sum(scan.level_windows is None for scan in itertools.compress(scans, odd))
                many = f"of {len(scans)} scans in the cache"
                if other:
                    window = "" if np.isinf(bounds[0]) else f" with --window {bounds[0]:g} {bounds[1]:g}"
                    return (
                        f"reduced levels of {other} {many} were not made with the network's intensities clipped to "
                        f"{list(bounds)}: coarse crops are averaged from full resolution, which takes longer; a cache "
                        f"built in a new folder{window} has them."
                    )
                if edges:
                    return (
                        f"reduced levels of {edges} {many} were made by an earlier version, without the padding at odd "
                        "edges: there coarse crops are averaged from full resolution, which takes a little longer; a "
                        "cache built in a new folder has it."
                    )
        return None

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
        """Endless micro-batches of this process, beginning at sample ``first_sample`` of the whole run.

        Yields:
            By key, what ``.to(device)`` makes a tensor on the device: images ``(B, N, C, X, Y, Z)`` float32 (see
            :class:`~mim3d.loading.stored_images.StoredImages`), labels ``(B, N, X, Y, Z)`` int64, arrays ``(B, ...)``.
            With reading processes they lie in memory that is written to again once the next batch is asked for.

        Raises:
            DamagedError: All scans are damaged, or one is and the loader is ``strict``.
            Mim3dError: A reading process ended or hangs. Any error that it met is raised here.
        """
        num_readers = max(1, self.num_workers)
        reader = _BatchReader(self.dataset, first_sample, self.batch_size, rank, world_size, num_readers)
        if self.num_workers == 0:
            for number in itertools.count():
                yield self._opened(reader(number, np.empty))
        num_bytes = slot_bytes(self.dataset[0].values(), self.batch_size)
        with Ring(reader, self.num_workers, num_bytes, timeout_s=self.timeout_s, describe=reader.cases) as ring:
            for batch in ring:
                yield self._opened(batch)

    def _opened(self, batch: ReadBatch) -> dict[str, Any]:
        for case, sentence in batch.damaged.items():
            if case not in self._named:
                self._named.add(case)
                warnings.warn(
                    f"{case} is damaged, other scans stand in for it: {sentence}", category=LeftOutWarning, stacklevel=3
                )
                if self._on_damage is not None:
                    self._on_damage(case, f"damaged, other scans stood in for it: {sentence}")
        return {key: packed.unpacked() for key, packed in batch.arrays.items()}
