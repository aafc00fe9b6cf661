"""Mask first, read second: samples are drawn from a generator, then only the voxels they name are read.

The order of samples and everything drawn for one are pure functions of (seed, sample index): the same under any number
of workers and processes, and resumable in the middle of an epoch. Where a scan proves damaged, the next one of the
epoch's order stands in for it.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mim3d.caching.scan import CachedScan
from mim3d.caching.stored_voxels import reduction_of
from mim3d.core.errors import DamagedError, DataError
from mim3d.core.types import Triple
from mim3d.loading.reading_processes import Filled
from mim3d.loading.ring import Ring, slot_bytes
from mim3d.loading.stored_images import Allocate, Crops, pack
from mim3d.nn.resizing import flip, resize_image, resize_labels
from mim3d.scans.intensity import NO_RESCALING, Intensity, apply_rescaling

#: So many damaged scans in a row are no chance: it is the disk, or all of the cache.
MAX_DAMAGED_IN_A_ROW = 100

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
        """Draw one sample of ``scan`` from ``rng``, from the scan's card and class locations, without a voxel."""
        ...


class SampleDataset:
    """Sample number ``index`` of an endless sequence over ``scans``, shuffled anew each epoch.

    Args:
        scans: the scans to draw from; one sample of each is one epoch.
        sampler: draws the crops and masks of a sample.
        intensity: mapping of stored intensities to network input.
        seed: together with the index determines everything drawn.
        augment: changes one finished sample, given an integer seed.
        strict: raise where a scan is damaged, instead of drawing from the next one.
    """

    def __init__(
        self,
        scans: Sequence[CachedScan],
        sampler: Sampler,
        intensity: Intensity,
        seed: int,
        augment: Augment | None,
        *,
        strict: bool = False,
    ) -> None:
        self.scans = scans
        self.sampler = sampler
        self.intensity = intensity
        self.seed = seed
        self.augment = augment
        self.strict = strict
        #: Case -> what is wrong with it, of the scans found damaged since this was last emptied.
        self.damaged: dict[str, str] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._drawn_ahead: dict[int, _Drawn] = {}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample as the objective sees it: images as ``(N, C, X, Y, Z)`` float32."""
        packed = pack([self.sample(index)], np.empty)
        return {key: value.unpacked().to("cpu")[0] for key, value in packed.items()}

    def sample(self, index: int) -> dict[str, Crops | Tensor]:
        """A sample as it travels: images as they are stored, where nothing but their intensities is to be changed.

        Raises:
            DamagedError: the scan is damaged, and ``strict`` or all that could stand in for it as well.
        """
        for attempt in range(min(len(self.scans), MAX_DAMAGED_IN_A_ROW)):
            scan = self._scan_of(index, attempt)
            try:
                return self._read(self._taken(index) or self._draw(index, scan))
            except DamagedError as error:
                # Not remembered for later samples: which processes would know of it depends on their number.
                self.damaged.setdefault(scan.case.id, str(error))
                last = error
                if self.strict:
                    break
        raise last

    def announce(self, index: int) -> None:
        """Draw a sample that is to be read soon, and let the disk begin with it; nothing is waited for."""
        with suppress(DamagedError):
            drawn = self._drawn_ahead[index] = self._draw(index, self._scan_of(index))
            for reads in drawn.sample.images.values():
                for level, boxes in _boxes(drawn.scan, reads, drawn.sample).items():
                    drawn.scan.will_need(list(boxes.values()), level)

    def num_values(self, index: int) -> int:
        """Values that a sample reads of its scan, labels among them; none is read for this.

        Raises:
            DamagedError: the scan is damaged.
        """
        drawn = self._draw(index, self._scan_of(index))
        scan, sample = drawn.scan, drawn.sample
        crops = [
            math.prod(size)
            for reads in sample.images.values()
            for boxes in _boxes(scan, reads, sample).values()
            for _, size in boxes.values()
        ]
        labels = [math.prod(read.footprint) for reads in sample.labels.values() for read in reads]
        return scan.num_channels * sum(crops) + sum(labels)

    def case_id(self, index: int) -> str:
        """The case that a sample is drawn from, unless it proves damaged."""
        return self._scan_of(index).case.id

    def _taken(self, index: int) -> "_Drawn | None":
        """A sample that was announced; once, since its generator is used up."""
        return self._drawn_ahead.pop(index) if index in self._drawn_ahead else None

    def _draw(self, index: int, scan: CachedScan) -> "_Drawn":
        rng = np.random.default_rng((self.seed, index))
        return _Drawn(scan, self.sampler.draw(scan, rng), rng)

    def _scan_of(self, index: int, attempt: int = 0) -> CachedScan:
        epoch, position = divmod(index, len(self.scans))
        if self._order[0] != epoch:
            # A different stream from the samples' own (three numbers instead of two).
            self._order = (epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.scans)))
        return self.scans[int(self._order[1][(position + attempt) % len(self.scans)])]

    def _read(self, drawn: "_Drawn") -> dict[str, Crops | Tensor]:
        scan, sample = drawn.scan, drawn.sample
        images = {key: self._images(scan, reads, sample) for key, reads in sample.images.items()}
        others = {
            key: torch.stack([_read_label(scan, read, sample) for read in reads])
            for key, reads in sample.labels.items()
        }
        for key, array in sample.arrays.items():
            others[key] = torch.from_numpy(np.ascontiguousarray(array))
        if self.augment is None:
            return {**images, **others}
        values = {key: torch.from_numpy(np.stack(image.crops)) for key, image in images.items()}
        return {**self.augment({**values, **others}, int(drawn.rng.integers(2**31)))}

    def _images(self, scan: CachedScan, reads: Sequence[Read], sample: Sample) -> Crops:
        lines = self.intensity.rescaling(scan.stored_intensities, scan.statistics, gain=sample.gain, bias=sample.bias)
        crops = _read_images(scan, reads, sample)
        if self.augment is None and all(crop.shape[1:] == read.size for crop, read in zip(crops, reads, strict=True)):
            return Crops(crops, lines)
        finished = [_finished(crop, lines, read.size) for crop, read in zip(crops, reads, strict=True)]
        return Crops(finished, np.tile(np.array(NO_RESCALING, dtype=np.float32), (len(lines), 1)))


@dataclass(frozen=True)
class _Drawn:
    """A sample of a scan, and the generator as it was left for its augmentation."""

    scan: CachedScan
    sample: Sample
    rng: np.random.Generator


#: Origin and size of what is read of one level of a scan's pyramid.
_Box = tuple[Triple, Triple]


def _read_images(scan: CachedScan, reads: Sequence[Read], sample: Sample) -> list[np.ndarray]:
    """Crops as stored, flipped: ``(C, *read.size)`` where the pyramid has them, else ``(C, *read.footprint)``."""
    crops: dict[int, np.ndarray] = {}
    for level, boxes in _boxes(scan, reads, sample).items():
        crops |= zip(boxes, scan.read_crops(list(boxes.values()), level), strict=True)
    flips = (slice(None), *(slice(None, None, -1 if flip else 1) for flip in sample.flips))
    return [crops[number][flips] for number in range(len(reads))]


def _boxes(scan: CachedScan, reads: Sequence[Read], sample: Sample) -> dict[int, dict[int, _Box]]:
    """Level of the scan's pyramid -> number of each crop that is read there -> its place."""
    boxes: dict[int, dict[int, _Box]] = {}
    for number, read in enumerate(reads):
        level = level_of(read, scan.num_levels) if sample.pyramid else 0
        x, y, z = (first >> level for first in read.origin)
        boxes.setdefault(level, {})[number] = (x, y, z), read.size if level else read.footprint
    return boxes


