"""Draws a hierarchy (or the single crop of a masked autoencoder), its masks and one augmentation, before any read."""

import numpy as np

from mim3d.caching.scan import CachedScan
from mim3d.caching.stored_voxels import reduction_of
from mim3d.loading.samples import Crop, Sample
from mim3d.methods.crops import draw_origin, with_little_air
from mim3d.methods.masked import MaskedMethod
from mim3d.methods.mim.hierarchy import DrawnLevel, Hierarchy


class HierarchySampler:
    """One sample = one hierarchy, with one geometric and one intensity draw for all its levels.

    Args:
        settings: Settings of the method.
        hierarchy: The checked levels.
        pyramid: Whether reduced levels are read from the cache's coarser resolutions, and lie on their voxels.
    """

    def __init__(self, settings: MaskedMethod, hierarchy: Hierarchy, *, pyramid: bool = True) -> None:
        self.settings = settings
        self.pyramid = pyramid
        self.hierarchy = hierarchy
        reductions = [reduction_of(g.level.footprint, g.level.size) for g in hierarchy.levels if g.source is None]
        # Voxels between two places of a root: deeper levels lie at multiples of their footprints from it.
        self._step = max(reductions) if pyramid else 1

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a hierarchy inside the scan's body box, with little air where that can be had.

        Batch keys: ``<level>`` images for levels read from the scan, ``hidden/<level>`` masks ``(n, L)``,
        ``place/<level>`` places ``(n,)``, ``corner/<level>`` first voxels ``(n, 3)`` in the ancestor a level is
        sliced from, and ``air`` ``(1,)``, the share of air in the volumes read from the scan.
        """
        flips, gain, bias = self.settings.variation(rng)
        (images, drawn), air = with_little_air(lambda: self._draw_hierarchy(scan, flips, rng), self.settings.max_air)
        arrays: dict[str, np.ndarray] = {}
        for geometry, level in zip(self.hierarchy.levels, drawn, strict=True):
            name = geometry.level.name
            arrays |= {f"hidden/{name}": level.hidden, f"place/{name}": level.places}
            if geometry.source is not None:
                arrays[f"corner/{name}"] = relative_corners(level, drawn[geometry.source])
        arrays["air"] = np.array([air], dtype=np.float32)
        return Sample(images, arrays=arrays, flips=flips, gain=gain, bias=bias, pyramid=self.pyramid)

    def _draw_hierarchy(
        self, scan: CachedScan, flips: tuple[bool, bool, bool], rng: np.random.Generator
    ) -> tuple[tuple[dict[str, tuple[Crop, ...]], list[DrawnLevel]], float]:
        """One hierarchy: what is read of the scan, its levels, and the mean share of air in the volumes read."""
        whole = self.hierarchy.levels[0].level.footprint
        root = draw_origin(scan.shape, scan.body_box, whole, rng, self._step)
        drawn = self.hierarchy.draw(rng)
        images = {}
        for geometry, level in zip(self.hierarchy.levels, drawn, strict=True):
            if geometry.source is None:
                footprint, size = geometry.level.footprint, geometry.level.size
                # The hierarchy is drawn in the flipped root; in the scan as stored its volumes are mirrored.
                mirrored = np.array(whole) - np.array(footprint) - level.offsets
                origins = np.array(root) + np.where(flips, mirrored, level.offsets)
                images[geometry.level.name] = tuple(Crop((x, y, z), footprint, size) for x, y, z in origins.tolist())
        bodies = [scan.foreground_ratio(read.origin, read.footprint) for reads in images.values() for read in reads]
        return (images, drawn), 1 - sum(bodies) / len(bodies)


def relative_corners(level: DrawnLevel, ancestor: DrawnLevel) -> np.ndarray:
    """First voxels ``(n, 3)`` of each volume within its ancestor; descendants of one ancestor lie side by side."""
    per_ancestor = len(level.offsets) // len(ancestor.offsets)
    return level.offsets - np.repeat(ancestor.offsets, per_ancestor, axis=0)
