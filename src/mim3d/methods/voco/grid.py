"""VoCo's grid of base crops: how it is planned for scans, and how much of a random crop each base crop holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mim3d.backbones.contract import check_multiple, size_text
from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.crops import MAX_PADDING, by_text, median_shape, padding_ratio

#: The paper's base crops and their number along X, Y, Z.
PUBLISHED_EDGE = 64
PUBLISHED_CELLS: Triple = (4, 4, 1)

#: A planned grid has at most so many base crops, as the paper's has, and at most so many along an axis.
MAX_BASES = math.prod(PUBLISHED_CELLS)
MAX_CELLS = max(PUBLISHED_CELLS)

#: What is planned, the first that the scans hold: inputs of at least so many tokens per axis, and so many base crops.
PREFERENCES = ((2, 8), (2, 4), (1, 4))

#: Where a random crop overlaps a larger share of the base crops, few are left that it is to be told from.
MAX_OVERLAPPED = 0.75

#: With fewer base crops there is next to nothing to tell a place by.
MIN_BASES = 4


@dataclass(frozen=True)
class CropGrid:
    """Base crops side by side.

    Attributes:
        cells: Base crops along X, Y, Z.
        crop_size: Voxels of each of them, and of a random crop.
    """

    cells: Triple
    crop_size: Triple

    @property
    def footprint(self) -> Triple:
        """Voxels of the scan that all base crops cover."""
        x, y, z = (number * edge for number, edge in zip(self.cells, self.crop_size, strict=True))
        return x, y, z

    @property
    def num_bases(self) -> int:
        """Number of base crops."""
        return math.prod(self.cells)

    @property
    def num_overlapped(self) -> float:
        """Base crops that a random crop overlaps, on average over all its places."""
        # Along an axis it overlaps two, but one where it lies side by side with all: at as many places as there are.
        places = [(number - 1) * edge + 1 for number, edge in zip(self.cells, self.crop_size, strict=True)]
        return math.prod(2 - number / every for number, every in zip(self.cells, places, strict=True))

    def corners(self) -> np.ndarray:
        """First voxels ``(K, 3)`` of the base crops within the grid, Z fastest."""
        return np.array(list(np.ndindex(self.cells))) * np.array(self.crop_size)

    def overlaps(self, places_R3: np.ndarray) -> np.ndarray:
        """Share ``(R, K)`` of each random crop's volume that lies in each base crop.

        Args:
            places_R3: First voxels of the random crops within the grid.
        """
        size = np.array(self.crop_size)
        apart = np.abs(places_R3[:, None] - self.corners()[None])
        return np.asarray(np.clip(size - apart, 0, None).prod(-1) / size.prod(), dtype=np.float32)

    def describe(self) -> str:
        """The grid in words, for a line of a run."""
        return f"{by_text(self.cells)} base crops of {by_text(self.crop_size)} voxels"


def plan_grid(multiple: Triple, shapes: Sequence[Triple], crop_size: Triple | None, cells: Triple | None) -> CropGrid:
    """The largest crops of which the median scan holds enough side by side, at most the paper's.

    Args:
        multiple: Voxels along X, Y, Z that the sizes of a crop must be multiples of.
        shapes: Voxels of every scan.
        crop_size: Voxels of a crop, where they are given.
        cells: Base crops along X, Y, Z, where they are given.

    Raises:
        ConfigError: The scans are too small, or hold too little of what was asked for.
    """
    scan = median_shape(shapes)
    if crop_size is not None:
        check_multiple(crop_size, multiple, "method.crop_size")
        candidates = [crop_size]
    else:
        step = math.lcm(*multiple)
        edges = range(max(PUBLISHED_EDGE // step, 1) * step, 0, -step)
        candidates = [(edge, edge, edge) for edge in edges]
    grids = [CropGrid(cells or cells_of(scan, size), size) for size in candidates]
    fitting = [grid for grid in grids if padding_ratio(grid.footprint, [scan]) == 0 and grid.num_bases >= MIN_BASES]
    for tokens, bases in PREFERENCES:
        for grid in fitting:
            whole = all(edge >= tokens * least for edge, least in zip(grid.crop_size, multiple, strict=True))
            if whole and grid.num_bases >= bases:
                return grid
    if crop_size is not None and cells is not None:
        return _given(grids[0], shapes, scan)
    given_size = "" if crop_size is None else f", and method.crop_size is {by_text(crop_size)}"
    asked = f"method.cells {by_text(cells)}" if cells else f"VoCo needs {MIN_BASES} base crops side by side"
    raise ConfigError(
        f"{asked}, and the scans, of {by_text(scan)} voxels (median), do not hold them: crops are multiples of "
        f"{size_text(multiple)} voxels with this backbone{given_size}; use a backbone with smaller tokens, "
        "prepare the scans with a smaller spacing_mm, or take another method."
    )


def cells_of(scan: Triple, crop_size: Triple) -> Triple:
    """Crops that a scan holds along X, Y, Z; where they are too many, fewer along Z, then along Y."""
    x, y, z = (max(1, min(MAX_CELLS, voxels // edge)) for voxels, edge in zip(scan, crop_size, strict=True))
    z = max(1, min(z, MAX_BASES // (x * y)))
    return x, y, z


def _given(grid: CropGrid, shapes: Sequence[Triple], scan: Triple) -> CropGrid:
    """A grid of which everything was given: it may reach beyond the scans, as long as it is not mostly padding."""
    share = padding_ratio(grid.footprint, shapes)
    if grid.num_bases < MIN_BASES or share > MAX_PADDING:
        why = f"{share:.0%} of it would be padding" if share > MAX_PADDING else f"it has fewer than {MIN_BASES}"
        raise ConfigError(
            f"method.cells and method.crop_size ask for {grid.describe()}, but {why}, since the scans have "
            f"{by_text(scan)} voxels (median); leave both out to have them planned."
        )
    return grid
