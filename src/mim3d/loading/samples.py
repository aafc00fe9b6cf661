"""Samples: drawn from a generator first, and only then are the voxels read that they name.

The order of samples and everything drawn for one are pure functions of (seed, sample index): the same under any number
of workers and processes, and resumable in the middle of an epoch. Where a scan proves damaged, the next one of the
epoch's order stands in for it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mim3d.caching.scan import Box, CachedScan
from mim3d.caching.stored_voxels import reduction_of
from mim3d.core.errors import DamagedError
from mim3d.core.types import Triple
from mim3d.loading.stored_images import StoredCrops, pack
from mim3d.nn.volumes import flip, resize_image, resize_labels
from mim3d.scans.intensity import NO_RESCALING, Intensity, apply_rescaling

#: This many damaged scans in a row are no chance: it is the disk, or all of the cache.
MAX_DAMAGED_IN_A_ROW = 100

Augment = Callable[[dict[str, Tensor], int], dict[str, Tensor]]


@dataclass(frozen=True)
class Crop:
    """One crop of a scan.

    Attributes:
        origin: First voxel. It may lie outside the scan, where the padding value stands.
        footprint: Voxels of the scan that the crop covers.
        size: Voxels that the crop is delivered as. It is resized where this differs from ``footprint``.
    """

    origin: Triple
    footprint: Triple
    size: Triple


@dataclass(frozen=True)
class Sample:
    """Everything about one training sample, drawn before a voxel is read.

    Attributes:
        images: Batch key -> crops, stacked to ``(N, C, X, Y, Z)``. A crop that is asked for several times, under one
            key or several (two views, a teacher), is read once.
        labels: Batch key -> crops of the label map, stacked to ``(N, X, Y, Z)``.
        arrays: Batch key -> masks and places, handed to the objective as they are.
        flips: Axes along which every crop is flipped after it was read.
        gain: Factor on the mapped intensities of the whole sample.
        bias: Offset on the mapped intensities of the whole sample.
        pyramid: Whether crops whose reduction is stored in the scan's pyramid, on its voxels, are read there. It must
            hold what full resolution shows there, see ``CachedScan.shows``; otherwise crops are read in full resolution
            and reduced.
    """

    images: Mapping[str, tuple[Crop, ...]]
    labels: Mapping[str, tuple[Crop, ...]] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    flips: tuple[bool, bool, bool] = (False, False, False)
    gain: float = 1.0
    bias: float = 0.0
    pyramid: bool = True

    def shapes(self, num_channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of every tensor that it is read as, by batch key, before a voxel is read.

        Args:
            num_channels: Number of channels of the scans.
        """
        images = {
            key: ((len(crops), num_channels, *crops[0].size), torch.float32) for key, crops in self.images.items()
        }
        labels = {key: ((len(crops), *crops[0].size), torch.int64) for key, crops in self.labels.items()}
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


