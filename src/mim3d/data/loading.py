"""Mask first, read second: samples are drawn from a generator, then only the voxels they name are read.

The order of samples and everything drawn for one are pure functions of (seed, sample index): the same under any number
of workers and processes, and resumable in the middle of an epoch.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mim3d.data.cache import CachedScan
from mim3d.data.pyramid import reduction_of
from mim3d.data.transforms import Intensity, flip, resize_image, resize_labels
from mim3d.errors import DataError
from mim3d.types import Triple

#: Seconds that a reading process goes on after it was told to end.
WORKER_GRACE_S = 10.0

Augment = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


@dataclass(frozen=True)
class Read:
    """One crop of a scan.

    Attributes:
        origin: first voxel; may lie outside the scan, where the padding value stands.
        footprint: voxels of the scan it covers.
        size: voxels it is delivered as (resized where it differs from ``footprint``).
    """

    origin: Triple
    footprint: Triple
    size: Triple


@dataclass(frozen=True)
class Sample:
    """Everything about one training sample, drawn before a voxel is read.

    Attributes:
        images: batch key -> crops, stacked to ``(N, C, X, Y, Z)``.
        labels: batch key -> label crops, stacked to ``(N, X, Y, Z)``.
        arrays: masks and places, handed to the objective as they are.
        flips: axes along which every crop is flipped after it was read.
        gain: factor on the mapped intensities of the whole sample.
        bias: offset on the mapped intensities of the whole sample.
        pyramid: images whose reduction is stored in the scan's pyramid, on its voxels, are read there; False reads
            all of them in full resolution.
    """

    images: Mapping[str, tuple[Read, ...]]
    labels: Mapping[str, tuple[Read, ...]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    flips: tuple[bool, bool, bool] = (False, False, False)
    gain: float = 1.0
    bias: float = 0.0
    pyramid: bool = True

    def shapes(self, num_channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor that it is read as, by batch key, before a voxel is read.

        Args:
            num_channels: of the scans.
        """
        images = {
            key: ((len(reads), num_channels, *reads[0].size), torch.float32) for key, reads in self.images.items()
        }
        labels = {key: ((len(reads), *reads[0].size), torch.int64) for key, reads in self.labels.items()}
        arrays = {
            key: (np.atleast_1d(array).shape, torch.from_numpy(np.empty(0, array.dtype)).dtype)
            for key, array in self.arrays.items()
        }
        return {**images, **labels, **arrays}


class Sampler(Protocol):
    """Draws what one sample needs of a scan."""

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw one sample of ``scan`` from ``rng``, from the scan's shape, body box and class locations alone."""
        ...


class SampleDataset(Dataset[dict[str, Tensor]]):
    """Sample number ``index`` of an endless sequence over ``scans``, shuffled anew each epoch.

    Args:
        scans: the scans to draw from; one sample of each is one epoch.
        sampler: draws the crops and masks of a sample.
        intensity: mapping of stored intensities to network input.
        seed: together with the index determines everything drawn.
        augment: changes one finished sample, given an integer seed.
    """

    def __init__(
        self,
        scans: Sequence[CachedScan],
        sampler: Sampler,
        intensity: Intensity,
        seed: int,
        augment: Augment | None,
    ) -> None:
        self.scans = scans
        self.sampler = sampler
        self.intensity = intensity
        self.seed = seed
        self.augment = augment
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        scan = self._scan_of(index)
        rng = np.random.default_rng((self.seed, index))
        sample = self.sampler.draw(scan, rng)
        tensors = self._read(scan, sample)
        if self.augment is not None:
            tensors = self.augment(tensors, int(rng.integers(2**31)))
        return tensors

    def _scan_of(self, index: int) -> CachedScan:
        epoch, position = divmod(index, len(self.scans))
        if self._order[0] != epoch:
            # A different stream from the samples' own (three numbers instead of two).
            self._order = (epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.scans)))
        return self.scans[int(self._order[1][position])]

    def _read(self, scan: CachedScan, sample: Sample) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for key, reads in sample.images.items():
            tensors[key] = torch.stack([self._read_image(scan, read, sample) for read in reads])
        for key, reads in sample.labels.items():
            tensors[key] = torch.stack([_read_label(scan, read, sample) for read in reads])
        for key, array in sample.arrays.items():
            tensors[key] = torch.from_numpy(np.ascontiguousarray(array))
        return tensors

    def _read_image(self, scan: CachedScan, read: Read, sample: Sample) -> Tensor:
        level = level_of(read, scan.num_levels) if sample.pyramid else 0
        x, y, z = (first >> level for first in read.origin)
        stored = scan.read((x, y, z), read.size if level else read.footprint, level)
        image = self.intensity.apply_stored(
            stored, scan.stored_intensities, scan.statistics, flips=sample.flips, gain=sample.gain, bias=sample.bias
        )
        return resize_image(torch.from_numpy(image)[None], read.size)[0]


def level_of(read: Read, num_levels: int) -> int:
    """The level of a scan's pyramid that holds a crop as it is delivered; 0 where it must be read and resized.

    A level fits where its voxels are the crop's: a reduction by the same power of two along all axes, from a first
    voxel that is a multiple of it.
    """
    factor = reduction_of(read.footprint, read.size)
    level = factor.bit_length() - 1
    aligned = all(first % factor == 0 for first in read.origin)
    return level if aligned and level < num_levels else 0


def _read_label(scan: CachedScan, read: Read, sample: Sample) -> Tensor:
    labels = torch.from_numpy(scan.read_label(read.origin, read.footprint).astype(np.int64))
    return flip(resize_labels(labels[None], read.size)[0], sample.flips)


class _BatchIndices:
    """Endless batches of sample indices of one process: micro-batches are dealt out to the ranks in turn."""

    def __init__(self, first_sample: int, batch_size: int, rank: int, world_size: int) -> None:
        self.first_sample = first_sample
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        start = self.first_sample + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.world_size * self.batch_size


class Loader:
    """Endless batches for the training loop.

    Args:
        scans: the scans to draw from.
        sampler: draws the crops and masks of a sample.
        intensity: mapping of stored intensities to network input.
        batch_size: samples per micro-batch and process.
        seed: of the order of scans and of every draw.
        num_workers: reading processes; 0 reads in the training process.
        augment: changes one finished sample, given an integer seed.
    Raises:
        DataError: when there is no scan.
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
    ) -> None:
        if not scans:
            raise DataError("There is no scan to train on; check the data folder and the split.")
        self.dataset = SampleDataset(scans, sampler, intensity, seed, augment)
        self.batch_size = batch_size
        self.num_workers = num_workers

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the scans."""
        return len(self.dataset.scans)

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Tensor]]:
        """Endless micro-batches of this process, beginning at sample ``first_sample`` of the whole run.

        Yields:
            Images as ``(B, N, C, X, Y, Z)`` float32, labels as ``(B, N, X, Y, Z)`` int64, arrays as ``(B, ...)``.
        """
        indices = _BatchIndices(first_sample, self.batch_size, rank, world_size)
        loader = DataLoader(
            self.dataset,
            batch_sampler=indices,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_prepare_worker if self.num_workers else None,
        )
        return iter(loader)


def _prepare_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    # A scheduler signals every process of a job. The training process answers with a checkpoint and ends its workers
    # itself, so they outlive the signal; but not for ever, since an exiting interpreter ends them by the same signal.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, WORKER_GRACE_S))
