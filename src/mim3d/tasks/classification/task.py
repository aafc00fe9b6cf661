"""Classification: every scan belongs to one class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch

from mim3d.backbones.contract import Backbone, check_axes, check_patch
from mim3d.caching.cache import Cache
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.names import number_of
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.datasets.published.presets import Preset
from mim3d.datasets.splits import Split
from mim3d.loading.samples import SampleDataset
from mim3d.metrics import Bootstrap, classification_scores
from mim3d.objective import Objective, crop_tokens
from mim3d.scans.intensity import Intensity
from mim3d.tasks.augmentation import Augmentation, published_augmentation
from mim3d.tasks.classification.cubes import Cube, CubeFinisher, CubeSampler, extents_mm, planned_size
from mim3d.tasks.contract import ExportForm, LogitsProgram, PredictionSettings, Predictor, Task, TrainedNetwork
from mim3d.tasks.evaluation import EvaluationSettings, Scores
from mim3d.tasks.freezing import check_freezing, freezing_lines
from mim3d.training.schedule import Optimisation

#: Share of the scans that a planned box holds along each axis, in percent.
COVERED_PERCENT = 95

#: A box around labelled structures is larger than they are, so that what lies around them is seen too.
CONTEXT_RATIO = 1.5

#: Scores of a validation, by their names in :data:`mim3d.metrics.classification.CONVENTIONS`.
VALIDATED_SCORES = ("auc", "accuracy", "balanced_accuracy", "f1_macro")

#: Longest edge of a box: that of no scan.
LARGEST_BOX_MM = 10_000

#: Voxels of all boxes of one call of the network at validation.
VALIDATED_VOXELS = 2 * 96**3


@dataclass(frozen=True, kw_only=True)
class Classification(Task):
    """Settings of the classification task: a class for every scan.

    Attributes:
        fit: `box` cuts a box of `cube_mm` from every scan, so that all are seen on one scale; `scan` stretches the
            whole scan onto `size`, for stacks of images of unknown voxel size.
        cube_mm: Edge of the box in millimetres, or its edges along X, Y, Z. None plans what holds 95 % of the training
            scans along each axis (around labels: one and a half times what holds 95 % of the labelled structures).
        size: Voxels that the network sees, multiples of the encoder's token edge. None plans them: the voxels of the
            median training scan, at most 96 along each axis.
        centre: Middle of the box: that of the `scan`, or the centre of mass of its `label`. None plans the label where
            every training scan has one. Scans to be predicted then need theirs too.
        shift_ratio: Largest share of the box's edge by which it is moved in training, along each axis.
        pooling: `mean` of the encoder's tokens, or a weighted mean with learned weights (`attention`).
        class_weights: Weight of each class in the loss, in the order of their names; `balanced` takes the inverse of
            the number of its training scans.
        dropout: Share of the pooled features that a training step leaves out.
        label_smoothing: Share of the target that is spread over all classes.
        augmentation: How boxes are varied. Where size tells classes apart, keep zoom_ratio small.
        freeze_encoder: Whether pooling and the last layer alone are trained (linear probing).
        unfreeze_ratio: Share of training after which the whole encoder learns; until then its layers begin to, one
            after the other, from its output down to the stem. None lets all of it learn from the beginning.
        mirror_axes: Axes (0 X, 1 Y, 2 Z) mirrored at prediction, in every combination; among the augmentation's flip
            axes.
        class_counts: Class -> number of its training scans, filled in by the plan.
        covered: Share of the training scans (or labelled structures) that the box holds whole, filled in by the plan.
    """

    fit: Literal["box", "scan"] = "box"
    cube_mm: float | Spacing | None = None
    size: int | Triple | None = None
    centre: Literal["scan", "label"] | None = None
    shift_ratio: float = 0.05
    pooling: Literal["mean", "attention"] = "mean"
    class_weights: Literal["balanced"] | tuple[float, ...] = "balanced"
    dropout: float = 0.1
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    freeze_encoder: bool = False
    unfreeze_ratio: float | None = None
    mirror_axes: tuple[int, ...] = ()
    class_counts: dict[str, int] | None = None
    covered: float | None = None

    best_by = "auc"
    needs = "class"
    network = "classifier"
    sized_by = "size"

    def __post_init__(self) -> None:
        check_freezing(self.freeze_encoder, self.unfreeze_ratio)
        for name in ("shift_ratio", "dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1 (1 excluded).")
        if self.cube_mm is not None and not all(0 < edge <= LARGEST_BOX_MM for edge in _three(self.cube_mm)):
            raise ConfigError(
                f"cube_mm is {self.cube_mm}; it takes millimetres above 0 and at most {LARGEST_BOX_MM:,}, such as 48."
            )
        if self.fit == "scan" and (self.cube_mm is not None or self.centre == "label"):
            raise ConfigError("fit scan takes the whole scan; leave cube_mm and centre out, or use fit box.")
        check_axes(self.mirror_axes, "mirror_axes")
        weights = self.class_weights
        if weights != "balanced" and not (min(weights, default=0.0) >= 0 and sum(weights) > 0):
            raise ConfigError(f"class_weights {list(weights)} must be zero or more, and one above zero.")

    @property
    def optimisation(self) -> Optimisation:
        """AdamW with a rate that suits batches of 8 to 32 boxes, and more decay than segmentation: labels are few."""
        return Optimisation(learning_rate=3e-4, weight_decay=0.05, betas=(0.9, 0.999), warmup_ratio=0.05, clip_norm=1.0)

    @classmethod
    def of_preset(cls, preset: Preset, patch_size: Triple) -> Self:
        return cls(fit="scan", size=patch_size, augmentation=published_augmentation(preset))

    def checked(self, backbone: Backbone) -> "Classification":
        if self.size is not None:
            check_patch(_whole(self.size), backbone.input_multiple, "size")
        return self

    def lacks(self, case: Case) -> str | None:
        if self.centre == "label" and case.label is None:
            return f"no label for {case.id}, though centre is label; add its label map, or use centre scan"
        return super().lacks(case)

    def check_split(self, split: Split) -> None:
        """Refuse cases without a class or an asked-for label, classes held out alone, and weights that do not fit.

        Raises:
            DataError: The sentence names the cases or classes.
            ConfigError: Class weights do not fit the classes.
        """
        missing = [case.id for case in (*split.train, *split.val) if case.class_name is None]
        if missing:
            raise DataError(
                f"no class for {listed(missing)} ({number_of(len(missing), 'case')}); classification needs one of "
                "every case: give a CSV or JSON list with the column class."
            )
        unlabelled = [case.id for case in (*split.train, *split.val) if case.label is None]
        if self.centre == "label" and unlabelled:
            raise DataError(
                f"centre is label, but there is no label for {listed(unlabelled)} "
                f"({number_of(len(unlabelled), 'case')}); add the labels, leave these cases out, or use centre scan."
            )
        classes = {case.class_name for case in split.train}
        if len(classes) < 2:
            raise DataError(f"all training cases are of class '{next(iter(classes))}'; at least two are needed.")
        unknown = sorted({str(case.class_name) for case in split.val} - {str(name) for name in classes})
        if unknown:
            raise DataError(
                f"class {listed(unknown)} is among the held-out cases, but not among the training cases; use fewer "
                "folds, or leave these cases out."
            )
        if self.class_weights != "balanced" and len(self.class_weights) != len(classes):
            raise ConfigError(
                f"class_weights has {len(self.class_weights)} values, but the data have {len(classes)} classes: "
                f"{', '.join(sorted(map(str, classes)))}."
            )

    def classes_of(self, scans: Cache) -> dict[int, str]:
        """Return number -> name of every class, sorted by name.

        Raises:
            DataError: There are fewer than two.
        """
        names = sorted({name for scan in scans if (name := scan.case.class_name) is not None})
        if len(names) < 2:
            raise DataError(
                f"{scans.path}: fewer than two classes among {number_of(len(scans), 'scan')}; check the column class."
            )
        return dict(enumerate(names))

    def planned(self, backbone: Backbone, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> "Classification":
        """Return these settings with box, size, centre, flip axes and class weights filled in.

        Args:
            backbone: Settings of the encoder.
            scans: The training scans.
            labels: Number of each class -> its name.

        Raises:
            ConfigError: The size does not fit the backbone, or boxes would be mirrored as they never were.
        """
        placed = self._placed(backbone, scans)
        voxel_mm = placed.cube().voxel_mm or (1.0, 1.0, 1.0)
        # The names of classes may name sides too, the first one's included, which for label maps is the background.
        named = {value + 1: name for value, name in labels.items()}
        augmentation = self.augmentation.planned(named, voxel_mm)
        augmentation.check_mirrors(self.mirror_axes, named, "class")
        counts = {name: sum(scan.case.class_name == name for scan in scans) for _, name in sorted(labels.items())}
        weights = self.class_weights
        if weights == "balanced":
            # By the inverse of the number of scans; their mean over the scans is 1.
            known = [count for count in counts.values() if count]
            weights = tuple(sum(known) / (len(known) * count) if count else 0.0 for count in counts.values())
        planned = replace(placed, augmentation=augmentation, class_weights=weights, class_counts=counts)
        return planned.checked(backbone)

    def summary(self) -> list[str]:
        """Return the lines that are printed before training: the box and the classes."""
        cube = self.cube()
        voxels = " x ".join(map(str, cube.size))
        if cube.voxel_mm is None:
            box = f"whole scans, stretched onto {voxels} voxels"
        else:
            edges = " x ".join(f"{edge:g}" for edge in _three(self.cube_mm or 1.0))
            sizes = " x ".join(f"{edge:.3g}" for edge in cube.voxel_mm)
            middle = "the label's centre of mass" if self.centre == "label" else "the middle of the scan"
            box = f"boxes of {edges} mm around {middle}, seen as {voxels} voxels of {sizes} mm"
            structures = "labelled structures" if self.centre == "label" else "training scans"
            box += "" if self.covered is None else f"; {self.covered:.0%} of the {structures} lie whole in them"
        weights = self.class_weights if self.class_weights != "balanced" else ()
        classes = ", ".join(
            f"{name} {number_of(count, 'scan')} (weight {weight:.3g})"
            for (name, count), weight in zip((self.class_counts or {}).items(), weights, strict=False)
        )
        frozen = freezing_lines(self.freeze_encoder, self.unfreeze_ratio, "pooling and the last layer are")
        return [box, f"classes: {classes}", *frozen]

    def details(self) -> list[str]:
        return [f"boxes are {self.augmentation.describe()}"]

    def sampler(self) -> CubeSampler:
        varied = self.augmentation
        return replace(
            self.exact_sampler(tuple(self.class_counts or ())),
            shift_ratio=self.shift_ratio,
            affine_prob=varied.affine_prob,
            margin_ratio=varied.margin_ratio,
        )

    def exact_sampler(self, classes: tuple[str, ...]) -> CubeSampler:
        """Return what gives the same box of every scan each time, as validation and prediction see it."""
        return CubeSampler(self.cube(), self.centre == "label", classes)

    def augment(self) -> CubeFinisher:
        from mim3d.tasks.transforms import Augmenter

        cube = self.cube()
        return CubeFinisher(Augmenter(self.augmentation, cube.size, cube.voxel_mm or (1.0, 1.0, 1.0)))

    def build(self, backbone: Backbone, labels: Mapping[int, str]) -> Objective:
        """Build encoder, pooling and last layer, freshly initialised."""
        from mim3d.tasks.classification.network import ClassificationObjective

        objective = ClassificationObjective(backbone.build(), num_classes=len(labels), settings=self)
        if self.size is not None:
            objective.tokens_per_sample = crop_tokens(_whole(self.size), backbone.token_size)
        return objective

    def validate(
        self, objective: Objective, scans: Sequence[CachedScan], intensity: Intensity, labels: Mapping[int, str]
    ) -> dict[str, float]:
        """Return AUC, accuracy, balanced accuracy and macro F1, see :func:`class_scores`.

        Mirrored boxes are averaged as in prediction, and computed in float32 whatever the run's precision, so that
        `mim3d evaluate` finds the same scores: few digits make ties, which the AUC counts half.
        """
        module: Any = objective
        device = next(module.parameters()).device
        sampler = self.exact_sampler(tuple(name for _, name in sorted(labels.items())))
        step = max(1, min(32, VALIDATED_VOXELS // math.prod(sampler.cube.size)))
        probabilities, classes = [], []
        for start in range(0, len(scans), step):
            # A data set of a scan alone, since one of several gives them in an order of its own.
            samples = [
                SampleDataset([scan], sampler, intensity, 0, CubeFinisher(), strict=True)[0]
                for scan in scans[start : start + step]
            ]
            images = torch.cat([sample["image"] for sample in samples]).to(device)
            with torch.autocast(device.type, enabled=False):
                probabilities.append(module.probabilities(images, self.mirror_axes).cpu().double().numpy())
            classes += [int(sample["class"]) for sample in samples]
        patients = [scan.case.patient for scan in scans]
        return class_scores(np.concatenate(probabilities), np.array(classes, dtype=np.int64), patients)

    def validation_bytes(self, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> int:
        """Return 0: nothing of a scan's size is held, as boxes are validated as they are trained."""
        return 0

    def predictor(self, networks: Sequence[TrainedNetwork], settings: PredictionSettings) -> Predictor:
        from mim3d.tasks.classification.prediction import ClassificationPredictor

        return ClassificationPredictor(networks, settings)

    @classmethod
    def score(cls, settings: EvaluationSettings) -> Scores:
        from mim3d.tasks.classification.evaluation import ClassEvaluation

        return ClassEvaluation(settings).scores()

    def export_form(self, network: TrainedNetwork) -> ExportForm:
        cube = self.cube()
        return ExportForm(
            program=LogitsProgram(network.module).eval(),
            channels=tuple(name for _, name in sorted(network.labels.items())),
            activation="softmax",
            input_size=cube.size,
            box={
                "voxels": list(cube.size),
                "voxel_mm": None if cube.voxel_mm is None else list(cube.voxel_mm),
                "centre": self.centre,
            },
            purpose="A classification network for volumes: one class for each scan.",
            pipeline="image-classification",
        )

    def cube(self) -> Cube:
        """Return the box that the network sees.

        Raises:
            ConfigError: It is not planned yet.
        """
        if self.size is None or (self.fit == "box" and self.cube_mm is None):
            raise ConfigError("cube_mm and size are not planned yet; give them, such as 48 and [32, 32, 32].")
        size = _whole(self.size)
        if self.cube_mm is None:
            return Cube(size, None)
        x_mm, y_mm, z_mm = (edge / voxels for edge, voxels in zip(_three(self.cube_mm), size, strict=True))
        return Cube(size, (x_mm, y_mm, z_mm))

    def _placed(self, backbone: Backbone, scans: Sequence[CachedScan]) -> "Classification":
        """Return these settings with box, size and centre filled in."""
        multiple = backbone.input_multiple
        if self.fit == "scan":
            size = planned_size(scans, multiple, None) if self.size is None else self.size
            return replace(self, size=_whole(size), centre="scan")
        has_labels = all(any(len(voxels) for voxels in scan.class_locations.values()) for scan in scans)
        centre: Literal["scan", "label"] = self.centre or ("label" if has_labels else "scan")
        if centre == "label" and not has_labels:
            raise ConfigError(
                "centre is label, but not every training scan has a label with a structure in it; use centre scan, or "
                "leave these scans out."
            )
        extents_N3 = extents_mm(scans, around_label=centre == "label")
        if self.cube_mm is None:
            ratio = CONTEXT_RATIO if centre == "label" else 1.0
            edges = np.percentile(extents_N3, COVERED_PERCENT, axis=0) * ratio
            x, y, z = (round(float(edge), 1) for edge in edges)
        else:
            x, y, z = _three(self.cube_mm)
        size = planned_size(scans, multiple, (x, y, z)) if self.size is None else self.size
        covered = float((extents_N3 <= np.array([x, y, z]) + 1e-6).all(axis=1).mean())
        return replace(self, cube_mm=(x, y, z), size=_whole(size), centre=centre, covered=covered)


