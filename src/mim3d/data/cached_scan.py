"""One scan of a cache: its card at hand, its voxels read crop by crop."""

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.data import cache_files as layout
from mim3d.data.case_records import Case
from mim3d.data.foreground import Statistics
from mim3d.data.store import StoredArray
from mim3d.errors import DataError
from mim3d.types import Spacing, Triple


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedScan:
    """A preprocessed scan on disk; may be pickled and used in any process.

    Attributes:
        case: Where it comes from.
        folder: Where it is stored.
        shape: Voxels along X, Y, Z.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) float64, voxel index to RAS millimetres.
        num_channels: Channels of the image.
        statistics: Of each channel.
        digest: Of source files and settings: the same digest means the same voxels.
        body_box: Box of the foreground, first voxel and first voxel behind it.
        has_label: Whether a label map is stored.
        num_voxels: Label value -> voxels of it.
        source_bytes: Size of the source files.
    """

    case: Case
    folder: str
    shape: Triple
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    num_channels: int
    statistics: tuple[Statistics, ...]
    digest: str
    body_box: tuple[Triple, Triple]
    has_label: bool
    num_voxels: Mapping[int, int]
    source_bytes: int

    def __getstate__(self) -> dict[str, Any]:
        """Only the card travels to another process: open arrays and loaded places are found again there."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @cached_property
    def class_locations(self) -> dict[int, npt.NDArray[np.int32]]:
        """Label value above 0 -> (N, 3) voxel coordinates, at most 2000, evenly drawn from the class."""
        if not self.has_label:
            return {}
        path = os.path.join(self.folder, layout.LOCATIONS)
        try:
            with np.load(path, allow_pickle=False) as file:
                rows = file["rows"].T
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: missing or damaged; delete {self.folder} and run `mim3d cache` again.") from error
        return {int(value): np.ascontiguousarray(rows[rows[:, 0] == value, 1:]) for value in np.unique(rows[:, 0])}

    def read(self, origin: Triple, size: Triple) -> npt.NDArray[Any]:
        """Read a crop of the image.

        Args:
            origin: First voxel; may lie outside the scan.
            size: Voxels along X, Y, Z.

        Returns:
            (C, X, Y, Z) in the stored type; outside the scan each channel's ``low``.

        Raises:
            DataError: The stored voxels are missing or damaged.
        """
        source, target = self._overlap(origin, size)
        if target is None:
            return self._image.read(slice(None), *source)
        padding = np.array([channel.low for channel in self.statistics])
        crop = np.empty((self.num_channels, *size), dtype=self._image.dtype)
        crop[...] = padding[:, None, None, None]
        if all(part.stop > part.start for part in source):
            crop[(slice(None), *target)] = self._image.read(slice(None), *source)
        return crop

    def read_label(self, origin: Triple, size: Triple) -> npt.NDArray[Any]:
        """Read a crop of the label map, (X, Y, Z) in the stored type; outside the scan 0.

        Raises:
            DataError: There is no label, or it is missing or damaged on disk.
        """
        if not self.has_label:
            raise DataError(f"{self.case.id}: no label in the cache; give a data set with labels.")
        source, target = self._overlap(origin, size)
        if target is None:
            return self._label.read(*source)
        crop = np.zeros(size, dtype=self._label.dtype)
        if all(part.stop > part.start for part in source):
            crop[target] = self._label.read(*source)
        return crop

    @cached_property
    def _image(self) -> StoredArray:
        return StoredArray(os.path.join(self.folder, layout.IMAGE))

    @cached_property
    def _label(self) -> StoredArray:
        return StoredArray(os.path.join(self.folder, layout.LABEL))

    def _overlap(self, origin: Triple, size: Triple) -> tuple[tuple[slice, ...], tuple[slice, ...] | None]:
        """Ranges to read, and where they go in the crop: None where the crop lies inside the scan."""
        source, target = [], []
        for first, length, limit in zip(origin, size, self.shape, strict=True):
            start = min(max(first, 0), limit)
            stop = max(min(first + length, limit), start)
            source.append(slice(start, stop))
            target.append(slice(start - first, stop - first))
        inside = all(part.stop - part.start == length for part, length in zip(source, size, strict=True))
        return tuple(source), None if inside else tuple(target)
