"""Scores of a label map against its reference, on the scan's own grid and in millimetres.

Areas are found in slabs of planes and surfaces kept as lists of points, so that memory stays at a few bytes for a voxel
of the box around a label, whatever the size of the scan.
"""

import functools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.types import Spacing
from mim3d.metrics.lesions import LesionScore, LesionSettings, Mask, score_lesions

Status = Literal["scored", "missed", "invented", "absent"]
Key = TypeVar("Key", bound=Hashable)
Points = npt.NDArray[np.int64]

#: Voxels that a slab of planes has at most, if a single plane has not more.
SLAB_VOXELS = 2**23
#: Points whose distance is asked for at a time.
_POINTS_AT_ONCE = 2**20

#: Scores that enter the means, in the order of the tables.
SCORE_NAMES = ("dice", "hd95_mm", "nsd", "volume_ml", "reference_volume_ml", "volume_error_ml", "volume_error_ratio")

#: What every number means; written into a file of scores.
CONVENTIONS = {
    "grid": "Scores are taken voxel by voxel on the scan's own grid; distances are in millimetres along its axes.",
    "dice": "2 |P and R| / (|P| + |R|), P the predicted and R the reference voxels of the label.",
    "hd95_mm": (
        "95th percentile of the distances from each surface voxel of one mask to the nearest surface voxel "
        "of the other, the larger of the two directions (lower is better). A surface voxel has a face "
        "neighbour outside its mask; outside the scan counts as outside."
    ),
    "nsd": (
        "Normalised surface distance (surface Dice): share of both surfaces, weighted by area in mm2 "
        "(marching cubes), within nsd_tolerance_mm of the other surface (higher is better)."
    ),
    "volume_error": (
        "volume_error_ml = |volume_ml - reference_volume_ml|; volume_error_ratio is its share of the latter."
    ),
    "absent": (
        "Label in neither mask, or one that the list of references has no annotations of (its column labels): all "
        "scores null, left out of every mean, counted as num_absent."
    ),
    "missed": (
        "Label in the reference only: Dice 0, NSD 0, HD95 the diagonal of the scan, volume_error_ratio 1; "
        "in the means, counted as num_missed."
    ),
    "invented": (
        "Label in the prediction only: Dice 0, NSD 0, HD95 the diagonal of the scan, volume_error_ratio null "
        "(no reference volume to divide by); in the means, counted as num_invented."
    ),
}


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """Scores of one label or region in one case; None where :data:`CONVENTIONS` leaves a score undefined.

    Attributes:
        status: "scored" (in both masks), "missed" (reference only), "invented" (prediction only), "absent".
        dice: Overlap, 0 to 1.
        hd95_mm: 95 % Hausdorff distance.
        nsd: Normalised surface distance, 0 to 1.
        volume_ml: Volume of the prediction.
        reference_volume_ml: Volume of the reference.
        volume_error_ml: Absolute difference of the two.
        volume_error_ratio: The same over the reference volume.
        lesions: Its lesions one by one, where they were asked for.
    """

    status: Status
    dice: float | None = None
    hd95_mm: float | None = None
    nsd: float | None = None
    volume_ml: float | None = None
    reference_volume_ml: float | None = None
    volume_error_ml: float | None = None
    volume_error_ratio: float | None = None
    lesions: LesionScore | None = None


ABSENT = LabelScore(status="absent")


