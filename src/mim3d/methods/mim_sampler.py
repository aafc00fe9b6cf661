"""MiM's sampler: draws the hierarchy, its masks and one augmentation before a voxel is read."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mim3d.data.cache import CachedScan
from mim3d.data.loading import Read, Sample
from mim3d.data.pyramid import reduction_of
from mim3d.methods.hierarchy import DrawnLevel, Geometry, Hierarchy
from mim3d.types import Triple


@dataclass(frozen=True)
class MiMSampler:
    """One sample = one hierarchy, with one geometric and one intensity draw for all its levels.

    Attributes:
        hierarchy: the checked levels.
        flip_prob: probability of a flip along each axis.
        intensity_gain: largest relative change of intensities.
        intensity_bias: largest shift of intensities.
        pyramid: lay every hierarchy on the voxels of its coarsest reduction, so that reduced crops are read from the
            scan's pyramid.
    """

    hierarchy: Hierarchy
    flip_prob: float = 0.5
    intensity_gain: float = 0.1
    intensity_bias: float = 0.1
    pyramid: bool = True

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a hierarchy inside the scan's body box.

        Batch keys: ``<level>`` images for levels read from the scan, ``hidden/<level>`` masks ``(n, L)``,
        ``place/<level>`` places ``(n,)``, and ``corner/<level>`` first voxels ``(n, 3)`` in the ancestor a
        level is sliced from.
        """
        flips = tuple(bool(flip) for flip in rng.random(3) < self.flip_prob)
        gain = 1 + self.intensity_gain * rng.uniform(-1, 1)
        bias = self.intensity_bias * rng.uniform(-1, 1)
        footprint = self.hierarchy.levels[0].level.footprint
        root = np.array(draw_origin(scan.shape, scan.body_box, footprint, rng, self._step))
        images, arrays = {}, {}
        drawn = self.hierarchy.draw(rng)
        for geometry, level in zip(self.hierarchy.levels, drawn, strict=True):
            name = geometry.level.name
            arrays[f"hidden/{name}"] = level.hidden
            arrays[f"place/{name}"] = level.places
            if geometry.source is None:
                images[name] = tuple(
                    self._read(geometry, root + o) for o in self._stored_offsets(geometry, level, flips)
                )
            else:
                arrays[f"corner/{name}"] = relative_corners(level, drawn[geometry.source])
        return Sample(
            images=images,
            arrays=arrays,
            flips=(flips[0], flips[1], flips[2]),
            gain=gain,
            bias=bias,
            pyramid=self.pyramid,
        )

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
    def _read(geometry: Geometry, origin: np.ndarray) -> Read:
        x, y, z = (int(voxel) for voxel in origin)
        return Read((x, y, z), geometry.level.footprint, geometry.level.size)


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
