"""Scores with units: of label maps, of lesions and of classes, with intervals and paired comparisons."""

from mim3d.metrics import bootstrap, label_scores, lesions, summaries
from mim3d.metrics.bootstrap import Bootstrap
from mim3d.metrics.classification import ClassifiedCases, classification_scores, compare_classes, score_classes
from mim3d.metrics.label_scores import (
    ABSENT,
    SCORE_NAMES,
    LabelScore,
    Status,
    score_regions,
    values_in,
)
from mim3d.metrics.lesions import LesionScore, LesionSettings
from mim3d.metrics.paired import compare_paired
from mim3d.metrics.summaries import summarise

#: What every number in a file of segmentation scores means; written into it.
CONVENTIONS = {
    **label_scores.CONVENTIONS,
    **summaries.CONVENTIONS,
    "ci95": bootstrap.CONVENTION,
    **lesions.CONVENTIONS,
}

__all__ = [
    "ABSENT",
    "CONVENTIONS",
    "SCORE_NAMES",
    "Bootstrap",
    "ClassifiedCases",
    "LabelScore",
    "LesionScore",
    "LesionSettings",
    "Status",
    "classification_scores",
    "compare_classes",
    "compare_paired",
    "score_classes",
    "score_regions",
    "summarise",
    "values_in",
]
