"""A fine-tuned segmenter as it comes back from disk: network, labels, and how its input is made."""

from dataclasses import dataclass
from pathlib import Path

import torch

from mim3d.core.types import Named
from mim3d.inference import Readout
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.tasks.trained import Trained, load_trained


@dataclass(frozen=True, kw_only=True)
class Segmenter(Trained[Segmentation]):
    """A segmentation network with all it takes to use it; its labels include the background 0."""

    def readout(self) -> Readout:
        """What the channels of its network mean: one label each, or regions that may lie in one another."""
        targets = self.network.targets
        has_background = targets.activation == "softmax"
        dtype = torch.uint8 if max(targets.painted) < 256 else torch.int32
        return Readout(
            empty=tuple(float(has_background and channel == 0) for channel in range(len(targets.names))),
            activate=targets.probabilities,
            decide=lambda probabilities: targets.labels_of(probabilities).to(dtype),
            order_is_enough=has_background,
        )

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What the network's channels are called, in their order."""
        return self.network.targets.names


def load_segmenter(path: str | Path, *, device: torch.device | None = None, backbone: Named | None = None) -> Segmenter:
    """Load a segmenter with its card, see ``load_trained``."""
    return load_trained(path, Segmenter, Segmentation, device=device, backbone=backbone)
