"""Scans held in memory, for tests that need no cache on disk."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mim3d.caching.foreground import Statistics
from mim3d.caching.stored_voxels import StoredIntensity
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case


def statistics_of(image_XYZ: np.ndarray) -> Statistics:
    """Statistics with the fields that loading reads."""
    return Statistics(
        minimum=float(image_XYZ.min()),
        maximum=float(image_XYZ.max()),
        mean=float(image_XYZ.mean()),
        std=float(image_XYZ.std()),
        percentile_00_1=float(np.percentile(image_XYZ, 0.1)),
        percentile_00_5=float(np.percentile(image_XYZ, 0.5)),
        percentile_99_5=float(np.percentile(image_XYZ, 99.5)),
        percentile_99_9=float(np.percentile(image_XYZ, 99.9)),
        low=float(image_XYZ.min()),
    )


@dataclass
class ArrayScan:
    """A scan in memory with the reading interface of a cached one: full resolution alone, intensities as they are."""

    image: np.ndarray
    label: np.ndarray | None = None
    name: str = "scan"
    class_locations: dict[int, np.ndarray] = field(default_factory=dict)
    spacing_mm: Spacing = (1.0, 1.0, 1.0)
    class_name: str | None = None

    @property
    def case(self) -> Case:
        return Case(id=self.name, images=(f"{self.name}.nii.gz",), patient=self.name, class_name=self.class_name)

    @property
    def shape(self) -> Triple:
        return self.image.shape[1:]

    @property
    def num_channels(self) -> int:
        return len(self.image)

    @property
    def statistics(self) -> tuple[Statistics, ...]:
        return tuple(statistics_of(channel) for channel in self.image)

    @property
    def body_box(self) -> tuple[Triple, Triple]:
        return (0, 0, 0), self.shape

    def foreground_ratio(self, origin: Triple, size: Triple) -> float:
        return float(_crop(np.ones(self.shape), origin, size, 0).mean())

    @property
    def stored_intensities(self) -> tuple[StoredIntensity, ...]:
        return tuple(StoredIntensity() for _ in self.image)

    @property
    def num_levels(self) -> int:
        return 1

    @property
    def level_shapes(self) -> tuple[Triple, ...]:
        return (self.shape,)

    def to_values(self, stored_CXYZ: np.ndarray) -> np.ndarray:
        return stored_CXYZ.astype(np.float32)

    def shows(self, level: int, box: tuple[Triple, Triple], bounds: tuple[float, float]) -> bool:
        return False

    def read(self, origin: Triple, size: Triple, level: int = 0) -> np.ndarray:
        assert level == 0
        return np.stack([_crop(channel, origin, size, channel.min()) for channel in self.image])

    def read_crops(self, boxes: Sequence[tuple[Triple, Triple]], level: int = 0) -> list[np.ndarray]:
        return [self.read(origin, size, level) for origin, size in boxes]

    def will_need(self, boxes: Sequence[tuple[Triple, Triple]], level: int = 0) -> None:
        assert level == 0

    def read_label(self, origin: Triple, size: Triple) -> np.ndarray:
        return _crop(self.label, origin, size, 0)


def _crop(volume: np.ndarray, origin: Triple, size: Triple, fill: float) -> np.ndarray:
    indices = [np.arange(start, start + length) for start, length in zip(origin, size, strict=True)]
    inside = [(index >= 0) & (index < voxels) for index, voxels in zip(indices, volume.shape, strict=True)]
    clipped = np.ix_(*(np.clip(index, 0, voxels - 1) for index, voxels in zip(indices, volume.shape, strict=True)))
    return np.where(inside[0][:, None, None] & inside[1][:, None] & inside[2], volume[clipped], fill)


def random_scan(shape: Triple, seed: int = 0, name: str = "scan") -> ArrayScan:
    """HU-like noise with structure."""
    rng = np.random.default_rng(seed)
    return ArrayScan(rng.normal(0, 300, (1, *shape)).astype(np.float32), name=name)
