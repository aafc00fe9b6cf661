"""MiM's sampler: draws the hierarchy, its masks and one augmentation before a voxel is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mim3d.caching.scan import CachedScan
from mim3d.caching.stored_voxels import reduction_of
from mim3d.core.types import Triple
from mim3d.loading.samples import Crop, Sample
from mim3d.methods.mim.hierarchy import DrawnLevel, Geometry, Hierarchy

#: A hierarchy with too much air is drawn anew until it was drawn so many times; the one with least air is kept.
MAX_DRAWS = 8

Images = Mapping[str, tuple[Crop, ...]]


@dataclass(frozen=True)
class MiMSampler:
    """One sample = one hierarchy, with one geometric and one intensity draw for all its levels.

    Attributes:
        hierarchy: The checked levels.
        flip_prob: Probability of a flip along each axis.
        intensity_gain: Largest relative change of intensities.
        intensity_bias: Largest shift of intensities.
        pyramid: Lay every hierarchy on the voxels of its coarsest reduction, so that reduced crops are read from the
            scan's pyramid.
        max_air: Share of air, over the volumes read, above which a hierarchy is drawn anew; None keeps the first.
    """

    hierarchy: Hierarchy
    flip_prob: float = 0.5
    intensity_gain: float = 0.1
    intensity_bias: float = 0.1
    pyramid: bool = True
    max_air: float | None = 0.5

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a hierarchy inside the scan's body box, with little air where that can be had.

        Batch keys: ``<level>`` images for levels read from the scan, ``hidden/<level>`` masks ``(n, L)``,
        ``place/<level>`` places ``(n,)``, ``corner/<level>`` first voxels ``(n, 3)`` in the ancestor a level is
        sliced from, and ``air`` ``(1,)``, the share of air in the volumes read from the scan.
        """
        flips = tuple(bool(flip) for flip in rng.random(3) < self.flip_prob)
        gain = 1 + self.intensity_gain * rng.uniform(-1, 1)
        bias = self.intensity_bias * rng.uniform(-1, 1)
        images, drawn, air = self._draw_hierarchy(scan, flips, rng)
        for _ in range(MAX_DRAWS - 1):
            if self.max_air is None or air <= self.max_air:
                break
            other = self._draw_hierarchy(scan, flips, rng)
            images, drawn, air = min((images, drawn, air), other, key=lambda candidate: candidate[2])
        return Sample(
            images=images,
            arrays={**self._arrays(drawn), "air": np.array([air], dtype=np.float32)},
            flips=(flips[0], flips[1], flips[2]),
            gain=gain,
            bias=bias,
            pyramid=self.pyramid,
        )

    def _draw_hierarchy(
        self, scan: CachedScan, flips: tuple[bool, ...], rng: np.random.Generator
    ) -> tuple[Images, list[DrawnLevel], float]:
        """One hierarchy: what is read of the scan, its levels, and the mean share of air in the volumes read."""
        footprint = self.hierarchy.levels[0].level.footprint
        root = np.array(draw_origin(scan.shape, scan.body_box, footprint, rng, self._step))
        drawn = self.hierarchy.draw(rng)
        images = {
            geometry.level.name: tuple(
                self._read(geometry, root + offset) for offset in self._stored_offsets(geometry, level, flips)
            )
            for geometry, level in zip(self.hierarchy.levels, drawn, strict=True)
            if geometry.source is None
        }
        bodies = [scan.foreground_ratio(read.origin, read.footprint) for reads in images.values() for read in reads]
        return images, drawn, 1 - sum(bodies) / len(bodies)

    def _arrays(self, drawn: list[DrawnLevel]) -> dict[str, np.ndarray]:
        """Masks and places of every level, and where those that are sliced from an ancestor lie in it."""
        arrays = {}
        for geometry, level in zip(self.hierarchy.levels, drawn, strict=True):
            name = geometry.level.name
            arrays[f"hidden/{name}"] = level.hidden
            arrays[f"place/{name}"] = level.places
            if geometry.source is not None:
                arrays[f"corner/{name}"] = relative_corners(level, drawn[geometry.source])
        return arrays

    @cached_property
    def _step(self) -> int:
        """Voxels between two places of a root: deeper levels lie at multiples of their footprints from it."""
        levels = [geometry.level for geometry in self.hierarchy.levels if geometry.source is None]
        return max(reduction_of(level.footprint, level.size) for level in levels) if self.pyramid else 1

    def _stored_offsets(self, geometry: Geometry, level: DrawnLevel, flips: tuple[bool, ...]) -> np.ndarray:
        """Offsets in the scan as stored: the hierarchy is drawn in the flipped root, where they are mirrored."""
        root = np.array(self.hierarchy.levels[0].level.footprint)
        mirrored = root - np.array(geometry.level.footprint) - level.offsets
        stored: np.ndarray = np.where(np.array(flips), mirrored, level.offsets)
        return stored

    @staticmethod
    def _read(geometry: Geometry, origin: np.ndarray) -> Crop:
        x, y, z = (int(voxel) for voxel in origin)
        return Crop((x, y, z), geometry.level.footprint, geometry.level.size)


def relative_corners(level: DrawnLevel, ancestor: DrawnLevel) -> np.ndarray:
    """First voxels ``(n, 3)`` of each volume within its ancestor; descendants of one ancestor lie side by side."""
    per_ancestor = len(level.offsets) // len(ancestor.offsets)
    return level.offsets - np.repeat(ancestor.offsets, per_ancestor, axis=0)


def draw_origin(
    shape: Triple, body_box: tuple[Triple, Triple], footprint: Triple, rng: np.random.Generator, step: int = 1
) -> Triple:
    """First voxel of a random crop: inside the scan and the body box where it fits, else covering them.

    With ``step`` it is a multiple of that along every axis, the next one below where none lies in that range.
    """
    origin = []
    for voxels, start, stop, size in zip(shape, *body_box, footprint, strict=True):
        low, high = sorted((start, stop - size))
        if voxels >= size:
            low, high = max(low, 0), min(high, voxels - size)
        else:
            low, high = voxels - size, 0
        last = high // step
        first = min(-(-low // step), last)
        origin.append(step * int(rng.integers(first, last + 1)))
    return origin[0], origin[1], origin[2]