def score_regions(
    prediction_XYZ: npt.NDArray[Any],
    reference_XYZ: npt.NDArray[Any],
    spacing_mm: Spacing,
    regions: Mapping[Key, Sequence[int]],
    *,
    nsd_tolerance_mm: float = 1.0,
    lesions: LesionSettings | None = None,
    lesions_of: Collection[Key] | None = None,
) -> dict[Key, LabelScore]:
    """Score unions of labels, such as the whole tumour.

    Every region is cut out of the scan first, so that time and memory follow the size of the organ, not of the scan.

    Args:
        prediction_XYZ: Whole numbers from 0, shape (X, Y, Z).
        reference_XYZ: The same grid.
        spacing_mm: Voxel size along the three axes.
        regions: Label values, from 1, that each region is made of.
        nsd_tolerance_mm: Distance up to which two surfaces agree.
        lesions: Rules by which lesions match; None leaves lesions out.
        lesions_of: The regions whose lesions are scored; all of them if None.

    Returns:
        Scores of each region, in the order of `regions`.

    Raises:
        DataError: The shapes differ, a map holds other than whole numbers from 0, or a label is below 1.
    """
    from scipy.ndimage import find_objects

    values = [value for members in regions.values() for value in members]
    if min(values, default=1) < 1:
        raise DataError(f"Label {min(values)} cannot be scored; labels count from 1, 0 is the background.")
    if prediction_XYZ.shape != reference_XYZ.shape:
        raise DataError(
            f"The prediction has {prediction_XYZ.shape} voxels, but its reference {reference_XYZ.shape}; "
            "score both on one grid."
        )
    # Single-precision headers give 0.99999994 or 1.0000001 mm: a tolerance of 1 mm must not tell them apart.
    x, y, z = (round(float(value), 5) for value in spacing_mm)
    spacing = (x, y, z)
    highest = max(values, default=0)
    boxes: list[list[tuple[slice, ...] | None]] = []
    for array in (prediction_XYZ, reference_XYZ):
        if not np.issubdtype(array.dtype, np.integer) or (array.size and int(array.min()) < 0):
            raise DataError(f"A label map holds whole numbers from 0; this one holds others ({array.dtype}).")
        boxes.append(find_objects(array, max_label=highest) if highest else [])
    diagonal_mm = float(np.linalg.norm(np.multiply(prediction_XYZ.shape, spacing)))
    scores = {}
    for key, members in regions.items():
        asked = lesions if lesions_of is None or key in lesions_of else None
        held = [box for of_map in boxes for value in members if (box := of_map[value - 1]) is not None]
        if not held:
            scores[key] = ABSENT if asked is None else LabelScore(status="absent", lesions=LesionScore())
            continue
        around = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*held, strict=True))
        prediction, reference = _mask(prediction_XYZ[around], members), _mask(reference_XYZ[around], members)
        scores[key] = _score_masks(prediction, reference, spacing, nsd_tolerance_mm, diagonal_mm, asked)
    return scores


def values_in(array: npt.NDArray[Any]) -> list[int]:
    """The label values from 1 that a map of whole numbers holds, sorted."""
    from scipy.ndimage import find_objects

    return [value for value, box in enumerate(find_objects(array), start=1) if box is not None]


def _mask(array: npt.NDArray[Any], members: Sequence[int]) -> Mask:
    mask: Mask = array == members[0]
    for value in members[1:]:
        mask |= array == value
    return mask


def _score_masks(
    prediction: Mask,
    reference: Mask,
    spacing_mm: Spacing,
    nsd_tolerance_mm: float,
    diagonal_mm: float,
    lesions: LesionSettings | None,
) -> LabelScore:
    """Scores of two boolean masks on one grid, at least one of which holds a voxel."""
    num_predicted, num_reference = int(prediction.sum()), int(reference.sum())
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    shared = {
        "volume_ml": num_predicted * voxel_ml,
        "reference_volume_ml": num_reference * voxel_ml,
        "volume_error_ml": abs(num_predicted - num_reference) * voxel_ml,
        "volume_error_ratio": abs(num_predicted - num_reference) / num_reference if num_reference else None,
    }
    found = None if lesions is None else score_lesions(prediction, reference, voxel_ml, lesions)
    if not num_predicted or not num_reference:
        status: Status = "missed" if num_reference else "invented"
        return LabelScore(status=status, dice=0.0, hd95_mm=diagonal_mm, nsd=0.0, lesions=found, **shared)
    return LabelScore(
        status="scored",
        dice=2 * int((prediction & reference).sum()) / (num_predicted + num_reference),
        hd95_mm=hausdorff_95(prediction, reference, spacing_mm),
        nsd=surface_dice(prediction, reference, spacing_mm, nsd_tolerance_mm),
        lesions=found,
        **shared,
    )


def hausdorff_95(prediction_XYZ: Mask, reference_XYZ: Mask, spacing_mm: Spacing) -> float:
    """The 95th percentile of surface distances, the larger of the two directions (Huttenlocher 1993), in mm.

    Args:
        prediction_XYZ: A mask that holds a voxel.
        reference_XYZ: Another on the same grid.
        spacing_mm: Voxel size along the three axes.
    """
    from scipy.ndimage import binary_erosion

    # The voxels with a face neighbour outside their mask; outside the array counts as outside.
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) for mask in (prediction_XYZ, reference_XYZ)]
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


def _surface_elements(mask: Mask, spacing_mm: Spacing) -> tuple[Points, npt.NDArray[np.float64]]:
    """Where (N, 3) the surface passes through a 2 x 2 x 2 neighbourhood, and its area (N,) there in mm2."""
    held = np.pad(mask, 1).view(np.uint8)
    x, y, z = (size + 1 for size in mask.shape)
    areas_of = _areas_mm2(spacing_mm)
    points, areas = [], []
    step = max(1, SLAB_VOXELS // (y * z))
    for start in range(0, x, step):
        stop = min(start + step, x)
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
