"""Experiment trackers beside ``metrics.jsonl``: TensorBoard, Weights & Biases and MLflow, by one setting each."""

from mim3d.tracking.settings import Tracking
from mim3d.tracking.tracked_run import TrackedRun

__all__ = ["TrackedRun", "Tracking"]
