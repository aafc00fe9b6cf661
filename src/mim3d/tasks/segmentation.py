"""Segmentation: every voxel gets one of the declared labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from mim3d.backbones.base import Backbone, check_multiple
from mim3d.data.cache import CachedScan
from mim3d.data.transforms import Intensity
from mim3d.errors import ConfigError
from mim3d.inference import Windows
from mim3d.objective import Objective
from mim3d.optimisation import Optimisation
from mim3d.tasks.augmentation import Augmentation, Augmenter, sided_labels
from mim3d.tasks.base import Task
from mim3d.tasks.crops import CropSampler
from mim3d.types import Spacing, Triple

#: Edge that a planned patch does not exceed.
LARGEST_PLANNED_EDGE = 96


@dataclass(frozen=True, kw_only=True)
class Segmentation(Task):
    """Settings of the segmentation task.

    Attributes:
        patch_size: voxels of one crop, multiples of the encoder's token edge; None plans it: what holds the median
            training scan, at most 96 along each axis.
        positive_ratio: share of crops centred on a voxel of a random class; the others lie anywhere.
        feature_dim: channels of the decoder at full resolution, its most expensive level.
        augmentation: how crops are varied.
        background_in_dice: whether the background counts in the Dice loss.
        batch_dice: one Dice over the whole batch instead of one per crop, so that crops without a structure
            matter less.
        dice_weight: weight of the Dice loss.
        cross_entropy_weight: weight of the cross-entropy.
        overlap: share of a window that its neighbour sees too, in validation and prediction.
        mirror_axes: axes (0 X, 1 Y, 2 Z) mirrored at prediction; among the augmentation's flip axes.
        num_validation_cases: held-out cases scored at each validation; None for all.
        spacing_mm: typical voxel size of the training scans, filled in by the plan.
    """

    patch_size: Triple | None = None
    positive_ratio: float = 0.5
    feature_dim: int = 16
    augmentation: Augmentation = field(default_factory=Augmentation)
    background_in_dice: bool = False
    batch_dice: bool = True
    dice_weight: float = 1.0
    cross_entropy_weight: float = 1.0
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    num_validation_cases: int | None = None
    spacing_mm: Spacing | None = None

    best_by = "dice"

    def __post_init__(self) -> None:
        if not 0 <= self.positive_ratio <= 1:
            raise ConfigError(f"positive_ratio is {self.positive_ratio}; it must lie between 0 and 1.")
        for name in ("feature_dim", "num_validation_cases"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        weights = (self.dice_weight, self.cross_entropy_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(
                f"dice_weight and cross_entropy_weight {weights} must be zero or more, and one above zero."
            )
        self.windows(patch_size=(1, 1, 1))

    @property
    def optimisation(self) -> Optimisation:
        """AdamW with a rate that suits batches of 2 to 16 crops alike, from scratch and from an encoder."""
        return Optimisation(
            learning_rate=5e-4,
            weight_decay=1e-5,
            betas=(0.9, 0.999),
            warmup_ratio=0.05,
            clip_norm=1.0,
        )

    def checked(self, backbone: Backbone) -> "Segmentation":
        """These settings, once it is known that the patch fits the backbone's tokens.

        Raises:
            ConfigError: naming the axis at fault and the sizes that fit.
        """
        if self.patch_size is None:
            return self
        edge = backbone.patch_size
        check_multiple(self.patch_size, edge, "patch_size")
        if all(voxels == edge for voxels in self.patch_size):
            raise ConfigError(
                f"patch_size {list(self.patch_size)} is a single token of the encoder; use {2 * edge} along some axis."
            )
        return self

    def planned(self, backbone: Backbone, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> "Segmentation":
        """These settings with patch size, spacing, flip axes and angles filled in.

        Raises:
            ConfigError: when the patch does not fit the backbone, or windows would be mirrored as crops never were.
        """
        x, y, z = (float(median(scan.spacing_mm[axis] for scan in scans)) for axis in range(3))
        spacing_mm = self.spacing_mm or (x, y, z)
        augmentation = self.augmentation.planned(labels, spacing_mm)
        patch_size = self.patch_size or _patch_for([scan.shape for scan in scans], backbone.patch_size)
        unseen = set(self.mirror_axes) - set(augmentation.flip_axes or ())
        if unseen:
            axis = min(unseen)
            sided = sided_labels(labels, axis)
            reason = f" (left out because of the label '{sided[0]}')" if sided else ""
            raise ConfigError(
                f"mirror_axes names axis {axis}, which is none of the augmentation's flip axes "
                f"{list(augmentation.flip_axes or ())}{reason}; leave it out, or set augmentation.flip_axes."
            )
        planned = replace(self, patch_size=patch_size, augmentation=augmentation, spacing_mm=spacing_mm)
        return planned.checked(backbone)

    def summary(self) -> list[str]:
        """Lines printed before training: the crop, and how it is varied."""
        size = " x ".join(map(str, self._patch_size()))
        return [
            f"crops of {size} voxels, {self.positive_ratio:.0%} of them around a structure",
            f"crops are {self.augmentation.describe()}",
        ]

    def sampler(self) -> CropSampler:
        """One crop per sample, around a structure or anywhere."""
        augmentation = self.augmentation
        return CropSampler(self._patch_size(), self.positive_ratio, augmentation.affine_prob, augmentation.margin_ratio)

    def augment(self) -> Augmenter:
        """The planned variation of crops."""
        return Augmenter(self.augmentation, self._patch_size(), self.spacing_mm or (1.0, 1.0, 1.0))

    def build(self, backbone: Backbone, labels: Mapping[int, str]) -> Objective:
        """Encoder, decoder and losses, freshly initialised."""
        from mim3d.tasks.segmentation_objective import SegmentationObjective

        return SegmentationObjective(
            backbone.build(),
            in_channels=backbone.in_channels,
            label_values=class_values(labels),
            feature_dim=self.feature_dim,
            background_in_dice=self.background_in_dice,
            batch_dice=self.batch_dice,
            dice_weight=self.dice_weight,
            cross_entropy_weight=self.cross_entropy_weight,
        )

    def windows(
        self,
        *,
        patch_size: Triple | None = None,
        overlap: float | None = None,
        batch_size: int = 4,
        mirror_axes: tuple[int, ...] | None = None,
    ) -> Windows:
        """How scans are covered at prediction; what is None is taken from these settings."""
        return Windows(
            patch_size=patch_size or self._patch_size(),
            overlap=self.overlap if overlap is None else overlap,
            batch_size=batch_size,
            mirror_axes=self.mirror_axes if mirror_axes is None else mirror_axes,
        )

    def validate(
        self,
        objective: Objective,
        scans: Sequence[CachedScan],
        intensity: Intensity,
        labels: Mapping[int, str],
    ) -> dict[str, float]:
        """Mean Dice per label and over labels on the cached grid, without mirroring."""
        from mim3d.tasks.segmentation_objective import SegmentationObjective
        from mim3d.tasks.validation import dice_of_scans

        assert isinstance(objective, SegmentationObjective)
        chosen = _spread(scans, self.num_validation_cases)
        return dice_of_scans(objective, chosen, intensity, self.windows(mirror_axes=()), labels)

    def _patch_size(self) -> Triple:
        if self.patch_size is None:
            raise ConfigError("patch_size is not planned yet; give one, such as [96, 96, 96].")
        return self.patch_size


def class_values(labels: Mapping[int, str]) -> tuple[int, ...]:
    """Label value of each class the network tells apart: background first, then the others in rising order."""
    return (0, *sorted(value for value in labels if value != 0))


def _patch_for(shapes: Sequence[Triple], edge: int) -> Triple:
    """The smallest patch of whole tokens that holds the median scan, limited along each axis."""
    limit = max(edge, LARGEST_PLANNED_EDGE // edge * edge)
    x, y, z = (min(limit, -int(-median(shape[axis] for shape in shapes) // edge) * edge) for axis in range(3))
    if x == y == z == edge:
        return 2 * edge, 2 * edge, 2 * edge
    return x, y, z


def _spread(scans: Sequence[CachedScan], number: int | None) -> list[CachedScan]:
    """``number`` scans evenly spread over the sequence: the same ones at every validation."""
    if number is None or number >= len(scans):
        return list(scans)
    return [scans[index * len(scans) // number] for index in range(number)]
