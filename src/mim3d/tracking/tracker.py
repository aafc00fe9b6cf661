"""What every tracker does: start a session, log numbers and images by step, and finish."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: Images by name, ``(H, W)`` grey values from 0 to 255, first row at the top.
Images = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class SessionInfo:
    """What a tracker receives when a session of training starts.

    Attributes:
        name: Name of the run.
        folder: Folder of the run.
        settings: Settings of the run by dotted name.
        step: Last step of earlier sessions, or 0 in a new run. What a tracker holds of later steps is void.
        known_id: What :meth:`Tracker.start` returned in an earlier session, or None the first time.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    step: int
    known_id: str | None = None


class Tracker(Protocol):
    """One place that shows runs. Any of its methods may raise whatever its package raises."""

    @property
    def name(self) -> str:
        """The setting that switches the tracker on."""
        ...

    @property
    def target(self) -> str:
        """Where the tracker writes to. A run resumed with another target is a new run there."""
        ...

    def start(self, session: SessionInfo) -> str | None:
        """Start a run, or continue the run ``known_id``.

        Returns:
            The id by which a later session can continue the run, or None where none is needed.
        """
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers by name."""
        ...

    def log_images(self, step: int, images: Images) -> None:
        """Log images by name."""
        ...

    def finish(self, *, failed: bool) -> None:
        """Send what is left, and close the run as finished or failed."""
        ...
