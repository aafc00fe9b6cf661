"""Experiment trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases and MLflow, by one setting each."""

from mim3d.tracking.tracked_run import TrackedRun
from mim3d.tracking.trackers import Tracking

__all__ = ["TrackedRun", "Tracking"]
