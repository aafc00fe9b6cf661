"""The contract every task keeps: what fine-tuning learns from labels, and how it is validated."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from mim3d.backbones.contract import Backbone
from mim3d.caching.cache import Cache, CachedScan
from mim3d.core.errors import DataError
from mim3d.datasets.splits import Split
from mim3d.inference import scores_bytes
from mim3d.loading.loader import Augment, Sampler
from mim3d.objective import Objective
from mim3d.scans.intensity import Intensity
from mim3d.training.schedule import Optimisation


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of a task: what a user writes and YAML stores."""

    #: Score (higher is better) of :meth:`validate` by which the best weights are kept.
    best_by = ""

    #: What every case must come with: a ``label`` map, or the ``class`` of the whole scan.
    needs = "label"

    #: Folder of a run that receives the trained network.
    network = "segmenter"

    #: Setting that makes a sample smaller.
    sized_by = "patch_size"

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

    def check_split(self, split: Split) -> None:
        """Refuse cases that cannot be learned from, before anything is prepared; label maps are checked when read.

        Raises:
            DataError: naming the cases.
        """
        return

    def check_labels(self, labels: Mapping[int, str]) -> None:
        """Refuse settings that name labels which the data set lacks, before anything is prepared.

        Args:
            labels: label value -> name as the data set declares them; empty where it declares nothing.
        Raises:
            ConfigError: naming the label.
        """
        return

    def classes_of(self, scans: Cache) -> dict[int, str]:
        """Value -> name of what the network tells apart: the labels of the training scans' maps, background 0 included.

        Raises:
            DataError: there is nothing to tell apart.
        """
        if not any(value != 0 for value in scans.labels):
            raise DataError(f"{scans.path}: no label but background in {len(scans)} scans; check the label files.")
        return scans.labels

    def validation_bytes(self, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> int:
        """Bytes that a validation holds besides the network at work: scores of every label for the largest scan."""
        return max((scores_bytes(scan.shape, len(labels)) for scan in scans), default=0)

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
