"""Segmentation: every voxel gets one of the declared labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch

from mim3d.backbones.contract import Backbone, check_patch, round_up
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError
from mim3d.core.settings import nearest, update_settings
from mim3d.core.types import LARGEST_LABEL, Spacing, Triple
from mim3d.datasets.published.presets import Preset
from mim3d.datasets.references import annotated_values
from mim3d.inference import Windows, padding_values, sliding_logits
from mim3d.loading.samples import Augment
from mim3d.objective import Objective, crop_tokens
from mim3d.scans.grids import require_spacing
from mim3d.scans.intensity import Intensity
from mim3d.tasks.augmentation import Augmentation, published_augmentation
from mim3d.tasks.contract import CropTask, ExportForm, LogitsProgram, PredictionSettings, Predictor, TrainedNetwork
from mim3d.tasks.evaluation import EvaluationSettings, Scores
from mim3d.tasks.freezing import check_freezing, freezing_lines
from mim3d.tasks.segmentation.crops import CropSampler
from mim3d.tasks.segmentation.targets import (
    PartialLabels,
    Targets,
    are_partial,
    derived_values,
    dice_by_name,
)
from mim3d.training.schedule import Optimisation

#: Most channels of the decoder at full resolution.
LARGEST_DIM = 4096

#: Edge that a planned patch does not exceed.
LARGEST_PLANNED_EDGE = 96


@dataclass(frozen=True, kw_only=True)
class Segmentation(CropTask):
    """Settings of the segmentation task: a label for every voxel.

    Attributes:
        patch_size: Voxels of one crop, multiples of the encoder's token edge. None plans it: what holds the median
            training scan, at most 96 along each axis.
        positive_ratio: Share of crops centred on a voxel of a random class; the others lie anywhere.
        decoder: What brings the encoder's maps back to full resolution: adapter, with a path of convolutions from the
            input beside the encoder; additive, the same without that path; unet (as SwinUNETR has it); or nnunet, that
            of nnU-Net. None plans it: nnunet for nnU-Net's residual encoder, adapter for others.
        feature_dim: Number of channels of the decoder at full resolution, its most expensive level, where the encoder
            has no map of it.
        augmentation: How crops are varied.
        background_in_dice: Whether the background counts in the Dice loss.
        batch_dice: Whether there is one Dice over the whole batch instead of one per crop, so that crops without a
            structure matter less.
        dice_weight: Weight of the Dice loss.
        cross_entropy_weight: Weight of the cross-entropy.
        focal_weight: Weight of the focal loss.
        focal_gamma: Exponent of the focal loss: the larger, the less counts what is classified well.
        top_k_ratio: Share of the voxels, those of the highest cross-entropy, that count in it.
        class_weights: Weight of labels or regions by name in cross-entropy and focal loss; others weigh 1.
        regions: Name -> label values of structures that may lie in one another, each predicted separately (sigmoid)
            instead of one label per voxel (softmax); from the largest to the smallest.
        region_values: Label value that each region gives in predictions, in their order; where one lies in another
            that of the later one. None derives them: the value that no later region covers.
        ignore_label: Label value of voxels that nothing is learned from, and that count in no score.
        deep_supervision: Whether coarser levels of the decoder learn too, with weights 1/2, 1/4, ... None plans it:
            with the decoder nnunet, as nnU-Net trains.
        freeze_encoder: Whether the encoder stays as it is, so that only the decoder learns.
        unfreeze_ratio: Share of training after which the whole encoder learns; until then its layers begin to, one
            after the other, from its output down to the stem. None lets all of it learn from the beginning.
        overlap: Share of a window that its neighbour sees too, in validation and prediction.
        mirror_axes: Axes (0 X, 1 Y, 2 Z) mirrored at prediction; among the augmentation's flip axes.
        num_validation_cases: Number of held-out cases scored at each validation; None for all.
        spacing_mm: Typical voxel size of the training scans, filled in by the plan.
        partial_labels: Label value -> name, filled in by the plan where some cases are annotated in part.
    """

    patch_size: Triple | None = None
    positive_ratio: float = 0.5
    decoder: Literal["unet", "additive", "adapter", "nnunet"] | None = None
    feature_dim: int = 16
    augmentation: Augmentation = field(default_factory=Augmentation)
    background_in_dice: bool = False
    batch_dice: bool = True
    dice_weight: float = 1.0
    cross_entropy_weight: float = 1.0
    focal_weight: float = 0.0
    focal_gamma: float = 2.0
    top_k_ratio: float = 1.0
    class_weights: Mapping[str, float] | None = None
    regions: Mapping[str, tuple[int, ...]] | None = None
    region_values: tuple[int, ...] | None = None
    ignore_label: int | None = None
    deep_supervision: bool | None = None
    freeze_encoder: bool = False
    unfreeze_ratio: float | None = None
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    num_validation_cases: int | None = None
    spacing_mm: Spacing | None = None
    partial_labels: Mapping[int, str] | None = None

    best_by = "dice"
    former: ClassVar[Mapping[str, Any]] = {"decoder": "unet"}

    def __post_init__(self) -> None:
        if not 0 <= self.positive_ratio <= 1:
            raise ConfigError(f"positive_ratio is {self.positive_ratio}; it must lie between 0 and 1.")
        for name in ("feature_dim", "num_validation_cases"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1.")
        if self.feature_dim > LARGEST_DIM:
            raise ConfigError(f"feature_dim is {self.feature_dim}; it must be at most {LARGEST_DIM}, such as 16.")
        require_spacing(self.spacing_mm)
        check_freezing(self.freeze_encoder, self.unfreeze_ratio)
        weights = (self.dice_weight, self.cross_entropy_weight, self.focal_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ConfigError(
                f"dice_weight, cross_entropy_weight and focal_weight are {weights}; they must be zero or more, and one "
                "of them above zero."
            )
        if self.focal_gamma < 0:
            raise ConfigError(f"focal_gamma is {self.focal_gamma}; it must be zero or more, such as 2.")
        if not 0 < self.top_k_ratio <= 1:
            raise ConfigError(f"top_k_ratio is {self.top_k_ratio}; it must be above 0 and at most 1, such as 0.1.")
        for name, weight in (self.class_weights or {}).items():
            if weight < 0:
                raise ConfigError(f"class_weights of '{name}' is {weight}; it must be zero or more.")
        self._check_regions()
        # Refuses an overlap or axes that cannot work.
        Windows(patch_size=(1, 1, 1), overlap=self.overlap, mirror_axes=self.mirror_axes)

    def _check_regions(self) -> None:
        if self.ignore_label is not None and self.ignore_label < 1:
            raise ConfigError(
                f"ignore_label is {self.ignore_label}; it must be a label value above 0 (the background)."
            )
        if self.regions is None:
            if self.region_values is not None:
                raise ConfigError("region_values is set, but there are no regions; set regions too, or leave it out.")
            return
        if not self.regions or not all(self.regions.values()):
            raise ConfigError("regions must name one region or more, each with its label values, such as [1, 2, 3].")
        if self.region_values is None:
            derived_values(self.regions)
        elif len(self.region_values) != len(self.regions) or not all(
            1 <= value <= LARGEST_LABEL for value in self.region_values
        ):
            raise ConfigError(
                f"region_values {list(self.region_values)} must be {len(self.regions)} label values from 1 to "
                f"{LARGEST_LABEL}, one for each of {', '.join(self.regions)}."
            )

    @property
    def optimisation(self) -> Optimisation:
        """AdamW with a rate that suits batches of 2 to 16 crops alike, from scratch and from an encoder."""
        return Optimisation(learning_rate=5e-4, weight_decay=1e-5, betas=(0.9, 0.999), warmup_ratio=0.05, clip_norm=1.0)

    @classmethod
    def of_preset(cls, preset: Preset, patch_size: Triple) -> Self:
        return cls(
            patch_size=patch_size,
            positive_ratio=preset.positive_ratio,
            augmentation=published_augmentation(preset),
            regions=preset.regions,
            overlap=preset.overlap,
        )

    def checked(self, backbone: Backbone) -> "Segmentation":
        if self.patch_size is None:
            return self
        multiple = backbone.input_multiple
        check_patch(self.patch_size, multiple)
        if self.patch_size == multiple:
            raise ConfigError(
                f"patch_size {list(self.patch_size)} is a single token of the encoder; use {2 * multiple[0]} along "
                "some axis."
            )
        return self

    def check_labels(self, labels: Mapping[int, str]) -> None:
        """Refuse regions, weights or an ignored label that the data set lacks, where it declares any.

        Raises:
            ConfigError: The sentence names the label.
        """
        if not labels:
            return
        targets = self.targets(labels)
        for name in self.class_weights or {}:
            if name not in targets.names:
                raise ConfigError(f"class_weights names '{name}'.{nearest(name, targets.names)}")

    def planned(self, backbone: Backbone, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> "Segmentation":
        """Return these settings with patch size, spacing, flip axes and angles filled in.

        Raises:
            ConfigError: The patch does not fit the backbone, regions or weights name labels that there are not, or
                windows would be mirrored as crops never were.
        """
        x_mm, y_mm, z_mm = (float(median(scan.spacing_mm[axis] for scan in scans)) for axis in range(3))
        spacing_mm = self.spacing_mm or (x_mm, y_mm, z_mm)
        self.check_labels(labels)
        names = self.named_structures(labels)
        augmentation = self.augmentation.planned(names, spacing_mm)
        patch_size = self.patch_size
        if patch_size is None:
            # The smallest of whole tokens, of more than one of them, that holds the median scan up to a limit.
            middle = [median(scan.shape[axis] for scan in scans) for axis in range(3)]
            x, y, z = patch_size = round_up(middle, backbone.input_multiple, LARGEST_PLANNED_EDGE)
            if patch_size == backbone.input_multiple:
                patch_size = (2 * x, 2 * y, 2 * z)
        augmentation.check_mirrors(self.mirror_axes, names, "label")
        planned = replace(
            self.with_decoder(backbone),
            patch_size=patch_size,
            augmentation=augmentation,
            spacing_mm=spacing_mm,
            partial_labels=dict(labels) if are_partial([scan.case for scan in scans], labels) else None,
        )
        return planned.checked(backbone)

    def with_decoder(self, backbone: Backbone) -> Self:
        """Return these settings with the decoder, where they leave it open, and its supervision, filled in."""
        decoder = self.decoder or backbone.segmentation_decoder
        deep = decoder == "nnunet" if self.deep_supervision is None else self.deep_supervision
        return update_settings(self, {"decoder": decoder, "deep_supervision": deep}, "task")

    @property
    def named_values(self) -> tuple[int, ...]:
        """Label values of the regions, and the ignored one."""
        return (*(value for members in (self.regions or {}).values() for value in members), *super().named_values)

    def named_structures(self, labels: Mapping[int, str]) -> dict[int, str]:
        """Return the names of labels and regions alike: a region, too, may lie on one side and is not mirrored then.

        Args:
            labels: Label value -> name. Regions are added below 0.
        """
        return {**labels, **{-number: name for number, name in enumerate(self.regions or {}, start=1)}}

    def summary(self) -> list[str]:
        """Return the lines that are printed before training: the crop, regions and partial labels."""
        size = " x ".join(map(str, self._patch_size()))
        lines = [f"crops of {size} voxels, {self.positive_ratio:.0%} of them around a structure"]
        if self.regions is not None:
            values = derived_values(self.regions) if self.region_values is None else self.region_values
            given = ", ".join(f"{name} as {value}" for name, value in zip(self.regions, values, strict=True))
            lines.append(f"regions, each predicted separately; predictions hold {given}")
        if self.partial_labels is not None:
            lines.append("some cases are annotated in part: what they leave out counts as background there (Shi 2021)")
        return [*lines, *freezing_lines(self.freeze_encoder, self.unfreeze_ratio, "the decoder is")]

    def details(self) -> list[str]:
        return [f"crops are {self.augmentation.describe()}"]

    def sampler(self) -> CropSampler:
        augmentation, names = self.augmentation, self.partial_labels
        return CropSampler(
            self._patch_size(),
            self.positive_ratio,
            augmentation.affine_prob,
            augmentation.margin_ratio,
            ignore_label=self.ignore_label,
            partial=None if names is None else PartialLabels(self.targets(names).members, names),
        )

    def augment(self) -> Augment:
        from mim3d.tasks.transforms import Augmenter

        return Augmenter(self.augmentation, self._patch_size(), self.spacing_mm or (1.0, 1.0, 1.0))

    def build(self, backbone: Backbone, labels: Mapping[int, str]) -> Objective:
        """Build encoder, decoder and losses, freshly initialised.

        A user's own task that extends this one builds a module with ``encoder``, ``targets`` and ``logits``.
        """
        from mim3d.tasks.segmentation.network import SegmentationObjective

        targets = self.targets(labels)
        settings = self.with_decoder(backbone)
        objective = SegmentationObjective(
            backbone.build(), in_channels=backbone.in_channels, targets=targets, settings=settings
        )
        if self.patch_size is not None:
            objective.tokens_per_sample = crop_tokens(self.patch_size, backbone.token_size)
        return objective

    def targets(self, labels: Mapping[int, str]) -> Targets:
        """Return what the channels of the network stand for.

        They are the regions in their order, or one label each: the background first, then the others in rising order of
        their values.

        Args:
            labels: Label value -> name, background 0 included.

        Raises:
            ConfigError: The data set lacks a region's label or the ignored one.
        """
        if self.ignore_label is not None and self.ignore_label not in labels:
            known = ", ".join(map(str, sorted(labels)))
            raise ConfigError(f"ignore_label is {self.ignore_label}, which is none of the label values {known}.")
        learned = [value for value in sorted(labels) if value not in (0, self.ignore_label)]
        if self.regions is None:
            values = (0, *learned)
            return Targets(
                names=tuple(labels.get(value, "background" if value == 0 else str(value)) for value in values),
                members=tuple((value,) for value in values),
                label_values=values,
                activation="softmax",
                ignore_label=self.ignore_label,
            )
        for name, members in self.regions.items():
            for value in members:
                if value not in learned:
                    known = ", ".join(map(str, learned))
                    raise ConfigError(f"region '{name}' names label value {value}, but it must be one of {known}.")
        return Targets(
            names=tuple(self.regions),
            members=tuple(tuple(members) for members in self.regions.values()),
            label_values=tuple(derived_values(self.regions) if self.region_values is None else self.region_values),
            activation="sigmoid",
            ignore_label=self.ignore_label,
        )

    def windows(
        self, *, overlap: float | None = None, batch_size: int = 4, mirror_axes: tuple[int, ...] | None = None
    ) -> Windows:
        """Return how scans are covered at prediction; what is None is taken from these settings."""
        return Windows(
            patch_size=self._patch_size(),
            overlap=self.overlap if overlap is None else overlap,
            batch_size=batch_size,
            mirror_axes=self.mirror_axes if mirror_axes is None else mirror_axes,
        )

    def validate(
        self, objective: Objective, scans: Sequence[CachedScan], intensity: Intensity, labels: Mapping[int, str]
    ) -> dict[str, float]:
        """Return the mean Dice of every label or region and over them on the cached grid, without mirroring.

        A structure that is in neither map of a scan is left out there, and so is one that a scan has no annotations of;
        the mean over structures leaves out those that no scan shows. The names are ``dice`` and ``dice/<name>``.
        """
        module: Any = objective
        targets: Targets = module.targets
        windows, device = self.windows(mirror_axes=()), next(module.parameters()).device
        scores: dict[str, list[float]] = {name: [] for name in targets.structures}
        # Evenly spread over all scans: the same ones at every validation.
        number = min(len(scans), self.num_validation_cases or len(scans))
        for scan in (scans[index * len(scans) // number] for index in range(number)):
            image = intensity.apply(scan.to_values(scan.read((0, 0, 0), scan.shape)), scan.statistics)
            padding = padding_values(intensity, scan.statistics)
            logits = sliding_logits(module.logits, torch.from_numpy(image), windows, padding=padding, device=device)
            predicted = targets.labels_of(targets.probabilities(logits)).numpy()
            reference = scan.read_label((0, 0, 0), scan.shape)
            annotated = annotated_values(scan.case, labels)
            for name, dice in dice_by_name(predicted, reference, targets.structures, targets.ignore_label).items():
                is_known = annotated is None or annotated.issuperset(targets.structures[name])
                if is_known and not math.isnan(dice):
                    scores[name].append(dice)
        means = {name: float(np.mean(values)) for name, values in scores.items() if values}
        named = {f"dice/{name}": dice for name, dice in means.items()}
        return {"dice": float(np.mean(list(means.values()))) if means else 0.0, **named}

    def predictor(self, networks: Sequence[TrainedNetwork], settings: PredictionSettings) -> Predictor:
        from mim3d.tasks.segmentation.prediction import SegmentationPredictor

        return SegmentationPredictor(networks, settings)

    @classmethod
    def score(cls, settings: EvaluationSettings) -> Scores:
        from mim3d.tasks.segmentation.evaluation import LabelEvaluation

        return LabelEvaluation(settings).scores()

    def export_form(self, network: TrainedNetwork) -> ExportForm:
        targets: Targets = network.module.targets
        return ExportForm(
            program=LogitsProgram(network.module).eval(),
            channels=targets.names,
            activation=targets.activation,
            label_values=targets.label_values,
            input_size=self._patch_size(),
            overlap=self.overlap,
            mirror_axes=self.mirror_axes,
            purpose="A segmentation network for volumes: one label map for each scan.",
            pipeline="image-segmentation",
        )

    def _patch_size(self) -> Triple:
        if self.patch_size is None:
            raise ConfigError("patch_size is not planned yet; give one, such as [96, 96, 96].")
        return self.patch_size
