"""The contract of a task: how a network learns from labels, and how a trained one predicts, is scored and exported.

A user's own task is a frozen dataclass that extends :class:`Task`, or one of mim3d's own tasks. It is named by its
dotted path on the command line: ``--task my_lab.task.MyTask``. What it needs to train is abstract here. What a trained
network can do beyond that is refused in one sentence until the task says how it is done.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Backbone
from mim3d.caching.cache import Cache
from mim3d.caching.preprocessing import Prepared, Preprocessing
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.names import number_of, printable
from mim3d.core.types import Triple
from mim3d.datasets.cases import Case
from mim3d.datasets.published.presets import Preset
from mim3d.datasets.splits import Split
from mim3d.inference import scores_bytes
from mim3d.inference.input_range import InputRange
from mim3d.loading.samples import Augment, Sampler
from mim3d.objective import Objective
from mim3d.scans.intensity import Intensity
from mim3d.tasks.augmentation import Augmentation
from mim3d.training.schedule import Optimisation

if TYPE_CHECKING:
    from mim3d.tasks.evaluation import EvaluationSettings, Scores

#: Formats that label maps are written in. ``auto`` is that of the source.
Format = Literal["auto", "nii.gz", "nrrd", "mha", "dicom_seg"]


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Settings of a task: what a user writes and YAML stores."""

    #: Score (higher is better) of :meth:`validate` by which the best weights are kept.
    best_by = ""

    #: What every case must come with: a ``label`` map, or the ``class`` of the whole scan.
    needs = "label"

    #: Folder of a run that receives the trained network. Weights are found in it by the name of the run alone.
    network = "segmenter"

    #: Setting that makes a sample smaller.
    sized_by = "patch_size"

    #: What settings were that cards of earlier versions lack.
    former: ClassVar[Mapping[str, Any]] = {}

    @property
    @abstractmethod
    def optimisation(self) -> Optimisation:
        """How it is trained by default; a user's own settings come on top."""

    @abstractmethod
    def checked(self, backbone: Backbone) -> Self:
        """Return these settings, once it is known that they can work on this backbone.

        Raises:
            ConfigError: They cannot. The sentence names settings that do.
        """

    @classmethod
    def of_preset(cls, preset: Preset, patch_size: Triple) -> Self:
        """Return the settings of this task that are published for a data set; a user's own settings come on top.

        Args:
            preset: Preset of the data set.
            patch_size: Its patch, voxels along X, Y, Z, rounded up to what the encoder can take.

        Raises:
            ConfigError: No data set is published for this task.
        """
        raise ConfigError(f"the task {cls.__name__} is that of no preset; give it a class method `of_preset`.")

    def lacks(self, case: Case) -> str | None:
        """Say what a case lacks to be learned from; such cases are left out. None where it has everything."""
        if case.split == "test":
            # Neither learned from nor validated on.
            return None
        if self.needs == "label" and case.label is None:
            return f"no label for {case.id}; add its label map, or take the case out"
        if self.needs == "class" and case.class_name is None:
            return f"no class for {case.id}; name it in the column class of a list, or take the case out"
        return None

    def check_split(self, split: Split) -> None:
        """Refuse cases that cannot be learned from, before anything is prepared; label maps are checked when read.

        Raises:
            DataError: The sentence names the cases.
        """
        return

    def check_labels(self, labels: Mapping[int, str]) -> None:
        """Refuse settings that name labels which the data set lacks, before anything is prepared.

        Args:
            labels: Label value -> name as the data set declares them. It is empty where it declares nothing.

        Raises:
            ConfigError: The sentence names the label.
        """
        return

    def classes_of(self, scans: Cache) -> dict[int, str]:
        """Return value -> name of what the network tells apart: the labels of the scans' maps, background 0 included.

        A value that the data set declares as ignored is among them, so that a task can name it as its ``ignore_label``.

        Raises:
            DataError: There is nothing to tell apart.
        """
        if not any(value != 0 for value in scans.labels):
            raise DataError(
                f"{scans.path}: no label but background in {number_of(len(scans), 'scan')}; check the label files."
            )
        return scans.label_values

    def validation_bytes(self, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> int:
        """Return the bytes a validation holds besides the network: scores of every label for the largest scan."""
        return max((scores_bytes(scan.shape, len(labels)) for scan in scans), default=0)

    @abstractmethod
    def planned(self, backbone: Backbone, scans: Sequence[CachedScan], labels: Mapping[int, str]) -> Self:
        """Return these settings with everything that depends on the data filled in.

        Args:
            backbone: Settings of the encoder.
            scans: The training scans.
            labels: Label value -> name, background 0 included.

        Raises:
            ConfigError: The settings cannot work on these scans.
        """

    @abstractmethod
    def summary(self) -> list[str]:
        """Return the lines that are printed before training: what a sample is, and what one should know of it."""

    def details(self) -> list[str]:
        """Return further lines, which the manifest has and ``verbose`` prints: how samples are varied."""
        return []

    @abstractmethod
    def sampler(self) -> Sampler:
        """Return what chooses the places of a scan that one sample needs, before anything is read."""

    @abstractmethod
    def augment(self) -> Augment | None:
        """Return what changes a sample once it was read; None for nothing."""

    @abstractmethod
    def build(self, backbone: Backbone, labels: Mapping[int, str]) -> Objective:
        """Build the module that the loop trains. A trained network is loaded into the same module again."""

    @abstractmethod
    def validate(
        self, objective: Objective, scans: Sequence[CachedScan], intensity: Intensity, labels: Mapping[int, str]
    ) -> dict[str, float]:
        """Return scores by name on held-out scans of the cache; quick, for choosing the best weights."""

    def predictor(self, networks: Sequence["TrainedNetwork"], settings: "PredictionSettings") -> "Predictor":
        """Return what `mim3d predict` asks about scans. The task is that of the first network.

        Args:
            networks: One network, or an ensemble of several. All are of this class of task.
            settings: How the user wants scans to be predicted.

        Raises:
            ConfigError: Networks that do not belong together, or settings that cannot work.
        """
        raise ConfigError(f"the task {type(self).__name__} cannot predict; give it a method `predictor`.")

    @classmethod
    def score(cls, settings: "EvaluationSettings") -> "Scores":
        """Score predictions against references, for `mim3d evaluate`.

        Raises:
            ConfigError: The task scores nothing, or a setting cannot work.
            DataError: Predictions or references cannot be scored.
        """
        raise ConfigError(f"the task {cls.__name__} cannot score predictions; give it a class method `score`.")

    def export_form(self, network: "TrainedNetwork") -> "ExportForm":
        """Return what other programs must know of a trained network of this task.

        Raises:
            ConfigError: The task cannot be exported.
        """
        raise ConfigError(
            f"the task {type(self).__name__} cannot be exported; give it a method `export_form`, or export the encoder "
            "alone with --network encoder."
        )


class CropTask(Task):
    """A task that learns from crops: their size and variation can be planned from the voxels of the data set.

    A task of this kind has these as fields, in an order of its own.

    Attributes:
        patch_size: Voxels of one crop along X, Y, Z; None is open.
        positive_ratio: Share of the crops that are centred on a structure.
        augmentation: How crops are varied.
        ignore_label: Label value of voxels that nothing is learned from; None where there is none.
    """

    patch_size: Triple | None
    positive_ratio: float
    augmentation: Augmentation
    ignore_label: int | None

    @property
    def named_values(self) -> Sequence[int]:
        """Label values that the settings name, for data sets that declare none."""
        return () if self.ignore_label is None else (self.ignore_label,)

    def named_structures(self, labels: Mapping[int, str]) -> dict[int, str]:
        """Return the names of all that a crop may show. They tell along which axes crops may be mirrored.

        Args:
            labels: Label value -> name. What is no label is added below 0.
        """
        return dict(labels)


@dataclass(frozen=True, kw_only=True)
class TrainedNetwork:
    """A trained network with all that it takes to use it.

    Attributes:
        path: Where it was loaded from, as the user named it.
        card: What lies beside its weights.
        module: What the task built, in evaluation mode, on ``device``. Its type is the task's own knowledge.
        task: Settings of the task it was trained for, as they were planned. Their type is the task's own, too.
        labels: Label value, or number of the class -> name.
        num_channels: Number of images per scan.
        preprocessing: How scans are prepared, as in training.
        intensity: How intensities are mapped to network input, as in training.
        digest: SHA-256 of its weights.
        device: Where it computes.
        input_range: What it learned from, in ranges; None where its card does not say, as those of earlier versions.
    """

    path: str
    card: Mapping[str, Any]
    module: Any
    task: Any
    labels: Mapping[int, str]
    num_channels: int
    preprocessing: Preprocessing
    intensity: Intensity
    digest: str
    device: torch.device
    input_range: InputRange | None = None

    @property
    def channel_names(self) -> tuple[str, ...]:
        """What the images of a scan were called in training; empty where its card does not say."""
        names = self.card.get("channel_names")
        known = [printable(str(name)) for name in names] if isinstance(names, list) else []
        return tuple(known) if len(known) == self.num_channels else ()

    @property
    def in_hu(self) -> tuple[bool, ...]:
        """For each channel whether it learned from CT in HU; empty where its card does not say."""
        return () if self.input_range is None else self.input_range.in_hu

    def warnings_on(self, prepared: Prepared) -> list[str]:
        """Sentences on what of a scan lies far outside of what it learned from."""
        return [] if self.input_range is None else self.input_range.warnings_on(prepared)

    def check_channels(self, case: Case) -> None:
        """Refuse a scan of another number of images than the network was trained on.

        Raises:
            DataError: The sentence names the scan and both numbers.
        """
        if len(case.images) != self.num_channels:
            raise DataError(
                f"{case.images[0]}: {number_of(len(case.images), 'image')} where the network was trained on "
                f"{self.num_channels}; list the images (channels) of a scan separated by ';' in a CSV."
            )


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How scans are predicted; a task takes what means something to it.

    Attributes:
        overlap: Share of a window that its neighbour sees too; that of the task if not given.
        batch_size: Number of windows, or of scans to classify, per call of the network.
        mirror: Average over mirrored windows, along the axes mirrored in training; as the task says if not given.
        body_only: Cover the body alone: windows over the box around it, without those that hold nothing but air or
            background; what no window covers is background. False covers the whole scan.
        probabilities: Write OUT/<id>_probabilities.nii.gz too: float32, one volume per class (background first) or
            region, before any clean-up; predictions.json names them as `channels`.
        largest_component: Keep the largest connected component (26 neighbours) alone: true for every label, or the
            names of labels.
        min_component_ml: Remove connected components (26 neighbours) smaller than this, in millilitres.
        format: Format of label maps: nii.gz, nrrd, mha, dicom_seg (for DICOM series; needs the extra `dicom`), or auto:
            as the source, NIfTI for DICOM series. A dicom_seg file carries the patient's name and number on purpose,
            which ties it to the patient in an archive.
        precision: Precision of the networks that segment: 32-true, bf16-mixed or 16-mixed; auto is bf16-mixed where
            this device is good at it, else 32-true, and what a folder was begun with. Scores are summed, and classes of
            whole scans computed, in float32.
    """

    overlap: float | None = None
    batch_size: int = 4
    mirror: bool | None = None
    body_only: bool = True
    probabilities: bool = False
    largest_component: bool | list[str] = False
    min_component_ml: float = 0.0
    format: Format = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"


class Predictor(ABC):
    """One trained network, or an ensemble of several, that predicts scan after scan.

    The workflow of `mim3d predict` keeps the folder, the list in it, progress, failures and what is finished already.

    Attributes:
        done: What happens to a scan, as a participle for messages.
        list_name: File that lists the scans that are done and those that could not be.
        failures_name: File that holds the reasons of scans that could not be done.
        table_name: Table of all scans that :meth:`write_tables` writes; None where there is none.
        must_match: Entries of :attr:`identity` that must be the same for predictions to lie in one folder.
        reads_labels: Whether scans are read with their labels.
        memory_remedy: What a user can do where memory is short.
    """

    done = "predicted"
    list_name = "predictions.json"
    failures_name = "predictions.json"
    table_name: str | None = None
    must_match: tuple[str, ...] = ("weights_digests",)
    reads_labels = False
    memory_remedy = "use a smaller --batch_size"

    def __init__(self, networks: Sequence[TrainedNetwork], settings: PredictionSettings) -> None:
        self.networks = tuple(networks)
        self.settings = settings

    @property
    def notes(self) -> Sequence[str]:
        """Phrases, each a line, on how every prediction is made; they are printed before the first."""
        return ()

    @property
    def scans_per_call(self) -> int:
        """Number of scans that are given to :meth:`predict` at a time."""
        return 1

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What the predictions come from, as plain values; it stands at the head of their list."""

    def accepted(self, cases: Sequence[Case]) -> Sequence[Case]:
        """Return the scans as they are to be read, once it is known that all of them can be written.

        Raises:
            ConfigError: The sentence names the first scan that does not suit the settings.
        """
        return cases

    def files_of(self, case: Case) -> dict[str, str]:
        """Return the names of the files that a scan's prediction is written to, by their entry in the list."""
        return {}

    def read(self, case: Case) -> Any:
        """Return what :meth:`predict` takes of a scan. It runs in a thread of its own, while other scans are predicted.

        Raises:
            DataError: The scan cannot be used.
        """
        return None

    @abstractmethod
    def predict(
        self, cases: Sequence[Case], inputs: Sequence[Any], folder: Path, on_windows: Callable[[int, int], None]
    ) -> Sequence[Any]:
        """Predict scans, and return what :meth:`write` takes of each: unless it is overridden, what the list shall say.

        Args:
            cases: The scans.
            inputs: What :meth:`read` returned for each.
            folder: Folder that the files of :meth:`files_of` are written to.
            on_windows: Called with the number of windows that are done and their number in all.

        Raises:
            DataError: A scan cannot be used.
        """

    def write(self, case: Case, answer: Any, folder: Path) -> Mapping[str, Any]:
        """Write the files of a scan, and return what the list shall say of it beside its id and files.

        It runs in a thread of its own, while other scans are predicted.

        Args:
            case: The scan.
            answer: What :meth:`predict` returned for it.
            folder: Folder that the files of :meth:`files_of` are written to.

        Raises:
            DataError: A file cannot be written.
        """
        entry: Mapping[str, Any] = answer
        return entry

    def write_tables(self, folder: Path, rows: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str]) -> None:
        """Write tables of all scans beside the list; nothing by default.

        Args:
            folder: Folder of the predictions.
            rows: What the list says of every scan that is done, by id.
            failures: Reasons of those that could not be, by id.
        """
        return


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportForm:
    """What other programs must know of a network.

    Attributes:
        program: Maps ``image`` ``(B, C, X, Y, Z)`` float32 to one tensor for each of ``outputs``.
        outputs: Names of what the program gives.
        channels: What the channels of the logits stand for, in their order; empty where there are no logits.
        activation: What turns logits into probabilities: ``softmax`` or ``sigmoid``; None where there are no logits.
        label_values: Label value that each channel gives in a label map; empty where no label map is made. A MONAI
            bundle needs them.
        input_size: Voxels of the input along X, Y, Z in training; None where that is not known.
        overlap: Share of a window that its neighbour sees too, where scans are covered with windows.
        mirror_axes: Axes (0 X, 1 Y, 2 Z) along which windows are mirrored too at prediction.
        box: What the input shows of a scan, in plain values by name, where it is no window at the scan's voxel size.
        purpose: A sentence for the README that says what the network does.
        pipeline: What Hugging Face calls what the network does.
    """

    program: nn.Module
    outputs: tuple[str, ...] = ("logits",)
    channels: tuple[str, ...] = ()
    activation: str | None = None
    label_values: tuple[int, ...] = ()
    input_size: Triple | None = None
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    box: Mapping[str, Any] | None = None
    purpose: str
    pipeline: str


class LogitsProgram(nn.Module):
    """A task's module as a program that gives its logits.

    Args:
        module: A module with a method ``logits``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.objective: Any = module

    def forward(self, image: Tensor) -> Tensor:
        """Return logits ``(B, K, X, Y, Z)`` of voxels, or ``(B, K)`` of whole samples."""
        logits: Tensor = self.objective.logits(image)
        return logits
