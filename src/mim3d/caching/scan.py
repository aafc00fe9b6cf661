"""One scan of a cache: its card at hand, its voxels read crop by crop."""

import io
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching import layout
from mim3d.caching.foreground import Statistics
from mim3d.caching.layout import ByteSource, open_bytes
from mim3d.caching.shards import BLOCK, ShardedArray
from mim3d.caching.stored_voxels import StoredIntensity, level_shapes
from mim3d.core.errors import DamagedError, DataError
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedScan:
    """A preprocessed scan on disk; may be pickled and used in any process.

    Attributes:
        case: Where it comes from.
        source: Where its files lie: a folder, or ranges of a pack.
        shape: Voxels along X, Y, Z.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) float64, voxel index to RAS millimetres.
        num_channels: Channels of the image.
        statistics: Of each channel.
        dtype: Name of the type that the image is stored in.
        digest: Of source files and settings: the same digest means the same voxels.
        source_digest: SHA-256 of the images' files alone: the same digest means the same scan.
        body_box: Box of the foreground, first voxel and first voxel behind it.
        foreground: (ceil(X / 32), ceil(Y / 32), ceil(Z / 32)) uint8, foreground voxels of each block of 32 voxels a
            side, from 0 for none to 255 for all.
        has_label: Whether a label map is stored.
        num_voxels: Label value -> voxels of it.
        source_bytes: Size of the source files.
        size_bytes: Size of what is stored.
        stored_intensities: Of each channel, what its stored numbers mean.
        num_levels: Resolutions stored, full resolution first, each half the one before.
    """

    case: Case
    source: ByteSource
    shape: Triple
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    num_channels: int
    statistics: tuple[Statistics, ...]
    dtype: str
    digest: str
    source_digest: str
    body_box: tuple[Triple, Triple]
    foreground: npt.NDArray[np.uint8]
    has_label: bool
    num_voxels: Mapping[int, int]
    source_bytes: int
    size_bytes: int
    stored_intensities: tuple[StoredIntensity, ...] = ()
    num_levels: int = 1

    def __getstate__(self) -> dict[str, Any]:
        """Only the card travels to another process: loaded places are found again there."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @cached_property
    def class_locations(self) -> dict[int, npt.NDArray[np.int32]]:
        """Label value above 0 -> (N, 3) voxel coordinates, at most 2000, evenly drawn from the class."""
        if not self.has_label:
            return {}
        try:
            stored = open_bytes(self.source, layout.LOCATIONS)
            with np.load(io.BytesIO(stored.pread(0, stored.size)), allow_pickle=False) as file:
                rows = file["rows"].T
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DamagedError(
                f"{self.case.id}: its {layout.LOCATIONS} is missing or damaged ({error}); delete {self.source} and run "
                "`mim3d cache` again."
            ) from error
        return {int(value): np.ascontiguousarray(rows[rows[:, 0] == value, 1:]) for value in np.unique(rows[:, 0])}

    @property
    def level_shapes(self) -> tuple[Triple, ...]:
        """Voxels along X, Y, Z of each level."""
        return level_shapes(self.shape, self.num_levels)

    def foreground_ratio(self, origin: Triple, size: Triple) -> float:
        """Share of foreground in a box, from the stored map alone; outside the scan there is none.

        Args:
            origin: First voxel in full resolution; may lie outside the scan.
            size: Voxels along X, Y, Z.
        """
        x, y, z = (_voxels_of_blocks(*ends) for ends in zip(origin, size, self.shape, strict=True))
        return float(x @ (self.foreground @ z @ y)) / (255 * math.prod(size))

    def read(self, origin: Triple, size: Triple, level: int = 0) -> npt.NDArray[Any]:
        """Read a crop of the image.

        Args:
            origin: First voxel, counted in voxels of the level; may lie outside the scan.
            size: Voxels of the level along X, Y, Z.
            level: 0 for full resolution; each level halves the one before.

        Returns:
            (C, X, Y, Z) in the stored type, see ``to_values``; outside the scan the number nearest to each channel's
            ``low``.

        Raises:
            DataError: There is no such level, or the stored voxels are missing or damaged.
        """
        return self.read_crops([(origin, size)], level)[0]

    def read_crops(self, boxes: Sequence[tuple[Triple, Triple]], level: int = 0) -> list[npt.NDArray[Any]]:
        """Read several crops at once: what neighbours share is read and unpacked once.

        Args:
            boxes: Origin and size of each, see ``read``.
            level: Of all of them.

        Raises:
            DataError: There is no such level, or the stored voxels are missing or damaged.
        """
        array, inside = self._array(level), []
        dtype, shape = self._checked(array, (self.num_channels, *self.level_shapes[level]))
        crops = []
        for origin, size in boxes:
            crop = np.empty((self.num_channels, *size), dtype=dtype)
            source, target = _overlap(origin, size, shape[1:])
            part = crop[(slice(None), *target)]
            if part.size < crop.size:
                for channel, line, stats in zip(crop, self.stored_intensities, self.statistics, strict=True):
                    channel[...] = line.nearest(stats.low, dtype)
            if part.size:
                inside.append(((0, *source), part))
            crops.append(crop)
        array.read_crops(inside)
        return crops

    def will_need(self, boxes: Sequence[tuple[Triple, Triple]], level: int = 0) -> None:
        """Let the disk begin with crops that are to be read soon; what is wrong with them is told by ``read``."""
        shape = self.level_shapes[level]
        overlaps = [_overlap(origin, size, shape) for origin, size in boxes]
        inside = [
            ((0, *source), (self.num_channels, *(part.stop - part.start for part in target)))
            for source, target in overlaps
        ]
        self._array(level).will_need([box for box in inside if all(box[1])])

    def _array(self, level: int) -> ShardedArray:
        if not 0 <= level < self.num_levels:
            raise DataError(
                f"{self.case.id}: the cache holds no level {level} of it, only 0 to {self.num_levels - 1}; build it "
                f"with --num_levels {level + 1}."
            )
        return ShardedArray(self.source, f"{layout.IMAGE}/{level}")

    def to_values(self, stored_CXYZ: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Stored numbers as float32 in source units (HU for CT)."""
        values = np.empty(stored_CXYZ.shape, dtype=np.float32)
        for channel, stored, line in zip(values, stored_CXYZ, self.stored_intensities, strict=True):
            np.multiply(stored, np.float32(line.scale), out=channel, dtype=np.float32, casting="unsafe")
            channel += np.float32(line.offset)
        return values

    def read_label(self, origin: Triple, size: Triple) -> npt.NDArray[Any]:
        """Read a crop of the label map, (X, Y, Z) in the stored type; outside the scan 0.

        Raises:
            DataError: There is no label, or it is missing or damaged on disk.
        """
        if not self.has_label:
            raise DataError(f"{self.case.id}: no label in the cache; give a data set with labels.")
        array = ShardedArray(self.source, layout.LABEL)
        dtype, shape = self._checked(array, self.shape)
        crop = np.zeros(size, dtype=dtype)
        source, target = _overlap(origin, size, shape)
        part = crop[target]
        if part.size:
            array.read(source, part)
        return crop

    def _checked(self, array: ShardedArray, shape: tuple[int, ...]) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of an array, which must be what the card says."""
        found = array.layout
        if found.shape != shape:
            raise DamagedError(
                f"{self.case.id}: {array.name} in {self.source} holds {found.shape} voxels where its card says "
                f"{shape}; delete that and run `mim3d cache` again."
            )
        return found.dtype, shape


def _voxels_of_blocks(first: int, length: int, limit: int) -> npt.NDArray[np.float32]:
    """Voxels of a stretch in each block along an axis of ``limit`` voxels."""
    edges = np.minimum(np.arange(0, limit + BLOCK, BLOCK), limit).clip(first, max(first, first + length))
    return np.diff(edges).astype(np.float32)


def _overlap(
    origin: Triple, size: Triple, shape: Sequence[int]
) -> tuple[tuple[int, int, int], tuple[slice, slice, slice]]:
    """First voxel to read, and where in the crop the voxels go that lie inside the scan."""
    firsts, target = [], []
    for first, length, limit in zip(origin, size, shape, strict=True):
        start = min(max(first, 0), limit)
        stop = max(min(first + length, limit), start)
        firsts.append(start)
        target.append(slice(start - first, stop - first))
    return (firsts[0], firsts[1], firsts[2]), (target[0], target[1], target[2])
