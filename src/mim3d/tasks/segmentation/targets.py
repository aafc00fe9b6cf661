"""What each output channel of a segmenter stands for: one of several labels, or a region that may lie in another.

Cases may be annotated in part: a list says which labels their maps hold, and the others are unknown there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.errors import ConfigError
from mim3d.datasets.cases import Case
from mim3d.datasets.references import annotated_values

# Shape suffixes: B samples, K channels, X Y Z space.

Activation = Literal["softmax", "sigmoid"]

#: Above it, a voxel belongs to a region.
REGION_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The channels of a segmenter, and the way from label values to them and back.

    Attributes:
        names: Names of the channels.
        members: Label values that belong to each channel.
        label_values: Label value that each channel gives in predictions.
        activation: ``softmax``, every voxel belongs to one channel, the first of which is the background; or
            ``sigmoid``, every channel is a region of its own.
        ignore_label: Label value of voxels about which nothing is known.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    label_values: tuple[int, ...]
    activation: Activation
    ignore_label: int | None = None

    @property
    def structures(self) -> dict[str, tuple[int, ...]]:
        """Name -> label values of every channel but the background."""
        first = 1 if self.activation == "softmax" else 0
        return dict(list(zip(self.names, self.members, strict=True))[first:])

    def probabilities(self, logits: Tensor, dim: int = 0) -> Tensor:
        """Return the probability of each channel, of logits whose axis ``dim`` holds the channels."""
        return torch.softmax(logits, dim) if self.activation == "softmax" else torch.sigmoid(logits)

    def labels_of(self, probabilities_K: Tensor) -> Tensor:
        """Return label values ``(...)`` int64 of probabilities ``(K, ...)``.

        One of several labels: the most probable, the lower one of equals. Regions set their label value one after the
        other, in their order, where they are more probable than not (as nnU-Net does with ``regions_class_order``).
        """
        label_values = torch.tensor(self.label_values, device=probabilities_K.device)
        if self.activation == "softmax":
            # On a CPU argmax along a leading axis takes three times as long.
            return label_values[probabilities_K.max(dim=0).indices]
        labels = torch.zeros_like(probabilities_K[0], dtype=torch.long)
        for probability, value in zip(probabilities_K, self.label_values, strict=True):
            labels[probability > REGION_THRESHOLD] = value
        return labels

    def table(self) -> Tensor:
        """Return the channels of each label value, as 0 or 1, ``(values, K)`` float32."""
        values = [value for members in self.members for value in members]
        table = torch.zeros(max([*values, self.ignore_label or 0]) + 1, len(self.members))
        for channel, members in enumerate(self.members):
            table[list(members), channel] = 1
        return table

    def known(self, label: Tensor) -> Tensor | None:
        """Return the voxels about which something is known, as booleans shaped like ``label``; None where all are."""
        return None if self.ignore_label is None else label != self.ignore_label


def derived_values(regions: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the label value that each region gives: the one of its own that no later region covers.

    Whole tumour [1, 2, 3], tumour core [2, 3] and enhancing tumour [3] give 1, 2 and 3.

    Raises:
        ConfigError: A region has no such value, or several.
    """
    names, values = list(regions), []
    for index, name in enumerate(names):
        later = {value for other in names[index + 1 :] for value in regions[other]}
        own = [value for value in regions[name] if value not in later]
        if len(own) != 1:
            reason = "none that no later region covers" if not own else f"several of its own {own}"
            raise ConfigError(
                f"region '{name}' could give any of the label values {list(regions[name])}: it has {reason}; order the "
                "regions from the largest to the smallest, or set region_values to one value for each."
            )
        values.append(own[0])
    return values


def channels_of(label_BXYZ: Tensor, table: Tensor) -> Tensor:
    """Return label values as channels ``(B, K, X, Y, Z)`` of 0 and 1.

    Args:
        label_BXYZ: Label values.
        table: The table of :meth:`Targets.table`, on the same device.
    """
    return F.embedding(label_BXYZ, table).movedim(-1, 1)


@dataclass(frozen=True)
class PartialLabels:
    """Which channels of a network a case has annotations of.

    Attributes:
        members: Label values that belong to each channel.
        names: Label value -> name of the data set.
    """

    members: tuple[tuple[int, ...], ...]
    names: Mapping[int, str]

    def channels(self, case: Case) -> tuple[bool, ...]:
        """Return for each channel whether all of its label values were annotated; the background always was."""
        values = annotated_values(case, self.names)
        return tuple(values is None or set(members) <= values for members in self.members)


def are_partial(cases: Sequence[Case], names: Mapping[int, str]) -> bool:
    """Whether any case is annotated in part; DataError is raised for a label that the data set lacks."""
    found = [annotated_values(case, names) for case in cases]
    return any(values is not None for values in found)


def dice_by_name(
    predicted: np.ndarray,
    reference: np.ndarray,
    structures: Mapping[str, Sequence[int]],
    ignore_label: int | None = None,
) -> dict[str, float]:
    """Return the Dice of each structure between two maps of one shape; NaN where neither holds it.

    Args:
        predicted: Label values.
        reference: Label values.
        structures: Name -> label values that belong to it.
        ignore_label: Label value of the reference where nothing is counted.
    """
    if ignore_label is not None:
        known = reference != ignore_label
        predicted, reference = predicted[known], reference[known]
    values = sorted({value for members in structures.values() for value in members})
    place = {value: index for index, value in enumerate(values, start=1)}
    # How often each pair of values meets says all there is to count, in one pass whatever the structures.
    number = len(values) + 1
    pairs = np.bincount(_places(predicted, values) * number + _places(reference, values), minlength=number**2)
    counts, dice = pairs.reshape(number, number), {}
    for name, members in structures.items():
        own = [place[value] for value in members]
        both, total = counts[np.ix_(own, own)].sum(), counts[own].sum() + counts[:, own].sum()
        dice[name] = float(2 * both / total) if total else math.nan
    return dice


def _places(label: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Return a flat map of label values as places in ``values``, counted from 1; all others are 0."""
    table = np.zeros(max([int(label.max(initial=0)), *values]) + 1, dtype=np.int64)
    table[list(values)] = np.arange(1, len(values) + 1)
    places: np.ndarray = table[label.ravel()]
    return places
