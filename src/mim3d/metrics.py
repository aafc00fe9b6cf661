"""Scores of a label map against its reference, on the scan's own grid and in millimetres."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects

from mim3d.errors import DataError
from mim3d.types import Spacing

Status = Literal["scored", "missed", "invented", "absent"]
Box = tuple[slice, slice, slice]

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

#: What every number in a score file means; written into it.
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
    "means": (
        "per_label averages over cases, std is the deviation over cases (population); mean averages "
        "per_label over labels, so that every label weighs the same. null marks what no case defines."
    ),
}


@dataclass(frozen=True, kw_only=True)
class LabelScore:
    """Scores of one label in one case; None where :data:`CONVENTIONS` leaves a score undefined.

    Attributes:
        status: "scored" (in both masks), "missed" (reference only), "invented" (prediction only), "absent".
        dice: overlap, 0 to 1.
        hd95_mm: 95 % Hausdorff distance.
        nsd: normalised surface distance, 0 to 1.
        volume_ml: volume of the prediction.
        reference_volume_ml: volume of the reference.
        volume_error_ml: absolute difference of the two.
        volume_error_ratio: the same over the reference volume.
    """

    status: Status
    dice: float | None = None
    hd95_mm: float | None = None
    nsd: float | None = None
    volume_ml: float | None = None
    reference_volume_ml: float | None = None
    volume_error_ml: float | None = None
    volume_error_ratio: float | None = None


ABSENT = LabelScore(status="absent")


def score_labels(
    prediction_XYZ: npt.NDArray[Any],
    reference_XYZ: npt.NDArray[Any],
    spacing_mm: Spacing,
    labels: Sequence[int],
    *,
    nsd_tolerance_mm: float = 1.0,
) -> dict[int, LabelScore]:
    """Score each label of a label map.

    Every label is cut out of the scan first, so that the cost follows the size of the organ, not of the scan.

    Args:
        prediction_XYZ: whole numbers from 0, shape (X, Y, Z).
        reference_XYZ: the same grid.
        spacing_mm: voxel size along the three axes.
        labels: values to score, from 1.
        nsd_tolerance_mm: distance up to which two surfaces agree.

    Returns:
        Label value -> scores, in the order of `labels`.

    Raises:
        DataError: the shapes differ, a map holds other than whole numbers from 0, or a label is below 1.
    """
    if min(labels, default=1) < 1:
        raise DataError(f"Label {min(labels)} cannot be scored; labels count from 1, 0 is the background.")
    if prediction_XYZ.shape != reference_XYZ.shape:
        raise DataError(
            f"The prediction has {prediction_XYZ.shape} voxels, but its reference {reference_XYZ.shape}; "
            "score both on one grid."
        )
    # Single-precision headers give 0.99999994 or 1.0000001 mm: a tolerance of 1 mm must not tell them apart.
    x, y, z = (round(float(value), 5) for value in spacing_mm)
    spacing = (x, y, z)
    highest = max(labels, default=0)
    boxes = [_boxes(array, highest) for array in (prediction_XYZ, reference_XYZ)]
    diagonal_mm = float(np.linalg.norm(np.multiply(prediction_XYZ.shape, spacing)))
    scores = {}
    for label in labels:
        box = _joint_box([held[label - 1] for held in boxes])
        if box is None:
            scores[label] = ABSENT
            continue
        prediction, reference = prediction_XYZ[box] == label, reference_XYZ[box] == label
        scores[label] = _score_masks(prediction, reference, spacing, nsd_tolerance_mm, diagonal_mm)
    return scores


def values_in(array: npt.NDArray[Any]) -> list[int]:
    """The label values from 1 that a map of whole numbers holds, sorted."""
    return [value for value, box in enumerate(find_objects(array), start=1) if box is not None]


def _boxes(array: npt.NDArray[Any], highest: int) -> list[Box | None]:
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
) -> LabelScore:
    """Scores of two boolean masks on one grid, at least one of which holds a voxel."""
    num_predicted, num_reference = int(prediction.sum()), int(reference.sum())
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes = {
        "volume_ml": num_predicted * voxel_ml,
        "reference_volume_ml": num_reference * voxel_ml,
        "volume_error_ml": abs(num_predicted - num_reference) * voxel_ml,
        "volume_error_ratio": abs(num_predicted - num_reference) / num_reference if num_reference else None,
    }
    if not num_predicted or not num_reference:
        status: Status = "missed" if num_reference else "invented"
        return LabelScore(status=status, dice=0.0, hd95_mm=diagonal_mm, nsd=0.0, **volumes)
    shared = int((prediction & reference).sum())
    # A ring of background: a mask that touches the border of its box has its surface there.
    padded = torch.from_numpy(np.pad(prediction, 1)), torch.from_numpy(np.pad(reference, 1))
    return LabelScore(
        status="scored",
        dice=2 * shared / (num_predicted + num_reference),
        hd95_mm=_hausdorff_95(*padded, spacing_mm),
        nsd=_surface_dice(*padded, spacing_mm, nsd_tolerance_mm),
        **volumes,
    )


def _hausdorff_95(prediction: torch.Tensor, reference: torch.Tensor, spacing_mm: Spacing) -> float:
    edges = get_mask_edges(prediction, reference, crop=False)
    # MONAI's own percentile (torch.quantile) refuses surfaces of more than 16 million voxels.
    return max(float(np.percentile(distance, 95)) for distance in _distances(edges[0], edges[1], spacing_mm))


def _surface_dice(prediction: torch.Tensor, reference: torch.Tensor, spacing_mm: Spacing, tolerance_mm: float) -> float:
    edges = get_mask_edges(prediction, reference, crop=False, spacing=spacing_mm)
    near, whole = 0.0, 0.0
    distances = _distances(edges[0], edges[1], spacing_mm)
    for edge, area, distance in zip(edges[:2], edges[2:], distances, strict=True):
        areas_mm2 = area[edge].double().numpy()
        near += float(areas_mm2[distance <= tolerance_mm].sum())
        whole += float(areas_mm2.sum())
    return near / whole


def _distances(
    edge: torch.Tensor, other: torch.Tensor, spacing_mm: Spacing
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Distances in millimetres from each surface element to the other surface, both ways."""
    there, back = (
        np.asarray(get_surface_distance(*pair, spacing=spacing_mm)) for pair in ((edge, other), (other, edge))
    )
    return there, back


