"""Parts of the phantom: solids with a tissue and a label, and the slab of voxels that they are painted into."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mim3d.phantoms.pose import Placement
from mim3d.phantoms.shapes import Array, Solid
from mim3d.phantoms.trunk import ABDOMEN, CHEST, MEDIASTINUM, WALL

BACKGROUND, LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, AORTA, LUNGS, BONES, LESION = range(9)

#: Label value to name.
LABELS: dict[int, str] = {
    BACKGROUND: "background",
    LIVER: "liver",
    SPLEEN: "spleen",
    RIGHT_KIDNEY: "right_kidney",
    LEFT_KIDNEY: "left_kidney",
    AORTA: "aorta",
    LUNGS: "lungs",
    BONES: "bones",
    LESION: "lesion",
}

#: Where organs of the belly, the chest and the whole trunk may lie.
BELLY = (ABDOMEN,)
THORAX = (MEDIASTINUM, CHEST)
CAVITY = (ABDOMEN, MEDIASTINUM, CHEST)
BODY = (WALL, ABDOMEN, MEDIASTINUM, CHEST)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to paint; later parts cover earlier ones.

    Attributes:
        solid: Its shape.
        hu: Its tissue.
        label: Label value it gets; None keeps what is below (a vessel of the liver is liver).
        regions: Regions of the trunk it may lie in.
        on: Label values it may cover; None for all.
    """

    solid: Solid
    hu: float
    label: int | None = BACKGROUND
    regions: tuple[int, ...] = BODY
    on: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Slab:
    """Some slices of a phantom while it is painted; all arrays are (X, Y, stop - start).

    Attributes:
        placement: The whole scan.
        start: First slice.
        stop: One behind the last slice.
        places: Body x, y, z, mm.
        hu: Float32.
        label: Label values.
        region: Regions of the trunk.
    """

    placement: Placement
    start: int
    stop: int
    places: tuple[Array, Array, Array]
    hu: Array
    label: npt.NDArray[np.uint8]
    region: npt.NDArray[np.uint8]

    def paint(self, parts: Iterable[Part]) -> None:
        """Paint parts in their order."""
        for part in parts:
            box = self.placement.box(part.solid.low, part.solid.high, self.start, self.stop)
            if box is not None:
                self._paint(part, box)

    def _paint(self, part: Part, box: tuple[slice, slice, slice]) -> None:
        x, y, z = (place[box] for place in self.places)
        inside = part.solid.level(x, y, z) < 0
        region, label = self.region[box], self.label[box]
        allowed = np.zeros(256, dtype=np.bool_)
        allowed[list(part.regions)] = True
        inside &= allowed[region]
        if part.on is not None:
            allowed = np.zeros(256, dtype=np.bool_)
            allowed[list(part.on)] = True
            inside &= allowed[label]
        self.hu[box][inside] = part.hu
        if part.label is not None:
            label[inside] = part.label
