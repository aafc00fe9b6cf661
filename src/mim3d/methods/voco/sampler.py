"""VoCo's sampler: draws where the grid lies and the random crops in it before a voxel is read."""

from typing import TYPE_CHECKING

import numpy as np

from mim3d.caching.scan import CachedScan
from mim3d.loading.samples import Crop, Sample
from mim3d.methods.crops import draw_origin
from mim3d.methods.voco.grid import CropGrid

if TYPE_CHECKING:
    from mim3d.methods.voco.method import VoCo


class VoCoSampler:
    """One sample = the base crops of a grid, random crops inside of it, and the overlap of each with each.

    Args:
        settings: Settings of the method.
        grid: The base crops.
    """

    def __init__(self, settings: "VoCo", grid: CropGrid) -> None:
        self.settings = settings
        self.grid = grid

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw a grid inside the scan's body box, as far as it fits, and random crops anywhere in it.

        Batch keys: ``base`` and ``crop`` images, and ``overlap`` ``(R, K)``, the share of each random crop's volume in
        each base crop. The whole sample is flipped or not, so that the overlaps stay what they are.
        """
        settings, grid = self.settings, self.grid
        flips, gain, bias = settings.variation(rng)
        root = np.array(draw_origin(scan.shape, scan.body_box, grid.footprint, rng))
        spare = np.array(grid.footprint) - np.array(grid.crop_size)
        places_R3 = rng.integers(0, spare + 1, (settings.num_crops, 3))
        return Sample(
            images={"base": self._crops(root + grid.corners()), "crop": self._crops(root + places_R3)},
            arrays={"overlap": grid.overlaps(places_R3)},
            flips=flips,
            gain=gain,
            bias=bias,
        )

    def _crops(self, origins_N3: np.ndarray) -> tuple[Crop, ...]:
        size = self.grid.crop_size
        return tuple(Crop((x, y, z), size, size) for x, y, z in origins_N3.tolist())
