"""Scores of a label map against its reference, on the scan's own grid and in millimetres."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.types import Spacing
from mim3d.metrics.lesions import LesionScore, LesionSettings, score_lesions
from mim3d.metrics.surfaces import hausdorff_95, surface_dice

Status = Literal["scored", "missed", "invented", "absent"]
Box = tuple[slice, slice, slice]
Key = TypeVar("Key", bound=Hashable)

#: Scores that enter the means, in the order of the tables.
SCORE_NAMES = (
    "dice",
    "hd95_mm",
    "nsd",
    "volume_ml",
    "reference_volume_ml",
    "volume_error_ml",
    "volume_error_ratio",
)

#: What every number means; written into a file of scores.
CONVENTIONS = {
    "grid": ("Scores are taken voxel by voxel on the scan's own grid; distances are in millimetres along its axes."),
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
    "absent": "Label in neither mask: all scores null, left out of every mean, counted as num_absent.",
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


def score_labels(
    prediction_XYZ: npt.NDArray[Any],
    reference_XYZ: npt.NDArray[Any],
    spacing_mm: Spacing,
    labels: Sequence[int],
    *,
    nsd_tolerance_mm: float = 1.0,
) -> dict[int, LabelScore]:
    """Score each label of a label map: :func:`score_regions` with a region for each of `labels`, from 1."""
    regions = {label: (label,) for label in labels}
    return score_regions(prediction_XYZ, reference_XYZ, spacing_mm, regions, nsd_tolerance_mm=nsd_tolerance_mm)


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
    boxes = [_boxes(array, highest) for array in (prediction_XYZ, reference_XYZ)]
    diagonal_mm = float(np.linalg.norm(np.multiply(prediction_XYZ.shape, spacing)))
    scores = {}
    for key, members in regions.items():
        asked = lesions if lesions_of is None or key in lesions_of else None
        box = _joint_box([held[value - 1] for held in boxes for value in members])
        if box is None:
            scores[key] = ABSENT if asked is None else LabelScore(status="absent", lesions=LesionScore())
            continue
        prediction, reference = _mask(prediction_XYZ[box], members), _mask(reference_XYZ[box], members)
        scores[key] = _score_masks(prediction, reference, spacing, nsd_tolerance_mm, diagonal_mm, asked)
    return scores


def values_in(array: npt.NDArray[Any]) -> list[int]:
    """The label values from 1 that a map of whole numbers holds, sorted."""
    from scipy.ndimage import find_objects

    return [value for value, box in enumerate(find_objects(array), start=1) if box is not None]


def _mask(array: npt.NDArray[Any], members: Sequence[int]) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = array == members[0]
    for value in members[1:]:
        mask |= array == value
    return mask


def _boxes(array: npt.NDArray[Any], highest: int) -> list[Box | None]:
    from scipy.ndimage import find_objects

    if not np.issubdtype(array.dtype, np.integer) or (array.size and int(array.min()) < 0):
        raise DataError(f"A label map holds whole numbers from 0; this one holds others ({array.dtype}).")
    boxes: list[Box | None] = find_objects(array, max_label=highest) if highest else []
    return boxes


def _joint_box(boxes: Sequence[Box | None]) -> Box | None:
    """The smallest box around all of these, or None where there is none."""
    held = [box for box in boxes if box is not None]
    if not held:
        return None
    x, y, z = (
        slice(min(side.start for side in sides), max(side.stop for side in sides)) for sides in zip(*held, strict=True)
    )
    return x, y, z


def _score_masks(
    prediction: npt.NDArray[np.bool_],
    reference: npt.NDArray[np.bool_],
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