def class_scores(
    probabilities_NK: npt.NDArray[np.float64], classes_N: npt.NDArray[np.int64], patients: Sequence[str]
) -> dict[str, float]:
    """Return scores over scans, and over patients (``<score>_patient``) by mean probabilities, where those differ.

    Patients are scored where some have several scans and none has scans of several classes, as then no class would be
    theirs. An AUC that is not defined, as one class alone is there, is NaN: it chooses no weights.

    Args:
        probabilities_NK: Probabilities of K classes for each of N scans.
        classes_N: Number of the true class of each.
        patients: Patient whose scan each is.
    """
    classes_of: dict[str, set[int]] = {}
    for patient, value in zip(patients, classes_N.tolist(), strict=True):
        classes_of.setdefault(patient, set()).add(value)
    has_patients = len(classes_of) < len(patients) and all(len(values) == 1 for values in classes_of.values())
    bootstrap, found = Bootstrap(num_bootstrap=0), {}
    for by_patient in (False, True) if has_patients else (False,):
        scores = classification_scores(
            probabilities_NK, classes_N, patients=patients, by_patient=by_patient, bootstrap=bootstrap
        )["mean"]
        for name in VALIDATED_SCORES:
            key = f"{name}_patient" if by_patient else name
            found[key] = math.nan if scores[name] is None else float(scores[name])
    return found


def _three(value: float | Sequence[float]) -> tuple[float, float, float]:
    x, y, z = np.broadcast_to(np.asarray(value, dtype=np.float64), 3).tolist()
    return x, y, z


def _whole(size: int | Triple) -> Triple:
    x, y, z = (int(voxels) for voxels in _three(size))
    return x, y, z