def _finished(crop: np.ndarray, lines: np.ndarray, size: Triple) -> np.ndarray:
    """Network input ``(C, *size)`` of a crop as stored."""
    image = torch.from_numpy(crop.astype(np.float32))
    apply_rescaling(image, lines)
    resized: np.ndarray = resize_image(image[None], size)[0].numpy()
    return resized


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


@dataclass(frozen=True)
class _BatchReader:
    """Reads micro-batch ``number`` of one process: micro-batches are dealt out to the ranks in turn.

    The one after it, ``num_readers`` later, is announced to the disk first: while one is unpacked, the next is fetched.
    """

    dataset: SampleDataset
    first_sample: int
    batch_size: int
    rank: int
    world_size: int
    num_readers: int

    def __call__(self, number: int, allocate: Allocate) -> Filled:
        for index in self._indices(number + self.num_readers):
            self.dataset.announce(index)
        samples = [self.dataset.sample(index) for index in self._indices(number)]
        damaged, self.dataset.damaged = self.dataset.damaged, {}
        return Filled(pack(samples, allocate), damaged)

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
        scans: the scans to draw from.
        sampler: draws the crops and masks of a sample.
        intensity: mapping of stored intensities to network input.
        batch_size: samples per micro-batch and process.
        seed: of the order of scans and of every draw.
        num_workers: reading processes; 0 reads in the training process.
        augment: changes one finished sample, given an integer seed.
        strict: raise where a scan is damaged, instead of leaving it out with a warning.
        timeout_s: seconds that a batch of a reading process is waited for; None for ever.
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
        strict: bool = False,
        timeout_s: float | None = None,
    ) -> None:
        if not scans:
            raise DataError("There is no scan to train on; check the data folder and the split.")
        self.dataset = SampleDataset(scans, sampler, intensity, seed, augment, strict=strict)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.timeout_s = timeout_s
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

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[dict[str, Any]]:
        """Endless micro-batches of this process, beginning at sample ``first_sample`` of the whole run.

        Yields:
            By key, what ``.to(device)`` makes a tensor on the device: images ``(B, N, C, X, Y, Z)`` float32 (see
            :class:`~mim3d.loading.stored_images.StoredImages`), labels ``(B, N, X, Y, Z)`` int64, arrays ``(B, ...)``.
            With reading processes they lie in memory that is written to again once the next batch is asked for.

        Raises:
            DamagedError: all scans are damaged, or one is and the loader is ``strict``.
            Mim3dError: a reading process ended or hangs; whatever error it met is raised here.
        """
        num_readers = max(1, self.num_workers)
        reader = _BatchReader(self.dataset, first_sample, self.batch_size, rank, world_size, num_readers)
        if self.num_workers == 0:
            for number in itertools.count():
                yield self._opened(reader(number, np.empty))
        num_bytes = slot_bytes(self.dataset[0].values(), self.batch_size)
        with Ring(reader, self.num_workers, num_bytes, timeout_s=self.timeout_s, describe=reader.cases) as ring:
            for filled in ring:
                yield self._opened(filled)

    def _opened(self, filled: Filled) -> dict[str, Any]:
        for case, sentence in filled.damaged.items():
            if case not in self._named:
                self._named.add(case)
                warnings.warn(f"{case} is damaged, other scans stand in for it: {sentence}", stacklevel=3)
        return {key: packed.unpacked() for key, packed in filled.arrays.items()}
