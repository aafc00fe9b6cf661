"""Lesions one by one: which of them were found, and what was found where there is none.

Terms and choices follow Maier-Hein et al. 2024 (Metrics Reloaded): a localisation criterion says which pairs of
components overlap enough, an assignment strategy says which of these count.
"""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError
from mim3d.metrics.bootstrap import Floats, plain
from mim3d.scans.components import find_components

Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

CONVENTIONS = {
    "lesions": (
        "A lesion is a connected component of a label's mask (26 neighbours). Components smaller than lesion_min_ml "
        "are no lesions, in either map; a predicted lesion that touches only reference components left out for "
        "their size counts neither as true nor as false."
    ),
    "lesion_overlap": (
        "A reference lesion and a predicted one match where they share a voxel (lesion_overlap 0), or where their "
        "intersection over union is at least lesion_overlap."
    ),
    "lesion_matching": (
        "many: a reference lesion is detected if any predicted lesion matches it, and a predicted one is true if it "
        "matches any reference lesion, so that one may count for several. one_to_one: each counts for one at most; of "
        "all assignments the one with most pairs, then the greatest sum of intersections over union, is taken."
    ),
    "lesion_scores": (
        "sensitivity: detected of all reference lesions; precision: true of all predicted lesions; f1: their harmonic "
        "mean, 0 where one is 0 or only one is defined. Per label these are taken over the lesions of all cases "
        "together. dice: mean over reference lesions of the Dice between a lesion and all predicted lesions "
        "that match it (one_to_one: its partner), 0 if undetected. false_positives_per_scan: false predicted lesions "
        "over all scored cases. Without a reference lesion sensitivity and dice are null, without a predicted one "
        "precision is, without either f1 is too."
    ),
}


@dataclass(frozen=True, kw_only=True)
class LesionSettings:
    """When lesions match.

    Attributes:
        overlap: Least intersection over union of two lesions that match; 0 asks for one shared voxel.
        matching: Whether a lesion may count for several others.
        min_ml: Components smaller than this are no lesions.
    """

    overlap: float = 0.0
    matching: Literal["many", "one_to_one"] = "many"
    min_ml: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 1:
            raise ConfigError(f"lesion_overlap is {self.overlap}, but an intersection over union lies from 0 to 1.")
        if not 0 <= self.min_ml < float("inf"):
            raise ConfigError(f"lesion_min_ml is {self.min_ml}, but it takes a volume in ml from 0.")


