"""The contract every task keeps: what fine-tuning learns from labels, and how it is validated."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from mim3d.backbones.base import Backbone
from mim3d.data.cache import CachedScan
from mim3d.data.loading import Augment, Sampler
from mim3d.data.transforms import Intensity
from mim3d.objective import Objective
from mim3d.optimisation import Optimisation


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of a task: what a user writes and YAML stores."""

    #: Score (higher is better) of :meth:`validate` by which the best weights are kept.
    best_by = ""

    @property
    @abstractmethod
    def optimisation(self) -> Optimisation:
        """How it is trained by default; a user's own settings come on top."""

    @abstractmethod
    def checked(self, backbone: Backbone) -> Self:
        """These settings, once it is known that they can work on this backbone.

        Raises:
            ConfigError: when they cannot, naming settings that do.
        """

    @abstractmethod
    def planned(self, backbone: Backbone, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> Self:
        """These settings with everything that depends on the data filled in.

        Args:
            backbone: the encoder's recipe.
            scans: the training scans.
            labels: label value -> name, background 0 included.
        Raises:
            ConfigError: when they cannot work on these scans.
        """

    @abstractmethod
    def summary(self) -> list[str]:
        """Lines printed before training: what a sample is and how it is varied."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """Which places of a scan one sample needs: decided before anything is read."""

    @abstractmethod
    def augment(self) -> Augment | None:
        """What changes a sample once it was read; None for nothing."""

    @abstractmethod
    def build(self, backbone: Backbone, labels: Mapping[int, str]) -> Objective:
        """The module the loop trains."""

    @abstractmethod
    def validate(
        self,
        objective: Objective,
        scans: Sequence[CachedScan],
        intensity: Intensity,
        labels: Mapping[int, str],
    ) -> dict[str, float]:
        """Scores by name on held-out scans of the cache; quick, for choosing the best weights."""
