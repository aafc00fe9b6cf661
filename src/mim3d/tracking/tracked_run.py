"""A run folder whose metrics and images go to trackers too."""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np

from mim3d.core.files import load_json, write_json
from mim3d.core.run_folder import GO_ON, Run
from mim3d.core.settings import flat, read_yaml
from mim3d.tracking.slices import middle_slices
from mim3d.tracking.trackers import MLflow, SessionInfo, TensorBoard, Tracker, Tracking, WeightsAndBiases

#: File of a run folder: for every tracker the target it wrote to and the id by which it continues there.
IDS_NAME = "tracking.json"

_FOLD = re.compile(r"fold_\d+")


@dataclass(frozen=True)
class TrackedRun(Run):
    """The run of a training loop with its trackers; a context manager around the training.

    A tracker that fails costs a warning, never the run: nothing more is sent to it in this session, while
    ``metrics.jsonl`` has everything.

    Attributes:
        trackers: The trackers that have not failed.
    """

    trackers: list[Tracker] = field(default_factory=list)
    _started: list[Tracker] = field(default_factory=list, init=False)
    _without_images: set[str] = field(default_factory=set, init=False)

    @classmethod
    def of(cls, run: Run, tracking: Tracking) -> Self:
        """The run with the trackers that the settings ask for; only the first process has any."""
        trackers: list[Tracker] = [TensorBoard()] if tracking.tensorboard else []
        if tracking.wandb is not None:
            trackers.append(WeightsAndBiases(tracking.wandb))
        if tracking.mlflow is not None:
            trackers.append(MLflow(tracking.mlflow))
        return cls(run.path, run.command, run.writes, trackers if run.writes else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(failed=error is not None)

    def cut_metrics(self, step: int) -> None:
        """Drop what was written after a step, and start (again) from there at every tracker."""
        super().cut_metrics(step)
        self._finish(failed=False)
        for tracker in list(self.trackers):
            self._attempt(tracker, partial(self._start, tracker, step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics, and send the finite ones to the trackers."""
        super().log(step, values)
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in list(self._started if finite else []):
            self._attempt(tracker, partial(tracker.log, step, finite))

    def save_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write volumes by name, and send their middle slices to the trackers."""
        super().save_pictures(step, pictures)
        receivers = [tracker for tracker in self._started if tracker.name not in self._without_images]
        if receivers:
            images = {f"pictures/{name}": image for name, image in middle_slices(pictures).items()}
            for tracker in receivers:
                self._attempt(tracker, partial(tracker.log_images, step, images), images=True)

    def _start(self, tracker: Tracker, step: int) -> None:
        try:
            ids = load_json(self.path / IDS_NAME)
        except (OSError, ValueError):
            ids = {}
        # A damaged file of ids costs no more than a new run at the tracker.
        ids = ids if isinstance(ids, dict) else {}
        known = ids.get(tracker.name, {})
        parts = self.path.absolute().parts
        session = SessionInfo(
            # A fold goes by the name of the folder around it, too.
            name="/".join(parts[-2:]) if _FOLD.fullmatch(parts[-1]) else parts[-1],
            folder=self.path,
            parameters=flat(read_yaml(self.config_path)),
            step=step,
            known_id=known.get("id") if known.get("target") == tracker.target else None,
        )
        run_id = tracker.start(session)
        self._started.append(tracker)
        if run_id is not None:
            ids[tracker.name] = {"target": tracker.target, "id": run_id}
            write_json(self.path / IDS_NAME, ids, remedy=GO_ON)

    def _finish(self, *, failed: bool) -> None:
        for tracker in list(self._started):
            self._attempt(tracker, partial(tracker.finish, failed=failed))
        self._started.clear()

    def _attempt(self, tracker: Tracker, action: Callable[[], None], *, images: bool = False) -> None:
        """Do something at a tracker. A failure is a single warning, and ends what failed: its images, or all of it."""
        try:
            action()
        except Exception as error:  # Whatever the package, the network or the disk raises.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            lost = "shows no more images" if images else "is left out from here on"
            warnings.warn(
                f"tracking.{tracker.name} failed ({reason}) and {lost}; training goes on, and "
                f"{self.metrics_path} has every number.",
                stacklevel=3,
            )
            if images:
                self._without_images.add(tracker.name)
                return
            self.trackers[:] = [other for other in self.trackers if other is not tracker]
            self._started[:] = [other for other in self._started if other is not tracker]
