"""A run folder whose metrics and pictures go to trackers too."""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mim3d.core.files import write_json
from mim3d.core.run_folder import GO_ON, Run
from mim3d.core.settings import flat, read_yaml
from mim3d.tracking.mlflow import MLflow
from mim3d.tracking.settings import Tracking
from mim3d.tracking.slices import middle_slices
from mim3d.tracking.tensorboard import TensorBoard
from mim3d.tracking.tracker import Beginning, Tracker
from mim3d.tracking.wandb import WeightsAndBiases

#: File of a run folder: tracker -> where its run lies and by which id, to go on with it.
IDS_NAME = "tracking.json"

_FOLD = re.compile(r"fold_\d+")


@dataclass(frozen=True)
class TrackedRun(Run):
    """What the training loop takes for its run; a context manager around the training.

    A tracker that fails costs a warning, never the run: nothing more is sent to it in this session, while
    ``metrics.jsonl`` has everything.

    Attributes:
        trackers: those that have not failed.
    """

    trackers: list[Tracker] = field(default_factory=list)
    _started: list[Tracker] = field(default_factory=list, init=False)
    _without_pictures: set[str] = field(default_factory=set, init=False)

    @classmethod
    def of(cls, run: Run, tracking: Tracking) -> Self:
        """The run, with the trackers that the settings ask for; only the first process has any."""
        return cls(run.path, run.command, run.writes, trackers_of(tracking) if run.writes else [])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish(failed=error is not None)

    def cut_metrics(self, step: int) -> None:
        """Drop what was written after ``step``, and begin (again) from there at every tracker."""
        super().cut_metrics(step)
        self._finish(failed=False)
        for tracker in list(self.trackers):
            self._attempt(tracker, partial(self._start, tracker, step))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line of metrics, and tell the trackers the finite ones."""
        super().log(step, values)
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for tracker in list(self._started if finite else []):
            self._attempt(tracker, partial(tracker.log, step, finite))

    def save_pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Write volumes by name, and show their middle slices at the trackers."""
        super().save_pictures(step, pictures)
        receivers = [tracker for tracker in self._started if tracker.name not in self._without_pictures]
        if receivers:
            images = {f"pictures/{name}": image for name, image in middle_slices(pictures).items()}
            for tracker in receivers:
                self._attempt(tracker, partial(tracker.pictures, step, images), pictures=True)

    def _start(self, tracker: Tracker, step: int) -> None:
        ids = _read_ids(self.path / IDS_NAME)
        known = ids.get(tracker.name, {})
        same = known.get("target") == tracker.target
        beginning = Beginning(
            name=_name_of(self.path),
            folder=self.path,
            settings=flat(read_yaml(self.config_path)),
            step=step,
            known_id=known.get("id") if same else None,
        )
        run_id = tracker.start(beginning)
        self._started.append(tracker)
        if run_id is not None:
            ids[tracker.name] = {"target": tracker.target, "id": run_id}
            write_json(self.path / IDS_NAME, ids, remedy=GO_ON)

    def _finish(self, *, failed: bool) -> None:
        for tracker in list(self._started):
            self._attempt(tracker, partial(tracker.finish, failed=failed))
        self._started.clear()

    def _attempt(self, tracker: Tracker, act: Callable[[], None], *, pictures: bool = False) -> None:
        """Do something at a tracker; a failure is told once, and ends what failed."""
        try:
            act()
        except Exception as error:  # Whatever the package, the network or the disk has come to.
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            lost = "shows no more pictures" if pictures else "is left out from here on"
            warnings.warn(
                f"tracking.{tracker.name} failed ({reason}) and {lost}; training goes on, and "
                f"{self.metrics_path} has every number.",
                stacklevel=3,
            )
            if pictures:
                self._without_pictures.add(tracker.name)
                return
            self.trackers[:] = [other for other in self.trackers if other is not tracker]
            self._started[:] = [other for other in self._started if other is not tracker]


def trackers_of(tracking: Tracking) -> list[Tracker]:
    """The trackers that the settings ask for; none is started."""
    trackers: list[Tracker] = [TensorBoard()] if tracking.tensorboard else []
    if tracking.wandb is not None:
        trackers.append(WeightsAndBiases(tracking.wandb))
    if tracking.mlflow is not None:
        trackers.append(MLflow(tracking.mlflow))
    return trackers


def _read_ids(path: Path) -> dict[str, Any]:
    """The ids of earlier sessions; none where the file was damaged, which costs no more than a new run there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _name_of(folder: Path) -> str:
    """Name of the run's folder; a fold goes by that of the folder around it, too."""
    parts: Sequence[str] = folder.absolute().parts
    return "/".join(parts[-2:]) if _FOLD.fullmatch(parts[-1]) else parts[-1]
