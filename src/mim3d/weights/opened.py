"""Weights that are read once, whatever is asked of them: their card, their family, their tensors."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mim3d.weights.cards import has_card, read_card
from mim3d.weights.families import RecognisedWeights, recognised
from mim3d.weights.folders import RUN_NETWORKS
from mim3d.weights.states import HeldWeights, read_weights


@dataclass(frozen=True, eq=False)
class OpenedWeights:
    """Weights whose card and file are read when they are first needed, and kept as long as this object is.

    Attributes:
        path: A run folder, an export folder, a weights file or a Hugging Face id.
        networks: Folders of a run to look for, the preferred first.
    """

    path: str | Path
    networks: tuple[str, ...] = RUN_NETWORKS

    @classmethod
    def of(cls, weights: "str | Path | OpenedWeights", networks: tuple[str, ...] = RUN_NETWORKS) -> "OpenedWeights":
        """Weights by their path, or opened before."""
        return weights if isinstance(weights, OpenedWeights) else cls(weights, networks)

    @cached_property
    def card(self) -> dict[str, Any]:
        """The card of our own weights; empty for a foreign file."""
        return read_card(self.path, self.networks)

    @cached_property
    def held(self) -> HeldWeights:
        """What the file holds of a network."""
        return read_weights(self.path, self.networks)

    @cached_property
    def found(self) -> RecognisedWeights | None:
        """Foreign weights of a family that is known; None for our own, and where none fits."""
        return None if has_card(self.path, self.networks) else recognised(self.held)

    def __str__(self) -> str:
        return str(self.path)
