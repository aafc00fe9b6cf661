"""Quick validation of a segmenter: Dice on the grid of the cache, which chooses the best weights."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mim3d.data.cache import CachedScan
from mim3d.data.transforms import Intensity
from mim3d.inference import Windows, padding_values, sliding_logits
from mim3d.tasks.segmentation_objective import SegmentationObjective


def dice_of_scans(
    objective: SegmentationObjective,
    scans: Sequence[CachedScan],
    intensity: Intensity,
    windows: Windows,
    labels: Mapping[int, str],
) -> dict[str, float]:
    """Mean Dice of every label and over the labels.

    A label that is in neither map of a scan says nothing there and is left out; the mean over labels leaves out labels
    that no scan shows.

    Args:
        objective: in evaluation mode.
        scans: labelled scans of the cache.
        intensity: mapping of stored intensities to network input.
        windows: how the scans are covered.
        labels: label value -> name.
    Returns:
        ``dice``, and ``dice/<name>`` per label that was seen.
    """
    device = next(objective.parameters()).device
    scores: dict[int, list[float]] = {value: [] for value in objective.label_values[1:]}
    for scan in scans:
        image = intensity.apply(scan.to_values(scan.read((0, 0, 0), scan.shape)), scan.statistics)
        logits = sliding_logits(
            objective.logits,
            torch.from_numpy(image),
            windows,
            padding=padding_values(intensity, scan.statistics),
            device=device,
        )
        predicted = np.array(objective.label_values)[logits.argmax(0).numpy()]
        for value, dice in dice_per_label(predicted, scan.read_label((0, 0, 0), scan.shape), list(scores)).items():
            if not math.isnan(dice):
                scores[value].append(dice)
    means = {value: float(np.mean(values)) for value, values in scores.items() if values}
    named = {f"dice/{labels.get(value, value)}": dice for value, dice in means.items()}
    return {"dice": float(np.mean(list(means.values()))) if means else 0.0, **named}


def dice_per_label(predicted: np.ndarray, reference: np.ndarray, values: Sequence[int]) -> dict[int, float]:
    """Dice of each label value between two maps of one shape; NaN where neither holds it."""
    top = max(int(predicted.max(initial=0)), int(reference.max(initial=0)), *values) + 1
    in_both = np.bincount(predicted[predicted == reference].ravel(), minlength=top)
    in_either = np.bincount(predicted.ravel(), minlength=top) + np.bincount(reference.ravel(), minlength=top)
    return {value: 2 * in_both[value] / in_either[value] if in_either[value] else math.nan for value in values}
