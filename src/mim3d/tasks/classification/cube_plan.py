"""How large a box classification looks at, planned from the training scans."""

from collections.abc import Sequence
from statistics import median

import numpy as np
import numpy.typing as npt

from mim3d.backbones.contract import round_up
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Spacing, Triple

#: Edge in voxels that a planned box does not exceed.
LARGEST_PLANNED_EDGE = 96

#: Share of the scans that a planned box holds along each axis, in percent.
COVERED_PERCENT = 95

#: A box around labelled structures is larger than they are, so that what lies around them is seen too.
CONTEXT_RATIO = 1.5


def has_labels(scans: Sequence[CachedScan]) -> bool:
    """Whether every scan has a label map with a structure in it."""
    return all(any(len(voxels) for voxels in scan.class_locations.values()) for scan in scans)


def planned_edges_mm(scans: Sequence[CachedScan], around_label: bool) -> Spacing:
    """Edges of a box that holds 95 % of the scans along each axis, or of their labels with what lies around them."""
    ratio = CONTEXT_RATIO if around_label else 1.0
    edges = np.percentile(_extents_mm(scans, around_label), COVERED_PERCENT, axis=0) * ratio
    x, y, z = (round(float(edge), 1) for edge in edges)
    return x, y, z


def planned_size(edges_mm: Spacing, scans: Sequence[CachedScan], multiple: Triple) -> Triple:
    """Voxels of a box, in multiples of an encoder's: those of the median scan, limited along each axis."""
    spacing_mm = [median(scan.spacing_mm[axis] for scan in scans) for axis in range(3)]
    voxels = [edge / voxel for edge, voxel in zip(edges_mm, spacing_mm, strict=True)]
    return round_up(voxels, multiple, LARGEST_PLANNED_EDGE)


def planned_whole_size(scans: Sequence[CachedScan], multiple: Triple) -> Triple:
    """Voxels that the median scan has along each axis, in multiples of an encoder's and limited."""
    voxels = [median(scan.shape[axis] for scan in scans) for axis in range(3)]
    return round_up(voxels, multiple, LARGEST_PLANNED_EDGE)


def covered_ratio(edges_mm: Spacing, scans: Sequence[CachedScan], around_label: bool) -> float:
    """Share of the scans, or of their labels, that a box holds along every axis."""
    inside = _extents_mm(scans, around_label) <= np.array(edges_mm) + 1e-6
    return float(inside.all(axis=1).mean())


def _extents_mm(scans: Sequence[CachedScan], around_label: bool) -> npt.NDArray[np.float64]:
    """(N, 3) extent of each scan, or of what is labelled in it, in millimetres."""
    return np.array([_label_voxels(scan) if around_label else scan.shape for scan in scans]) * np.array(
        [scan.spacing_mm for scan in scans]
    )


def _label_voxels(scan: CachedScan) -> npt.NDArray[np.int64]:
    places = np.concatenate(list(scan.class_locations.values()))
    return np.asarray(np.ptp(places, axis=0) + 1, dtype=np.int64)