@dataclass(eq=False)
class SampleDataset:
    """Sample number ``index`` of an endless sequence over ``scans``, shuffled anew each epoch.

    Attributes:
        scans: Scans to draw from; one sample of each is one epoch.
        sampler: Draws the crops and masks of a sample.
        intensity: How stored intensities become network input.
        seed: Determines, together with the index, everything drawn.
        augment: Changes one finished sample, given an integer seed.
        strict: Whether to raise where a scan is damaged, instead of drawing from the next one.
        damaged: Case -> what is wrong with it, of the scans found damaged since this was last emptied.
    """

    scans: Sequence[CachedScan]
    sampler: Sampler
    intensity: Intensity
    seed: int
    augment: Augment | None
    strict: bool = field(default=False, kw_only=True)
    damaged: dict[str, str] = field(default_factory=dict, init=False)
    _order: tuple[int, np.ndarray] = field(default=(-1, np.empty(0, dtype=np.int64)), init=False)
    #: Index -> a sample that was announced, and the generator as it was left for its augmentation.
    _drawn_ahead: dict[int, tuple[Sample, np.random.Generator]] = field(default_factory=dict, init=False)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A sample as the objective sees it: images as ``(N, C, X, Y, Z)`` float32."""
        packed = pack([self.sample(index)], np.empty)
        return {key: value.unpacked().to("cpu")[0] for key, value in packed.items()}

    def sample(self, index: int) -> dict[str, StoredCrops | Tensor]:
        """A sample as it travels: images as they are stored, where nothing but their intensities is to be changed.

        Raises:
            DamagedError: The scan is damaged, and ``strict`` or all that could stand in for it as well.
        """
        for attempt in range(min(len(self.scans), MAX_DAMAGED_IN_A_ROW)):
            scan = self._scan_of(index, attempt)
            try:
                # What was announced is used once, as its generator is used up then.
                return self._read(scan, *(self._drawn_ahead.pop(index, None) or self._draw(index, scan)))
            except DamagedError as error:
                # Not remembered for later samples: which processes would know of it depends on their number.
                self.damaged.setdefault(scan.case.id, str(error))
                last = error
                if self.strict:
                    break
        raise last

    def announce(self, index: int) -> None:
        """Draw a sample that is to be read soon, and let the disk begin with it; nothing is waited for."""
        scan = self._scan_of(index)
        with suppress(DamagedError):
            self._drawn_ahead[index] = self._draw(index, scan)
            for level, boxes in self._boxes(scan, self._drawn_ahead[index][0]).items():
                scan.will_need(boxes, level)

    def num_values(self, index: int) -> int:
        """Values that a sample reads of its scan, labels among them; none is read for this.

        Raises:
            DamagedError: The scan is damaged.
        """
        scan = self._scan_of(index)
        sample, _ = self._draw(index, scan)
        images = sum(math.prod(size) for boxes in self._boxes(scan, sample).values() for _, size in boxes)
        return scan.num_channels * images + sum(math.prod(size) for _, size in _label_boxes(sample))

    def num_coarse_crops(self, index: int) -> int:
        """Crops of a sample that the pyramid of its scan could hold.

        Raises:
            DamagedError: The scan is damaged.
        """
        scan = self._scan_of(index)
        sample, _ = self._draw(index, scan)
        crops = [crop for found in sample.images.values() for crop in found] if sample.pyramid else []
        return sum(level_of(crop, scan.num_levels) > 0 for crop in crops)

    def case_id(self, index: int) -> str:
        """The case that a sample is drawn from, unless it proves damaged."""
        return self._scan_of(index).case.id

    def _draw(self, index: int, scan: CachedScan) -> tuple[Sample, np.random.Generator]:
        rng = np.random.default_rng((self.seed, index))
        return self.sampler.draw(scan, rng), rng

    def _scan_of(self, index: int, attempt: int = 0) -> CachedScan:
        epoch, position = divmod(index, len(self.scans))
        if self._order[0] != epoch:
            # A different stream from the samples' own (three numbers instead of two).
            self._order = (epoch, np.random.default_rng((self.seed, epoch, 1)).permutation(len(self.scans)))
        return self.scans[int(self._order[1][(position + attempt) % len(self.scans)])]

    def _read(self, scan: CachedScan, sample: Sample, rng: np.random.Generator) -> dict[str, StoredCrops | Tensor]:
        rescaling = self.intensity.rescaling(
            scan.stored_intensities, scan.statistics, gain=sample.gain, bias=sample.bias
        )
        stored: dict[tuple[int, Box], np.ndarray] = {}
        for level, boxes in self._boxes(scan, sample).items():
            stored |= zip(((level, box) for box in boxes), scan.read_crops(boxes, level), strict=True)
        flips = (slice(None), *(slice(None, None, -1 if flipped else 1) for flipped in sample.flips))
        images = {
            key: self._finished([stored[self._box_of(crop, scan, sample)][flips] for crop in crops], crops, rescaling)
            for key, crops in sample.images.items()
        }
        labels = {box: torch.from_numpy(scan.read_label(*box).astype(np.int64)) for box in _label_boxes(sample)}
        others: dict[str, Tensor] = {}
        for key, crops in sample.labels.items():
            resized = [resize_labels(labels[crop.origin, crop.footprint][None], crop.size)[0] for crop in crops]
            others[key] = torch.stack([flip(label, sample.flips) for label in resized])
        for key, array in sample.arrays.items():
            others[key] = torch.from_numpy(np.ascontiguousarray(array))
        if self.augment is None:
            return {**images, **others}
        values = {key: torch.from_numpy(np.stack(image.crops)) for key, image in images.items()}
        return {**self.augment({**values, **others}, int(rng.integers(2**31)))}

    def _box_of(self, crop: Crop, scan: CachedScan, sample: Sample) -> tuple[int, Box]:
        """The level of the scan's pyramid that a crop is read from, and its place there."""
        if sample.pyramid and (level := level_of(crop, scan.num_levels)):
            x, y, z = (first >> level for first in crop.origin)
            if scan.shows(level, ((x, y, z), crop.size), self.intensity.bounds):
                return level, ((x, y, z), crop.size)
        return 0, (crop.origin, crop.footprint)

    def _boxes(self, scan: CachedScan, sample: Sample) -> dict[int, list[Box]]:
        """Level of the scan's pyramid -> the places that a sample reads there, each of them once."""
        boxes: dict[int, dict[Box, None]] = {}
        for crops in sample.images.values():
            for crop in crops:
                level, box = self._box_of(crop, scan, sample)
                boxes.setdefault(level, {})[box] = None
        return {level: list(found) for level, found in boxes.items()}

    def _finished(self, stored: list[np.ndarray], crops: Sequence[Crop], rescaling: np.ndarray) -> StoredCrops:
        """Crops as they travel: network input where they are resized or augmented here, else as they are stored."""
        if self.augment is None and all(
            array.shape[1:] == crop.size for array, crop in zip(stored, crops, strict=True)
        ):
            return StoredCrops(stored, rescaling)
        finished = []
        for array, crop in zip(stored, crops, strict=True):
            image = torch.from_numpy(array.astype(np.float32))
            apply_rescaling(image, rescaling)
            finished.append(resize_image(image[None], crop.size)[0].numpy())
        return StoredCrops(finished, np.tile(np.array(NO_RESCALING, dtype=np.float32), (len(rescaling), 1)))


def level_of(crop: Crop, num_levels: int) -> int:
    """The level of a scan's pyramid that holds a crop as it is delivered; 0 where it must be read and resized.

    A level fits where its voxels are the crop's: a reduction by the same power of two along all axes, from a first
    voxel that is a multiple of it.
    """
    factor = reduction_of(crop.footprint, crop.size)
    level = factor.bit_length() - 1
    aligned = all(first % factor == 0 for first in crop.origin)
    return level if aligned and level < num_levels else 0


def _label_boxes(sample: Sample) -> list[Box]:
    """The places that a sample reads of the label map, each of them once."""
    return list(dict.fromkeys((crop.origin, crop.footprint) for crops in sample.labels.values() for crop in crops))
