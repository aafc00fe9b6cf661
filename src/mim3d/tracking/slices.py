"""Slices of volumes in the radiological convention: anatomical planes, grey ranges, and images for a tracker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing

Volume = npt.NDArray[Any]

_GAP = 2


@dataclass(frozen=True)
class Plane:
    """An anatomical plane of an (X, Y, Z) array along RAS+ axes, shown in the radiological convention.

    Attributes:
        name: Axial, coronal or sagittal, in lower case.
        axis: Array axis perpendicular to the plane.
        across: Array axis that runs from left to right on the page, reversed.
        down: Array axis that runs from top to bottom on the page, reversed.
        left: Letter of the patient's side on the left of the page.
        right: Letter of the patient's side on the right of the page.
    """

    name: str
    axis: int
    across: int
    down: int
    left: str
    right: str

    def cut(self, volume: Volume, index: int) -> Volume:
        """The slice at an index, as rows from the top of the page: anterior or superior first, right side left."""
        flat = np.moveaxis(volume, (self.axis, self.down, self.across), (0, 1, 2))[index]
        return flat[::-1, ::-1]

    def middle(self, volume: Volume) -> Volume:
        """The slice in the middle of a volume, oriented as by :meth:`cut`."""
        return self.cut(volume, volume.shape[self.axis] // 2)

    def extent_mm(self, shape: Sequence[int], spacing_mm: Spacing) -> tuple[float, float, float, float]:
        """Left, right, lower and upper border of a slice in millimetres from its lower left corner."""
        width, height = (shape[axis] * spacing_mm[axis] for axis in (self.across, self.down))
        return 0.0, width, 0.0, height


PLANES = (
    Plane("axial", axis=2, across=0, down=1, left="R", right="L"),
    Plane("coronal", axis=1, across=0, down=2, left="R", right="L"),
    Plane("sagittal", axis=0, across=1, down=2, left="A", right="P"),
)


def grey_range(volume: Volume) -> tuple[float, float]:
    """Values shown as black and as white: all but the darkest and brightest half per cent lie between them."""
    finite = volume[np.isfinite(volume)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)


def middle_slices(volumes: Mapping[str, Volume]) -> dict[str, npt.NDArray[np.uint8]]:
    """Grey images of the middle slices of volumes, one image per group.

    Volumes of one group share black and white: those of :func:`grey_range` of the first scan, or for label maps zero
    and the largest label.

    Args:
        volumes: Volumes (X, Y, Z) by name; others are left out. Those named ``coarse/...`` are the rows of the image
            ``coarse``. Arrays of integers are label maps.

    Returns:
        Images (H, W) by name of their group. The columns are the middle axial, coronal and sagittal slice.
    """
    groups: dict[str, list[Volume]] = {}
    for name, volume in volumes.items():
        if volume.ndim == 3:
            groups.setdefault(name.rpartition("/")[0] or name, []).append(volume)
    images = {}
    for name, group in groups.items():
        scans = [volume for volume in group if np.issubdtype(volume.dtype, np.floating)]
        maps = [volume for volume in group if not np.issubdtype(volume.dtype, np.floating)]
        grey = grey_range(scans[0]) if scans else (0.0, 1.0)
        largest = float(max((volume.max(initial=0) for volume in maps), default=0)) or 1.0
        rows = []
        for volume in group:
            low, high = grey if np.issubdtype(volume.dtype, np.floating) else (0.0, largest)
            shown = [np.nan_to_num(plane.middle(volume).astype(np.float64)) for plane in PLANES]
            scaled = [np.clip((image - low) / (high - low), 0, 1) * 255 for image in shown]
            height = max(image.shape[0] for image in scaled)
            padded = [np.pad(image, ((0, height - image.shape[0]), (0, _GAP))) for image in scaled]
            rows.append(np.round(np.concatenate(padded, axis=1)[:, :-_GAP]).astype(np.uint8))
        width = max(row.shape[1] for row in rows)
        images[name] = np.concatenate([np.pad(row, ((0, _GAP), (0, width - row.shape[1]))) for row in rows])[:-_GAP]
    return images