def summarise(cases: Sequence[Mapping[str, LabelScore]], names: Sequence[str]) -> dict[str, Any]:
    """Means over cases and labels, as :data:`CONVENTIONS` states them.

    Args:
        cases: for each case, label name -> scores.
        names: label names, in the order of the table.

    Returns:
        ``{"mean": {score: value}, "per_label": {name: {score: value, "std": {...}, "num_cases": ...}}}``;
        a value that nothing defines is None.
    """
    per_label: dict[str, dict[str, Any]] = {}
    for name in names:
        scores = [case[name] for case in cases]
        columns = {key: [getattr(score, key) for score in scores] for key in SCORE_NAMES}
        counts = Counter(score.status for score in scores)
        per_label[name] = {
            **{key: _mean(values) for key, values in columns.items()},
            "std": {key: _std(values) for key, values in columns.items()},
            "num_cases": len(scores) - counts["absent"],
            **{f"num_{status}": counts[status] for status in ("missed", "invented", "absent")},
        }
    means = {key: _mean([per_label[name][key] for name in names]) for key in SCORE_NAMES}
    return {"mean": means, "per_label": per_label}


def _mean(values: Sequence[float | None]) -> float | None:
    known = list(_known(values))
    return float(np.mean(known)) if known else None


def _std(values: Sequence[float | None]) -> float | None:
    known = list(_known(values))
    return float(np.std(known)) if known else None


def _known(values: Sequence[float | None]) -> Iterator[float]:
    return (value for value in values if value is not None)
