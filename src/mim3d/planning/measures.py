"""What the voxels of one scan tell a plan: intensities inside the labelled structures, and sizes of those."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import Statistics, class_counts_of
from mim3d.core.types import Spacing
from mim3d.scans.components import find_components

#: Labelled voxels of each scan whose intensities are looked at: every scan counts alike, whatever its structures' size.
MAX_CLASS_VOXELS = 10_000


@dataclass(frozen=True, kw_only=True)
class ClassMeasures:
    """One structure in one scan.

    Attributes:
        volume_ml: All of its voxels together.
        num_components: Parts of it that do not touch, not even at a corner.
        extent_mm: Of the box around all of it, along X, Y, Z.
    """

    volume_ml: float
    num_components: int
    extent_mm: Spacing


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanMeasures:
    """What was measured in one scan.

    Attributes:
        statistics: Of each channel.
        class_voxels: (C, N) float32 intensities of about 10,000 voxels at most, evenly spaced over all that have a
            label above 0; N is 0 without such voxels.
        classes: Label value above 0 -> its measures.
        foreground_ratio: Share of the scan's voxels with a label above 0.
    """

    statistics: tuple[Statistics, ...]
    class_voxels: npt.NDArray[np.float32]
    classes: dict[int, ClassMeasures]
    foreground_ratio: float


def measure_scan(
    image_CXYZ: npt.NDArray[Any],
    label_XYZ: npt.NDArray[Any] | None,
    spacing_mm: Spacing,
    statistics: Sequence[Statistics],
    ignore_label: int | None = None,
) -> ScanMeasures:
    """Measure a scan on its RAS+ grid.

    Args:
        image_CXYZ: (C, X, Y, Z) in source units.
        label_XYZ: (X, Y, Z) label values; None for a scan without.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Of each channel.
        ignore_label: Value of voxels that belong to no structure.
    """
    if label_XYZ is None:
        nothing = np.empty((len(image_CXYZ), 0), dtype=np.float32)
        return ScanMeasures(statistics=tuple(statistics), class_voxels=nothing, classes={}, foreground_ratio=0.0)
    if ignore_label is not None:
        label_XYZ = np.where(label_XYZ == ignore_label, 0, label_XYZ)
    places = np.flatnonzero(label_XYZ)
    kept = places[:: max(1, len(places) // MAX_CLASS_VOXELS)]
    return ScanMeasures(
        statistics=tuple(statistics),
        class_voxels=np.stack([channel.ravel()[kept] for channel in image_CXYZ]).astype(np.float32),
        classes=_measure_classes(label_XYZ, spacing_mm),
        foreground_ratio=len(places) / label_XYZ.size,
    )


def _measure_classes(label_XYZ: npt.NDArray[Any], spacing_mm: Spacing) -> dict[int, ClassMeasures]:
    from scipy.ndimage import find_objects

    num_voxels = class_counts_of(label_XYZ).sum(axis=0)
    measures = {}
    for value, box in enumerate(find_objects(label_XYZ), start=1):
        if box is None:
            continue
        _, num_components = find_components(label_XYZ[box] == value)
        x, y, z = ((axis.stop - axis.start) * mm for axis, mm in zip(box, spacing_mm, strict=True))
        measures[value] = ClassMeasures(
            volume_ml=int(num_voxels[value]) * math.prod(spacing_mm) / 1000,
            num_components=num_components,
            extent_mm=(x, y, z),
        )
    return measures
