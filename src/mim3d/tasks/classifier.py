"""A fine-tuned classifier as it comes back from disk: network, classes, and how its input is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mim3d.backbones import create_recipe
from mim3d.config import build_settings
from mim3d.data.cases import Case
from mim3d.data.foreground import class_counts_of, class_locations_of
from mim3d.data.preprocessing import Prepared, Preprocessing, prepare
from mim3d.data.transforms import Intensity
from mim3d.errors import CheckpointError, DataError
from mim3d.inference import padding_values
from mim3d.tasks import create_task
from mim3d.tasks.classification import Classification
from mim3d.tasks.classification_objective import ClassificationObjective
from mim3d.tasks.cubes import Point, centre_of_label, centre_of_scan, cut_from
from mim3d.types import Named
from mim3d.weights import load_into, read_card, weights_digest

#: Folder of a run that holds a classifier.
NETWORKS = (Classification.network,)


@dataclass(frozen=True)
class Classifier:
    """A network with all it takes to use it.

    Attributes:
        network: in evaluation mode, on ``device``.
        settings: of the task it was trained for.
        classes: their names, in the order of the network's outputs.
        num_channels: images per scan.
        preprocessing: as in training.
        intensity: as in training.
        digest: SHA-256 of its weights.
        device: where it computes.
    """

    network: ClassificationObjective
    settings: Classification
    classes: tuple[str, ...]
    num_channels: int
    preprocessing: Preprocessing
    intensity: Intensity
    digest: str
    device: torch.device

    @property
    def needs_label(self) -> bool:
        """Whether it looks at what is around a labelled structure."""
        return self.settings.centre == "label"

    def prepare(self, case: Case) -> Prepared:
        """Read a scan as in training.

        Raises:
            DataError: a scan that cannot be used, of another number of channels, or without the label that is needed.
        """
        if len(case.images) != self.num_channels:
            raise DataError(
                f"{case.images[0]}: {len(case.images)} images (channels) where the network was trained on "
                f"{self.num_channels}; list the channels of a scan separated by ';' in a CSV."
            )
        if self.needs_label and case.label is None:
            raise DataError(
                f"{case.images[0]}: no label, but the network looks at boxes around labelled structures; give a list "
                "with the columns image and label."
            )
        return prepare(case, self.preprocessing, with_label=self.needs_label)

    def box(self, prepared: Prepared) -> npt.NDArray[np.float32]:
        """What the network sees of a scan, ``(C, *size)``.

        Raises:
            DataError: a label without a structure, where one is needed.
        """
        x, y, z = prepared.image.shape[1:]
        cube = self.settings.cube()
        cut = cube.cut(self._centre(prepared), cube.step((x, y, z), prepared.spacing_mm))
        image = self.intensity.apply(prepared.image, prepared.statistics)
        return cut_from(image, cut, padding_values(self.intensity, prepared.statistics))

    def probabilities(self, boxes: Sequence[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        """Probabilities ``(B, K)`` of boxes, averaged over mirrored ones where the task says so."""
        images = torch.from_numpy(np.stack(boxes)).to(self.device)
        averaged = self.network.probabilities(images, self.settings.mirror_axes)
        return np.asarray(averaged.cpu().double().numpy(), dtype=np.float64)

    def _centre(self, prepared: Prepared) -> Point:
        x, y, z = prepared.image.shape[1:]
        if prepared.label is None:
            return centre_of_scan((x, y, z))
        rows = class_locations_of(prepared.label, class_counts_of(prepared.label))
        centre = centre_of_label({0: rows[:, 1:]})
        if centre is None:
            raise DataError(
                f"{prepared.grid.path}: its label holds no structure, but the network looks at boxes around one; "
                "correct the label."
            )
        return centre


def load_classifier(
    path: str | Path, *, device: torch.device | None = None, backbone: Named | None = None
) -> Classifier:
    """Load a classifier with its card; nothing in its files can run code.

    Args:
        path: a run of ``mim3d finetune --task classification``, or a folder with an exported classifier.
        device: where it shall compute; the CPU if not given.
        backbone: the encoder, where the card names a class that is not mim3d's own.
    Raises:
        CheckpointError: no classifier, an unreadable card, or weights that do not fill the network.
        ConfigError: a card with names or settings that this mim3d does not know.
    """
    card = read_card(path, NETWORKS)
    try:
        labels = {int(value): str(name) for value, name in card["labels"].items()}
        recipe = create_recipe(backbone or card["backbone"], allow_import=backbone is not None)
        preprocessing = build_settings(Preprocessing, {"spacing_mm": card["spacing_mm"]}, "card")
        intensity = build_settings(Intensity, card["intensity"], "card intensity")
        settings = create_task(card["task"], allow_import=False)
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the card of {path} is that of no classifier, incomplete or damaged ({error!r}); fine-tune with --task "
            "classification, or export the run again."
        ) from None
    if not isinstance(settings, Classification):
        raise CheckpointError(f"{path} was trained for another task than classification.")
    objective: Any = settings.build(recipe, labels)
    report = load_into(objective, path, networks=NETWORKS)
    if report.missing or report.mismatched:
        first = next(iter(report.mismatched or report.missing))
        raise CheckpointError(f"{path} does not fill its network ({report}; first: {first}); copy or export it again.")
    where = device or torch.device("cpu")
    return Classifier(
        network=objective.to(where).eval(),
        settings=settings,
        classes=tuple(name for _, name in sorted(labels.items())),
        num_channels=recipe.in_channels,
        preprocessing=preprocessing,
        intensity=intensity,
        digest=weights_digest(path, NETWORKS),
        device=where,
    )
