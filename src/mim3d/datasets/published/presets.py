"""What is known of a published data set before a file is opened: a preset, found by name or by dotted path.

Spacing, patches, intensities and probabilities are those of the published fine-tuning experiments; the base learning
rate and the number of epochs were not published and are ours.
"""

import re
from dataclasses import dataclass, field
from functools import lru_cache
from pkgutil import resolve_name
from typing import Literal

from mim3d.core.errors import ConfigError
from mim3d.core.own_code import is_dotted_path
from mim3d.core.settings import imported, nearest
from mim3d.core.types import Spacing, Triple
from mim3d.scans.intensity import Intensity

#: Where each preset is defined. A new set is one file and one line here; a user's own is named by dotted path.
PRESETS: dict[str, str] = {
    "BTCV": "mim3d.datasets.published.sets.btcv:BTCV",
    "MM-WHS CT": "mim3d.datasets.published.sets.mm_whs:MM_WHS",
    "MSD Spleen": "mim3d.datasets.published.sets.spleen:MSD_SPLEEN",
    "MSD Liver": "mim3d.datasets.published.sets.liver:MSD_LIVER",
    "MSD Lung": "mim3d.datasets.published.sets.lung:MSD_LUNG",
    "MSD Pancreas": "mim3d.datasets.published.sets.pancreas:MSD_PANCREAS",
    "MSD HepaticVessel": "mim3d.datasets.published.sets.hepatic_vessel:MSD_HEPATIC_VESSEL",
    "MSD Colon": "mim3d.datasets.published.sets.colon:MSD_COLON",
    "AMOS22": "mim3d.datasets.published.sets.amos22:AMOS22",
    "FLARE22": "mim3d.datasets.published.sets.flare22:FLARE22",
    "COVID-19-20": "mim3d.datasets.published.sets.covid_19_20:COVID_19_20",
    "BraTS": "mim3d.datasets.published.sets.brats:BRATS",
    "CC-CCII": "mim3d.datasets.published.sets.cc_ccii:CC_CCII",
}

#: Pattern of the suffixes of a NIfTI file.
NIFTI = r"\.nii(\.gz)?"


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Probabilities with which crops are augmented; what is not published for a set is not done.

    Attributes:
        flip_prob: Probability of a flip along each axis.
        rotate90_prob: Probability of a quarter turn.
        shift_prob: Probability of an offset of up to 0.1 on the mapped intensities.
        affine_prob: Probability of a small rotation and zoom.
        noise_prob: Probability of Gaussian noise.
    """

    flip_prob: float
    rotate90_prob: float = 0.0
    shift_prob: float = 0.0
    affine_prob: float = 0.0
    noise_prob: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FileNames:
    """Names of the images and label maps of a data set, whatever folders lie above them.

    Attributes:
        image: Regular expression for the end of an image's path, with the number of its case as the group ``case``.
        label: Regular expression for the end of a label map's path, with the same group.
        example: Both names for a message, with ``{0}`` for the number of the case.
        num_digits: Number of digits to which the numbers of cases are filled up with zeros in file names.
    """

    image: str
    label: str
    example: str
    num_digits: int = 4

    def names_of(self, number: str) -> str:
        """The names of a case's files, for a message."""
        first, line, more = number.partition("_")
        return self.example.format(first.zfill(self.num_digits) + line + more)


