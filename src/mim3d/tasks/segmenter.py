"""A fine-tuned segmenter as it comes back from disk: network, labels, and how its input is made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mim3d.backbones import create_recipe
from mim3d.config import build_settings
from mim3d.data.preprocessing import Preprocessing
from mim3d.data.transforms import Intensity
from mim3d.errors import CheckpointError
from mim3d.inference import Readout
from mim3d.tasks import create_task
from mim3d.tasks.segmentation import Segmentation
from mim3d.tasks.segmentation_objective import SegmentationObjective
from mim3d.types import Named
from mim3d.weights import load_into, read_card, weights_digest

#: Folder of a run that holds a segmenter.
NETWORKS = ("segmenter",)


@dataclass(frozen=True)
class Segmenter:
    """A network with all it takes to use it.

    Attributes:
        network: in evaluation mode, on ``device``.
        settings: of the task it was trained for.
        labels: label value -> name, background 0 included.
        num_channels: images per scan.
        preprocessing: as in training.
        intensity: as in training.
        digest: SHA-256 of its weights.
        device: where it computes.
    """

    network: SegmentationObjective
    settings: Segmentation
    labels: dict[int, str]
    num_channels: int
    preprocessing: Preprocessing
    intensity: Intensity
    digest: str
    device: torch.device

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
    """Load a segmenter with its card; nothing in its files can run code.

    Args:
        path: a run of ``mim3d finetune``, or a folder with an exported segmenter.
        device: where it shall compute; the CPU if not given.
        backbone: the encoder, where the card names a class that is not mim3d's own.
    Raises:
        CheckpointError: no segmenter, an unreadable card, or weights that do not fill the network.
        ConfigError: a card with names or settings that this mim3d does not know.
    """
    card = read_card(path, NETWORKS)
    if "task" not in card:
        raise CheckpointError(
            f"{path} holds no segmenter but an encoder; fine-tune it first (mim3d finetune --weights)."
        )
    try:
        labels = {int(value): str(name) for value, name in card["labels"].items()}
        recipe = create_recipe(backbone or card["backbone"], allow_import=backbone is not None)
        preprocessing = build_settings(Preprocessing, {"spacing_mm": card["spacing_mm"]}, "card")
        intensity = build_settings(Intensity, card["intensity"], "card intensity")
        settings = create_task(card["task"], allow_import=False)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card of {path} is incomplete or damaged ({error!r}); export the run again."
        ) from None
    if not isinstance(settings, Segmentation):
        raise CheckpointError(f"{path} was trained for another task than segmentation.")
    objective: Any = settings.build(recipe, labels)
    report = load_into(objective, path, networks=NETWORKS)
    if report.missing or report.mismatched:
        first = next(iter(report.mismatched or report.missing))
        raise CheckpointError(f"{path} does not fill its network ({report}; first: {first}); copy or export it again.")
    where = device or torch.device("cpu")
    return Segmenter(
        network=objective.to(where).eval(),
        settings=settings,
        labels=labels,
        num_channels=recipe.in_channels,
        preprocessing=preprocessing,
        intensity=intensity,
        digest=weights_digest(path, NETWORKS),
        device=where,
    )
