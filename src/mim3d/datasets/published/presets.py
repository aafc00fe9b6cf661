"""Published data sets as presets: what is known of each before a file is opened.

Spacing, patches, intensities and probabilities are those of the published fine-tuning experiments; the base learning
rate and the number of epochs were not published and are ours.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

from mim3d.core.errors import ConfigError
from mim3d.core.settings import nearest
from mim3d.core.types import Spacing, Triple
from mim3d.scans.intensity import Intensity

_MSD_CITATION = (
    "Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 4128 (2022); CC BY-SA 4.0"
)
_MSD_URL = "http://medicaldecathlon.com"


@dataclass(frozen=True, kw_only=True)
class Variation:
    """Probabilities with which crops are varied; what is not published for a set is not done.

    Attributes:
        flip_prob: of a flip along each axis.
        rotate90_prob: of a quarter turn.
        shift_prob: of an offset of up to 0.1 on the mapped intensities.
        affine_prob: of a small rotation and zoom.
        noise_prob: of Gaussian noise.
    """

    flip_prob: float
    rotate90_prob: float = 0.0
    shift_prob: float = 0.0
    affine_prob: float = 0.0
    noise_prob: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published data set and how networks are fine-tuned on it.

    Attributes:
        name: as papers write it.
        aliases: other names people type; case, blanks and punctuation never matter.
        task: name of the task.
        modality: CT or MRI.
        channels: name of each input channel, in order.
        labels: label value -> name, background 0 included; empty for a classification.
        classes: name of a scan's class as the owners write it -> what it means; empty for a segmentation.
        regions: name -> label values, for sets that are scored on overlapping regions; None elsewhere.
        num_cases: labelled cases that the owners publish.
        spacing_mm: voxel size along X, Y, Z to resample to; None keeps each scan's own.
        patch_size: voxels of a crop.
        larger_patch_size: the alternative for large memory, where one is usual.
        intensity: mapping of intensities to network input.
        variation: how crops are varied; None for the task's own way.
        nsd_tolerance_mm: of the normalised surface distance.
        folds: ``published`` lists, or ``seeded``: dealt out by patient, as nobody published any.
        num_folds: of them.
        overlap: of sliding windows in validation; 0.75 is usual for final scores.
        base_learning_rate: of AdamW at ``reference_batch`` crops per step.
        reference_batch: crops per step that the rate is meant for.
        weight_decay: of AdamW.
        epochs: passes over the training cases.
        warmup_epochs: of linear warm-up, before a cosine.
        positive_ratio: share of crops around a structure; 0.5 is 1:1.
        citation: what to cite.
        url: where the owners publish it.
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
    folds: Literal["published", "seeded"] = "published"
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


@dataclass(frozen=True, kw_only=True)
class _Task:
    """A task of the Medical Segmentation Decathlon, as far as it differs from the others."""

    number: int
    name: str
    labels: tuple[str, ...]
    num_cases: int
    spacing_mm: Spacing
    window: tuple[float, float]
    variation: Variation
    aliases: tuple[str, ...] = field(default=())

    def preset(self) -> Preset:
        """The preset of the task."""
        numbered = f"Task{self.number:02d}"
        return Preset(
            name=f"MSD {self.name}",
            aliases=(self.name, f"{numbered}_{self.name}", f"MSD {numbered} {self.name}", numbered, *self.aliases),
            labels=_numbered(self.labels),
            num_cases=self.num_cases,
            spacing_mm=self.spacing_mm,
            intensity=Intensity(window=self.window),
            variation=self.variation,
            citation=_MSD_CITATION,
            url=_MSD_URL,
        )


def _numbered(names: tuple[str, ...]) -> dict[int, str]:
    return dict(enumerate(("background", *names)))


_BTCV = Preset(
    name="BTCV",
    aliases=("Synapse", "Beyond the Cranial Vault"),
    labels=_numbered(
        (
            "spleen",
            "right kidney",
            "left kidney",
            "gallbladder",
            "oesophagus",
            "liver",
            "stomach",
            "aorta",
            "inferior vena cava",
            "portal and splenic veins",
            "pancreas",
            "right adrenal gland",
            "left adrenal gland",
        )
    ),
    num_cases=30,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.1, rotate90_prob=0.1, shift_prob=0.5),
    citation="Landman et al., MICCAI Multi-Atlas Labeling Beyond the Cranial Vault: Workshop and Challenge (2015)",
    url="https://www.synapse.org/Synapse:syn3193805",
)

_MM_WHS = Preset(
    name="MM-WHS CT",
    aliases=("MM-WHS", "MMWHS", "Whole Heart"),
    labels={
        0: "background",
        205: "myocardium of the left ventricle",
        420: "left atrium",
        500: "left ventricle",
        550: "right atrium",
        600: "right ventricle",
        820: "ascending aorta",
        850: "pulmonary artery",
    },
    num_cases=20,
    spacing_mm=(1.5, 1.5, 1.5),
    intensity=Intensity(window=(0.0, 1700.0)),
    citation=(
        "Zhuang and Shen, Multi-scale patch and multi-modality atlases for whole heart segmentation of MRI, Medical "
        "Image Analysis 31 (2016) 77-87"
    ),
    url="https://zmiclab.github.io/zxh/0/mmwhs",
)

_AMOS22 = Preset(
    name="AMOS22",
    aliases=("AMOS", "AMOS22 CT", "AMOS CT"),
    labels=_numbered(
        (
            "spleen",
            "right kidney",
            "left kidney",
            "gallbladder",
            "oesophagus",
            "liver",
            "stomach",
            "aorta",
            "inferior vena cava",
            "pancreas",
            "right adrenal gland",
            "left adrenal gland",
            "duodenum",
            "bladder",
            "prostate or uterus",
        )
    ),
    num_cases=300,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.5, rotate90_prob=0.5, shift_prob=0.5),
    citation=(
        "Ji et al., AMOS: A Large-Scale Abdominal Multi-Organ Benchmark for Versatile Medical Image Segmentation, "
        "NeurIPS Datasets and Benchmarks (2022)"
    ),
    url="https://amos22.grand-challenge.org",
)

_FLARE22 = Preset(
    name="FLARE22",
    aliases=("FLARE",),
    labels=_numbered(
        (
            "liver",
            "right kidney",
            "spleen",
            "pancreas",
            "aorta",
            "inferior vena cava",
            "right adrenal gland",
            "left adrenal gland",
            "gallbladder",
            "oesophagus",
            "stomach",
            "duodenum",
            "left kidney",
        )
    ),
    num_cases=50,
    spacing_mm=(1.5, 1.5, 2.0),
    intensity=Intensity(window=(-175.0, 250.0)),
    variation=Variation(flip_prob=0.2, rotate90_prob=0.2, shift_prob=0.1),
    folds="seeded",
    citation=(
        "Ma et al., Unleashing the strengths of unlabelled data in deep learning-assisted pan-cancer abdominal organ "
        "quantification: the FLARE22 challenge, The Lancet Digital Health 6 (2024) e815-e826"
    ),
    url="https://flare22.grand-challenge.org",
)

_COVID_19_20 = Preset(
    name="COVID-19-20",
    aliases=("COVID", "COVID-19 lesion"),
    labels=_numbered(("lesion",)),
    num_cases=199,
    spacing_mm=(1.25, 1.25, 5.0),
    patch_size=(192, 192, 32),
    intensity=Intensity(window=(-1000.0, 500.0)),
    variation=Variation(flip_prob=0.5, affine_prob=0.15, noise_prob=0.15),
    nsd_tolerance_mm=2.0,
    citation=(
        "Roth et al., Rapid artificial intelligence solutions in a pandemic: the COVID-19-20 Lung CT Lesion "
        "Segmentation Challenge, Medical Image Analysis 82 (2022) 102605"
    ),
    url="https://covid-segmentation.grand-challenge.org",
)

_BRATS = Preset(
    name="BraTS",
    aliases=("MSD BrainTumour", "BrainTumour", "Task01_BrainTumour", "MSD Task01 BrainTumour", "Task01"),
    modality="MRI",
    channels=("FLAIR", "T1w", "T1gd", "T2w"),
    labels=_numbered(("oedema", "non-enhancing tumour", "enhancing tumour")),
    regions={"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)},
    num_cases=484,
    spacing_mm=(1.0, 1.0, 1.0),
    patch_size=(128, 128, 128),
    larger_patch_size=(224, 224, 128),
    intensity=Intensity(kind="zscore", window=None),
    citation=_MSD_CITATION,
    url=_MSD_URL,
)

_CC_CCII = Preset(
    name="CC-CCII",
    aliases=("CCCCII",),
    task="classification",
    # Its slices are 8-bit images in which the owners chose the window: 0 to 255 is from minimum to maximum.
    intensity=Intensity(window=(0.0, 255.0)),
    classes={"CP": "common pneumonia", "NCP": "COVID-19 pneumonia", "Normal": "normal"},
    num_cases=4178,
    spacing_mm=None,
    patch_size=(384, 384, 32),
    folds="seeded",
    citation=(
        "Zhang et al., Clinically Applicable AI System for Accurate Diagnosis, Quantitative Measurements, and "
        "Prognosis of COVID-19 Pneumonia Using Computed Tomography, Cell 181 (2020) 1423-1433"
    ),
    url="http://ncov-ai.big.ac.cn/download",
)

_TASKS = (
    _Task(
        number=9,
        name="Spleen",
        labels=("spleen",),
        num_cases=41,
        spacing_mm=(1.0, 1.0, 1.0),
        window=(-57.0, 175.0),
        variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    ),
    _Task(
        number=3,
        name="Liver",
        labels=("liver", "cancer"),
        num_cases=131,
        spacing_mm=(1.0, 1.0, 1.0),
        window=(-21.0, 189.0),
        variation=Variation(flip_prob=0.2, rotate90_prob=0.2, shift_prob=0.1),
        aliases=("LiTS",),
    ),
    _Task(
        number=6,
        name="Lung",
        labels=("cancer",),
        num_cases=63,
        spacing_mm=(1.0, 1.0, 1.0),
        window=(-1000.0, 1000.0),
        variation=Variation(flip_prob=0.5, rotate90_prob=0.3, shift_prob=0.1),
    ),
    _Task(
        number=7,
        name="Pancreas",
        labels=("pancreas", "cancer"),
        num_cases=281,
        spacing_mm=(1.5, 1.5, 1.5),
        window=(-87.0, 199.0),
        variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    ),
    _Task(
        number=8,
        name="HepaticVessel",
        labels=("Vessel", "Tumour"),
        num_cases=303,
        spacing_mm=(1.5, 1.5, 1.5),
        window=(0.0, 230.0),
        variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    ),
    _Task(
        number=10,
        name="Colon",
        labels=("colon cancer primaries",),
        num_cases=126,
        spacing_mm=(1.5, 1.5, 1.5),
        window=(-57.0, 175.0),
        variation=Variation(flip_prob=0.5, rotate90_prob=0.25, shift_prob=0.5),
    ),
)

#: Every preset by its name.
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _BTCV,
        _MM_WHS,
        *(task.preset() for task in _TASKS),
        _AMOS22,
        _FLARE22,
        _COVID_19_20,
        _BRATS,
        _CC_CCII,
    )
}


def find_preset(name: str) -> Preset:
    """A preset by its name or an alias; case, blanks and punctuation do not matter.

    Raises:
        ConfigError: there is none; offers the nearest names.
    """
    names = {alias: preset for preset in PRESETS.values() for alias in (preset.name, *preset.aliases)}
    found = {_plain(alias): preset for alias, preset in names.items()}.get(_plain(name))
    if found is None:
        close = nearest(name, names)
        raise ConfigError(f"There is no preset '{name}'.{close if 'mean' in close else nearest(name, PRESETS)}")
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