@dataclass(frozen=True, kw_only=True, eq=False)
class Preset:
    """A published data set and how networks are fine-tuned on it.

    Attributes:
        name: Name of the set as papers write it.
        aliases: Other names that people type; case, blanks and punctuation never matter.
        task: Name of the task.
        modality: "CT" or "MRI".
        channels: Name of each input channel, in order.
        labels: Label value -> name, background 0 included; empty for a classification.
        classes: Name of a scan's class as the owners write it -> its meaning; empty for a segmentation.
        regions: Name -> label values, for sets that are scored on overlapping regions; None elsewhere.
        num_cases: Number of labelled cases that the owners publish.
        spacing_mm: Voxel size along X, Y, Z to resample to; None keeps each scan's own.
        patch_size: Voxels of a crop along X, Y, Z.
        larger_patch_size: Alternative crop for large memory, where one is usual.
        intensity: Mapping of intensities to network input.
        variation: Augmentation of crops; None keeps the default of the task.
        nsd_tolerance_mm: Tolerance of the normalised surface distance, in millimetres.
        files: Names of the files of a segmentation; None for a classification, whose scans are folders of slice images.
        folds: For each published fold the numbers of the cases that it holds out, such as ``"7-10 21 167_1"``. Empty
            where nobody published folds: the cases 1 to ``num_cases`` are then split by patient with seed 0.
        num_folds: Number of folds.
        overlap: Overlap of sliding windows in validation; 0.75 is usual for final scores.
        base_learning_rate: Learning rate of AdamW at ``reference_batch`` crops per step.
        reference_batch: Number of crops per step that the learning rate is meant for.
        weight_decay: Weight decay of AdamW.
        epochs: Number of passes over the training cases.
        warmup_epochs: Number of epochs of linear warm-up, before a cosine schedule.
        positive_ratio: Share of crops around a structure; 0.5 is 1:1.
        citation: Publication to cite.
        url: Address where the owners publish the set.
    """

    name: str
    aliases: tuple[str, ...] = ()
    task: Literal["segmentation", "classification"] = "segmentation"
    modality: str = "CT"
    channels: tuple[str, ...] = ("CT",)
    labels: dict[int, str] = field(default_factory=dict)
    classes: dict[str, str] = field(default_factory=dict)
    regions: dict[str, tuple[int, ...]] | None = None
    num_cases: int
    spacing_mm: Spacing | None
    patch_size: Triple = (96, 96, 96)
    larger_patch_size: Triple | None = None
    intensity: Intensity
    variation: Variation | None = None
    nsd_tolerance_mm: float = 1.0
    files: FileNames | None = None
    folds: tuple[str, ...] = ()
    num_folds: int = 5
    overlap: float = 0.5
    base_learning_rate: float = 3e-4
    reference_batch: int = 16
    weight_decay: float = 1e-5
    epochs: int = 300
    warmup_epochs: int = 50
    positive_ratio: float = 0.5
    citation: str
    url: str

    def __post_init__(self) -> None:
        if (self.files is None) != (self.task == "classification"):
            raise ConfigError(
                f"preset {self.name} is for {self.task}; a segmentation needs the names of its files, and a "
                "classification of folders with slice images has none."
            )
        if self.folds and len(self.folds) != self.num_folds:
            raise ConfigError(
                f"preset {self.name} lists {len(self.folds)} folds, but num_folds is {self.num_folds}; make them equal."
            )


def numbered(*names: str) -> dict[int, str]:
    """Label value -> name for labels without gaps: background 0, then the names from 1 on."""
    return dict(enumerate(("background", *names)))


@lru_cache
def published_presets() -> dict[str, Preset]:
    """Every preset of ``PRESETS`` by its name."""
    return {name: resolve_name(place) for name, place in PRESETS.items()}


def find_preset(name: str) -> Preset:
    """Find a preset.

    Args:
        name: A name or an alias, in which case, blanks and punctuation do not matter; or the dotted path of a preset of
            the user's own (``my_lab.presets.MY_SET``), which is imported.

    Raises:
        ConfigError: There is no such preset (the nearest names are offered), or the path does not lead to a preset.
    """
    known = {alias: preset for preset in published_presets().values() for alias in (preset.name, *preset.aliases)}
    found = {plain(alias): preset for alias, preset in known.items()}.get(plain(name))
    if found is not None:
        return found
    if is_dotted_path(name):
        own = imported(name, "preset")
        if not isinstance(own, Preset):
            kind = "a class" if isinstance(own, type) else f"a {type(own).__name__}"
            raise ConfigError(f"preset '{name}' is {kind}; name an object of the class Preset.")
        return own
    close = nearest(name, known)
    raise ConfigError(f"There is no preset '{name}'.{close if 'mean' in close else nearest(name, PRESETS)}")


def plain(name: str) -> str:
    """A name in lower case without blanks and punctuation, for comparisons."""
    return re.sub(r"[^a-z0-9]", "", name.lower())
