"""From a scan to label values on its own grid: sliding windows, mirroring, ensembles, and the way back."""

from mim3d.inference.prediction import (
    ProbabilityTarget,
    padding_values,
    predict_prepared,
    predict_scan,
    scores_bytes,
    sliding_logits,
)
from mim3d.inference.readout import HeadedNetwork, Network, Readout, classes_readout, mirrored_logits
from mim3d.inference.windows import Windows, window_weights

__all__ = [
    "HeadedNetwork",
    "Network",
    "ProbabilityTarget",
    "Readout",
    "Windows",
    "classes_readout",
    "mirrored_logits",
    "padding_values",
    "predict_prepared",
    "predict_scan",
    "scores_bytes",
    "sliding_logits",
    "window_weights",
]
