"""A fine-tuned classifier as it comes back from disk: network, classes, and how its input is made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mim3d.caching.foreground import class_counts_of, class_locations_of
from mim3d.caching.preprocessing import Prepared, prepare
from mim3d.core.errors import DataError
from mim3d.core.types import Named
from mim3d.datasets.cases import Case
from mim3d.inference import padding_values
from mim3d.tasks.classification.cubes import Point, centre_of_label, centre_of_scan, cut_from
from mim3d.tasks.classification.task import Classification
from mim3d.tasks.trained import Trained, load_trained


@dataclass(frozen=True, kw_only=True)
class Classifier(Trained[Classification]):
    """A classification network with all it takes to use it."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names, in the order of the network's outputs."""
        return tuple(name for _, name in sorted(self.labels.items()))

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
    """Load a classifier with its card, see ``load_trained``."""
    return load_trained(path, Classifier, Classification, device=device, backbone=backbone)
