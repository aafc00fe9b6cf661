"""The contract every pre-training method keeps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from mim3d.backbones.contract import Backbone
from mim3d.core.types import Triple
from mim3d.loading.loader import Sampler
from mim3d.objective import Objective
from mim3d.training.schedule import Optimisation


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of a pre-training method: what a user writes and YAML stores, with the paper's defaults."""

    @property
    @abstractmethod
    def optimisation(self) -> Optimisation:
        """The paper's optimisation; a user's own settings come on top."""

    @abstractmethod
    def planned(self, backbone: Backbone, shapes: Sequence[Triple]) -> Self:
        """These settings with everything that depends on the data filled in.

        Args:
            backbone: the encoder's recipe.
            shapes: voxels of every scan.
        Raises:
            ConfigError: when they cannot work on these scans, naming settings that do.
        """

    @abstractmethod
    def summary(self, backbone: Backbone, shapes: Sequence[Triple]) -> list[str]:
        """Lines printed before training: what a sample is and what it costs."""

    @abstractmethod
    def sampler(self, backbone: Backbone) -> Sampler:
        """Which places of a scan one sample needs: decided before anything is read."""

    @abstractmethod
    def build(self, backbone: Backbone) -> Objective:
        """The module the loop trains."""

    def idle_parts(self, final_logs: dict[str, float]) -> list[str]:
        """Sentences about parts that learned nothing, judged by the mean logs of the last steps; none by default."""
        return []
