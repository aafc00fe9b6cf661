"""What every tracker does: begin, take numbers and images by step, and end."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

#: Images by name, ``(H, W)`` grey values from 0 to 255, first row at the top.
Images = Mapping[str, npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class Beginning:
    """What a tracker is told when a session of training begins.

    Attributes:
        name: of the run.
        folder: of the run.
        settings: of the run by dotted name.
        step: last step done in earlier sessions; 0 for none. What a tracker has heard of later ones is void.
        known_id: what :meth:`Tracker.start` gave in an earlier session; None the first time.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    step: int
    known_id: str | None = None


class Tracker(Protocol):
    """One place that shows runs; any of its methods may raise what its package raises."""

    @property
    def name(self) -> str:
        """The setting that asks for it."""
        ...

    @property
    def target(self) -> str:
        """Where it writes to; with another one, a resumed run is a new one there."""
        ...

    def start(self, beginning: Beginning) -> str | None:
        """Begin, or go on with the run ``known_id``; returns the id to go on with."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take finite numbers."""
        ...

    def pictures(self, step: int, images: Images) -> None:
        """Take images."""
        ...

    def finish(self, *, failed: bool) -> None:
        """Send what is left, and end."""
        ...