@dataclass(frozen=True, kw_only=True)
class LesionScore:
    """Lesions of one label in one case.

    Attributes:
        num_reference: Lesions of the reference.
        num_predicted: Lesions of the prediction that are true or false.
        num_detected: Reference lesions that were found.
        num_true: Predicted lesions that match.
        sensitivity: Num_detected of num_reference.
        precision: Num_true of num_predicted.
        f1: Harmonic mean of the two.
        false_positives: Predicted lesions that do not match.
        dice: Mean over reference lesions.
        reference_ml: Volume of each reference lesion.
        reference_dice: Dice of each reference lesion, in the same order.
    """

    num_reference: int = 0
    num_predicted: int = 0
    num_detected: int = 0
    num_true: int = 0
    sensitivity: float | None = None
    precision: float | None = None
    f1: float | None = None
    false_positives: int = 0
    dice: float | None = None
    reference_ml: tuple[float, ...] = ()
    reference_dice: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Overlaps:
    """Pairs of components that share voxels: reference and predicted number, shared voxels, and both sizes."""

    reference: Ints
    predicted: Ints
    shared: Ints
    reference_sizes: Ints
    predicted_sizes: Ints

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each pair."""
        return self.shared / (self.reference_sizes[self.reference] + self.predicted_sizes[self.predicted] - self.shared)

    def only(self, keep: npt.NDArray[np.bool_]) -> "_Overlaps":
        """The pairs that `keep` marks."""
        return replace(self, reference=self.reference[keep], predicted=self.predicted[keep], shared=self.shared[keep])


def score_lesions(
    prediction_XYZ: Mask, reference_XYZ: Mask, voxel_ml: float, settings: LesionSettings = LesionSettings()
) -> LesionScore:
    """Match the lesions of two masks, as :data:`CONVENTIONS` says.

    Args:
        prediction_XYZ: Shape (X, Y, Z).
        reference_XYZ: The same grid.
        voxel_ml: Volume of a voxel.
        settings: Rules by which lesions match.
    """
    ours, num_ours = find_components(prediction_XYZ)
    theirs, num_theirs = find_components(reference_XYZ)
    both = prediction_XYZ & reference_XYZ
    pairs, shared = np.unique(theirs[both].astype(np.int64) * (num_ours + 1) + ours[both], return_counts=True)
    overlaps = _Overlaps(
        reference=pairs // (num_ours + 1),
        predicted=pairs % (num_ours + 1),
        shared=shared,
        reference_sizes=np.bincount(theirs.ravel(), minlength=num_theirs + 1),
        predicted_sizes=np.bincount(ours.ravel(), minlength=num_ours + 1),
    )
    # A hair less, so that a lesion of exactly the least size is one whatever the rounding of the spacing.
    least = settings.min_ml / voxel_ml * (1 - 1e-6)
    is_reference, is_predicted = overlaps.reference_sizes >= least, overlaps.predicted_sizes >= least
    touching = overlaps.only(is_predicted[overlaps.predicted])
    counted = touching.only(is_reference[touching.reference])
    neutral = np.setdiff1d(touching.predicted, counted.predicted)
    # Sizes of no voxel at all (number 0 is the background) never count.
    is_reference[0] = is_predicted[0] = False
    is_predicted[neutral] = False
    matched = counted.only(counted.iou >= settings.overlap)
    if settings.matching == "one_to_one":
        matched = matched.only(_assigned(matched))
    # Dice of every reference lesion with all that match it; 0 without a match.
    sizes_of_matches = matched.predicted_sizes[matched.predicted]
    shared, found = (
        np.bincount(matched.reference, weights=weights, minlength=num_theirs + 1)
        for weights in (matched.shared, sizes_of_matches)
    )
    numbers = np.flatnonzero(is_reference)
    dice = (2 * shared / np.maximum(overlaps.reference_sizes + found, 1))[numbers].tolist()
    num_reference, num_predicted = int(is_reference.sum()), int(is_predicted.sum())
    num_detected, num_true = len(np.unique(matched.reference)), len(np.unique(matched.predicted))
    rates = detection_rates(num_reference, num_predicted, num_detected, num_true)
    sensitivity, precision, f1 = (plain(float(rate)) for rate in rates)
    return LesionScore(
        num_reference=num_reference,
        num_predicted=num_predicted,
        num_detected=num_detected,
        num_true=num_true,
        sensitivity=sensitivity,
        precision=precision,
        f1=f1,
        false_positives=num_predicted - num_true,
        dice=float(np.mean(dice)) if num_reference else None,
        reference_ml=tuple((overlaps.reference_sizes[numbers] * voxel_ml).tolist()),
        reference_dice=tuple(dice),
    )


def detection_rates(
    num_reference: npt.ArrayLike, num_predicted: npt.ArrayLike, num_detected: npt.ArrayLike, num_true: npt.ArrayLike
) -> tuple[Floats, Floats, Floats]:
    """Sensitivity, precision and F1 of counts of any one shape; NaN where :data:`CONVENTIONS` says null."""
    references, predictions, detected, true = (
        np.asarray(counts, dtype=np.float64) for counts in (num_reference, num_predicted, num_detected, num_true)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, precision = detected / references, true / predictions
        both = np.nan_to_num(sensitivity) + np.nan_to_num(precision)
        f1 = np.where(both > 0, 2 * np.nan_to_num(sensitivity) * np.nan_to_num(precision) / both, 0.0)
    return sensitivity, precision, np.where((references > 0) | (predictions > 0), f1, np.nan)


def _assigned(pairs: _Overlaps) -> npt.NDArray[np.bool_]:
    """Which pairs the best one-to-one assignment takes (Kuhn 1955), group by group of lesions that are linked."""
    from scipy.optimize import linear_sum_assignment
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    taken = np.zeros(len(pairs.shared), dtype=bool)
    if not len(taken):
        return taken
    size = len(pairs.reference_sizes) + len(pairs.predicted_sizes)
    links = (np.ones(len(taken)), (pairs.reference, len(pairs.reference_sizes) + pairs.predicted))
    _, group_of = connected_components(coo_array(links, shape=(size, size)), directed=False)
    groups = group_of[pairs.reference]
    iou = pairs.iou
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        rows, row = np.unique(pairs.reference[members], return_inverse=True)
        columns, column = np.unique(pairs.predicted[members], return_inverse=True)
        gain = np.zeros((len(rows), len(columns)))
        # No sum of ratios outweighs one more pair.
        gain[row, column] = len(members) + iou[members]
        chosen = np.zeros(gain.shape, dtype=bool)
        chosen[linear_sum_assignment(gain, maximize=True)] = True
        taken[members] = chosen[row, column]
    return taken
