"""Surfaces of masks: where they lie, how large they are, and how far they are from each other.

Masks are worked on in slabs of planes and surfaces kept as lists of points, so that memory stays at a few bytes for a
voxel of the box around a label, whatever the size of the scan.
"""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing

#: Voxels that a slab of planes has at most, if a single plane has not more.
SLAB_VOXELS = 2**23

#: Points whose distance is asked for at a time.
_POINTS_AT_ONCE = 2**20

Points = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


def hausdorff_95(prediction_XYZ: Mask, reference_XYZ: Mask, spacing_mm: Spacing) -> float:
    """The 95th percentile of surface distances, the larger of the two directions (Huttenlocher 1993), in mm.

    Args:
        prediction_XYZ: A mask that holds a voxel.
        reference_XYZ: Another on the same grid.
        spacing_mm: Voxel size along the three axes.
    """
    surfaces = [_surface_voxels(mask) for mask in (prediction_XYZ, reference_XYZ)]
    there = _nearest_mm(surfaces[0], surfaces[1], prediction_XYZ.shape, spacing_mm)
    back = _nearest_mm(surfaces[1], surfaces[0], prediction_XYZ.shape, spacing_mm)
    return max(float(np.percentile(distances, 95)) for distances in (there, back))


def surface_dice(prediction_XYZ: Mask, reference_XYZ: Mask, spacing_mm: Spacing, tolerance_mm: float) -> float:
    """Share of both surfaces, by area, within a tolerance of the other one (Nikolov et al. 2021).

    Args:
        prediction_XYZ: A mask that holds a voxel.
        reference_XYZ: Another on the same grid.
        spacing_mm: Voxel size along the three axes.
        tolerance_mm: Distance up to which two surfaces agree.
    """
    elements = [_surface_elements(mask, spacing_mm) for mask in (prediction_XYZ, reference_XYZ)]
    # Elements lie at the corners of voxels, of which there is one more along each axis.
    shape = tuple(size + 1 for size in prediction_XYZ.shape)
    near = whole = 0.0
    for (points, areas_mm2), (others, _) in (elements, elements[::-1]):
        distances_mm = _nearest_mm(points, others, shape, spacing_mm)
        near += float(areas_mm2[distances_mm <= tolerance_mm].sum())
        whole += float(areas_mm2.sum())
    return near / whole


def _slabs(num_planes: int, plane_voxels: int) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB_VOXELS // max(plane_voxels, 1))
    return ((start, min(start + step, num_planes)) for start in range(0, num_planes, step))


def _surface_voxels(mask: Mask) -> Points:
    """Indices (N, 3) of the voxels with a face neighbour outside the mask; outside the array counts as outside."""
    held = np.pad(mask, 1)
    found = []
    for start, stop in _slabs(mask.shape[0], mask[:1].size):
        middle = held[start + 1 : stop + 1, 1:-1, 1:-1]
        inside = held[start:stop, 1:-1, 1:-1] & held[start + 2 : stop + 2, 1:-1, 1:-1]
        planes = held[start + 1 : stop + 1]
        inside &= planes[:, :-2, 1:-1] & planes[:, 2:, 1:-1]
        inside &= planes[:, 1:-1, :-2] & planes[:, 1:-1, 2:]
        found.append(np.argwhere(middle & ~inside) + np.array([start, 0, 0]))
    return np.concatenate(found)


def _surface_elements(mask: Mask, spacing_mm: Spacing) -> tuple[Points, npt.NDArray[np.float64]]:
    """Where (N, 3) the surface passes through a 2 x 2 x 2 neighbourhood, and its area (N,) there in mm2."""
    held = np.pad(mask, 1).view(np.uint8)
    x, y, z = (size + 1 for size in mask.shape)
    areas_of = _areas_mm2(spacing_mm)
    points, areas = [], []
    for start, stop in _slabs(x, y * z):
        code = np.zeros((stop - start, y, z), dtype=np.uint8)
        for bit, (i, j, k) in enumerate(np.ndindex(2, 2, 2)):
            code |= held[start + i : stop + i, j : j + y, k : k + z] << (7 - bit)
        is_surface = (code != 0) & (code != 255)
        points.append(np.argwhere(is_surface) + np.array([start, 0, 0]))
        areas.append(areas_of[code[is_surface]])
    return np.concatenate(points), np.concatenate(areas)


@functools.lru_cache(maxsize=64)
def _areas_mm2(spacing_mm: Spacing) -> npt.NDArray[np.float64]:
    """Area (256,) of the surface in a 2 x 2 x 2 neighbourhood, by the bits of its voxels (marching cubes)."""
    from monai.metrics.utils import get_code_to_measure_table

    table, _ = get_code_to_measure_table(spacing_mm)  # type: ignore[no-untyped-call]
    return np.asarray(table, dtype=np.float64)


def _nearest_mm(points: Points, others: Points, shape: tuple[int, ...], spacing_mm: Spacing) -> npt.NDArray[np.float32]:
    """Distance (N,) from each point (N, 3) to the nearest of the others (M, 3)."""
    from scipy.spatial import KDTree

    distances = np.zeros(len(points), dtype=np.float32)
    # Where surfaces coincide, which is most of a good prediction, no search is needed.
    apart = ~np.isin(np.ravel_multi_index(tuple(points.T), shape), np.ravel_multi_index(tuple(others.T), shape))
    if not apart.any():
        return distances
    tree = KDTree(others * np.array(spacing_mm), leafsize=32)
    asked = np.flatnonzero(apart)
    for start in range(0, len(asked), _POINTS_AT_ONCE):
        some = asked[start : start + _POINTS_AT_ONCE]
        # Single precision takes the last digits off, so that ten voxels of 0.1 mm lie within 1 mm.
        distances[some] = tree.query(points[some] * np.array(spacing_mm))[0]
    return distances
