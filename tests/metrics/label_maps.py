"""Scores of a label map, every label by itself."""

from collections.abc import Sequence
from typing import Any

from mim3d.metrics import LabelScore, score_regions


def score_labels(
    prediction: Any, reference: Any, spacing_mm: Any, labels: Sequence[int], **settings: Any
) -> dict[int, LabelScore]:
    """Score each of the labels."""
    return score_regions(prediction, reference, spacing_mm, {label: (label,) for label in labels}, **settings)
