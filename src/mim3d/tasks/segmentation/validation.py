"""Quick validation of a segmenter: Dice on the grid of the cache, which chooses the best weights."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mim3d.caching.scan import CachedScan
from mim3d.inference import Windows, padding_values, sliding_logits
from mim3d.scans.intensity import Intensity
from mim3d.tasks.segmentation.targets import Targets, annotated_values


def dice_of_scans(
    objective: Any,
    scans: Sequence[CachedScan],
    intensity: Intensity,
    windows: Windows,
    labels: Mapping[int, str],
) -> dict[str, float]:
    """Return the mean Dice of every label or region and over them.

    A structure that is in neither map of a scan is left out there, and so is one that a scan has no
    annotations of; the mean over structures leaves out those that no scan shows.

    Args:
        objective: A module with ``targets`` and ``logits``, in evaluation mode.
        scans: Labelled scans of the cache.
        intensity: Mapping of stored intensities to network input.
        windows: How the scans are covered.
        labels: Label value -> name.

    Returns:
        ``dice``, and ``dice/<name>`` per structure that was seen.
    """
    targets: Targets = objective.targets
    scores: dict[str, list[float]] = {name: [] for name in targets.structures}
    for scan in scans:
        logits = sliding_logits(
            objective.logits,
            torch.from_numpy(intensity.apply(scan.to_values(scan.read((0, 0, 0), scan.shape)), scan.statistics)),
            windows,
            padding=padding_values(intensity, scan.statistics),
            device=next(objective.parameters()).device,
        )
        predicted = targets.labels_of(targets.probabilities(logits)).numpy()
        reference = scan.read_label((0, 0, 0), scan.shape)
        known = annotated_values(scan.case, labels)
        structures = {
            name: members for name, members in targets.structures.items() if known is None or known.issuperset(members)
        }
        for name, dice in dice_by_name(predicted, reference, structures, targets.ignore_label).items():
            if not math.isnan(dice):
                scores[name].append(dice)
    means = {name: float(np.mean(values)) for name, values in scores.items() if values}
    named = {f"dice/{name}": dice for name, dice in means.items()}
    return {"dice": float(np.mean(list(means.values()))) if means else 0.0, **named}


def dice_by_name(
    predicted: np.ndarray,
    reference: np.ndarray,
    structures: Mapping[str, Sequence[int]],
    ignore_label: int | None = None,
) -> dict[str, float]:
    """Return the Dice of each structure between two maps of one shape; NaN where neither holds it.

    Args:
        predicted: Label values.
        reference: Label values.
        structures: Name -> label values that belong to it.
        ignore_label: Label value of the reference where nothing is counted.
    """
    if ignore_label is not None:
        known = reference != ignore_label
        predicted, reference = predicted[known], reference[known]
    values = sorted({value for members in structures.values() for value in members})
    place = {value: index for index, value in enumerate(values, start=1)}
    # How often each pair of values meets says all there is to count, in one pass whatever the structures.
    number = len(values) + 1
    pairs = np.bincount(_places(predicted, values) * number + _places(reference, values), minlength=number**2)
    counts, dice = pairs.reshape(number, number), {}
    for name, members in structures.items():
        own = [place[value] for value in members]
        both, total = counts[np.ix_(own, own)].sum(), counts[own].sum() + counts[:, own].sum()
        dice[name] = float(2 * both / total) if total else math.nan
    return dice


def _places(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return a flat map of label values as places in ``values``, counted from 1; all others are 0."""
    table = np.zeros(max([int(label.max(initial=0)), *values]) + 1, dtype=np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    places: np.ndarray = table[label.ravel()]
    return places
