"""Settings of embedding, and what they come to for given weights."""

import os
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mim3d.backbones.contract import Backbone, check_patch, round_up
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import ConfigError, listed
from mim3d.core.settings import to_mapping
from mim3d.core.types import Named, Spacing, Triple
from mim3d.inference.features import Tiling
from mim3d.inference.scan_input import LearnedInput
from mim3d.scans.grids import require_spacing
from mim3d.scans.intensity import Intensity
from mim3d.workflows.embed.arrays import ScanArray, named_scans
from mim3d.workflows.shared.feature_tables import WHOLE_SCAN, format_of_table, require_package

#: Edge in voxels of the windows for weights that do not say what they saw.
USUAL_EDGE = 96

#: The two ways in which tokens become one vector.
POOLINGS = ("mean", "max")


@dataclass(frozen=True)
class EmbedSettings:
    """Settings of `mim3d embed`.

    Attributes:
        scans: Scans: files, folders, DICOM trees, CSV or JSON lists, data sets; in Python arrays too, each a
            mim3d.ScanArray.
        weights: Encoder: a run, an exported folder, a weights file or a Hugging Face id.
        out: Table to write, by its ending: .parquet, .csv, .npz, or a folder .h5 with a file for each scan. In Python
            none is needed.
        format: Format of `out`: parquet, csv, npz or h5; auto goes by its ending.
        layer: Feature map that is pooled: last, all, or a number from 0 (the finest).
        spacing_mm: Voxel size along X, Y, Z that scans are seen at, or several such as '[[1, 1, 1], [2, 2, 2]]', each
            with columns of its own; that of the weights if not given.
        masks: Label maps of the scans, each label with a row of its own: a folder of label maps, or any form of DATA
            with labels.
        boxes: CSV of boxes, each with a row of its own: the columns id (or image), x_min, y_min, z_min, x_max, y_max,
            z_max in voxels of the file, or x_min_mm and so on in millimetres (RAS), and name.
        whole_scan: Whether the whole scan has a row too where there are masks or boxes.
        backbone: Encoder, where the weights do not say which.
        intensity: Mapping of intensities to network input; that of the weights if not given.
        window_size: Voxels of a window along X, Y, Z; what the weights saw in training if not given, else 96.
        overlap: Least share of a window that its neighbour sees too; each token is counted once all the same.
        batch_size: Windows per call of the encoder.
        modality: What made the scans, such as CT or MR, where neither a list nor a header says it.
        precision: Precision of the encoder: 32-true, bf16-mixed or 16-mixed.
        accelerator: Kind of device: auto, cpu, cuda or mps.
        strict: Refuse all scans where the header of one shows that it cannot be used, before any is embedded.
        overwrite: Do scans again that are finished, and replace features of other weights or settings.
    """

    scans: str | list[str] | Any
    weights: str
    out: str | None = None
    _: KW_ONLY
    format: Literal["auto", "parquet", "csv", "npz", "h5"] = "auto"
    layer: int | Literal["last", "all"] = "last"
    spacing_mm: Spacing | list[Spacing] | None = None
    masks: str | None = None
    boxes: str | None = None
    whole_scan: bool = True
    backbone: Named | None = None
    intensity: Intensity | None = None
    window_size: int | Triple | None = None
    overlap: float = 0.25
    batch_size: int = 4
    modality: str | None = None
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    accelerator: str = "auto"
    strict: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.out is not None and any(isinstance(scan, ScanArray) for scan in named_scans(self.scans)):
            raise ConfigError("out is given, but arrays have no file to go on with; leave it out, and save the table.")
        for spacing_mm in self.spacings_mm:
            require_spacing(spacing_mm)
        if len(set(self.spacings_mm)) < len(self.spacings_mm):
            raise ConfigError(f"spacing_mm names {listed(self.spacings_mm)}; name each voxel size once.")
        if self.boxes is not None and self.masks is not None:
            raise ConfigError("masks and boxes are both given; embed them one after the other, each into its table.")
        if not self.whole_scan and self.masks is None and self.boxes is None:
            raise ConfigError("whole_scan is false, but there are neither masks nor boxes, so that no row is left.")
        if self.out is not None:
            require_package(format_of_table(self.out, self.format))

    @property
    def spacings_mm(self) -> tuple[Spacing, ...]:
        """The voxel sizes that are asked for; empty for that of the weights."""
        if self.spacing_mm is None:
            return ()
        if isinstance(self.spacing_mm, list):
            if not self.spacing_mm:
                raise ConfigError("spacing_mm is an empty list; name voxel sizes, or leave it out.")
            return tuple(self.spacing_mm)
        return (self.spacing_mm,)


@dataclass(frozen=True, kw_only=True)
class EmbeddingPlan:
    """What the settings come to for given weights.

    Attributes:
        learned: What the encoder learned from.
        preparations: How scans are prepared, once for each voxel size.
        levels: Which of the encoder's maps are pooled.
        widths: Channels of each of them.
        intensity: How intensities are mapped; None where each scan's own kind decides.
        tiling: How scans are covered.
        columns: Names of the features, in their order.
    """

    learned: LearnedInput
    preparations: tuple[Preprocessing, ...]
    levels: tuple[int, ...]
    widths: tuple[int, ...]
    intensity: Intensity | None
    tiling: Tiling
    columns: tuple[str, ...]

    @classmethod
    def of(cls, settings: EmbedSettings, strides: tuple[int, ...], widths: tuple[int, ...]) -> "EmbeddingPlan":
        """The plan for an encoder.

        Args:
            settings: The settings.
            strides: Down-sampling of each of its maps.
            widths: Channels of each of its maps.

        Raises:
            ConfigError: There is no such layer, or windows that the encoder cannot take.
        """
        learned = LearnedInput.of(settings.weights, settings.backbone)
        levels = _levels_of(settings.layer, strides, widths)
        spacings = settings.spacings_mm or (learned.preprocessing.spacing_mm,)
        return cls(
            learned=learned,
            preparations=tuple(replace(learned.preprocessing, spacing_mm=each) for each in spacings),
            levels=levels,
            widths=tuple(widths[level] for level in levels),
            intensity=settings.intensity or learned.intensity,
            tiling=Tiling(
                size=_window_size(settings.window_size, learned.window_size, learned.recipe),
                overlap=settings.overlap,
                batch_size=settings.batch_size,
            ),
            columns=_columns_of(spacings, levels, widths),
        )

    def identity(self, settings: EmbedSettings, digest: str) -> dict[str, Any]:
        """What features of one table have in common, as plain values.

        Args:
            settings: The settings.
            digest: SHA-256 of the weights.
        """
        return {
            "weights_digest": digest,
            "levels": list(self.levels),
            "spacing_mm": to_mapping([each.spacing_mm for each in self.preparations]),
            "intensity": to_mapping(self.intensity),
            "window_size": list(self.tiling.size),
            "overlap": self.tiling.overlap,
            "precision": settings.precision,
            "regions": "masks" if settings.masks else "boxes" if settings.boxes else WHOLE_SCAN,
            "whole_scan": settings.whole_scan,
        }


def _levels_of(
    layer: int | Literal["last", "all"], strides: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[int, ...]:
    """Which of the maps are meant.

    Raises:
        ConfigError: None is; the sentence lists them.
    """
    if layer in ("last", "all"):
        return tuple(range(len(strides))) if layer == "all" else (len(strides) - 1,)
    if -len(strides) <= int(layer) < len(strides):
        return (int(layer) % len(strides),)
    pairs = enumerate(zip(strides, widths, strict=True))
    maps = ", ".join(f"{number} (stride {stride}, {width} channels)" for number, (stride, width) in pairs)
    raise ConfigError(
        f"layer is {layer!r}, but this encoder has the maps {maps}; use one of these numbers, last or all."
    )


def _window_size(asked: int | Triple | None, seen: Triple | None, recipe: Backbone) -> Triple:
    """Voxels of a window, in the encoder's multiples.

    They are what is asked for, else what the encoder saw in training, else what its learned positions are for, but for
    axes on which they tell nothing apart, else the usual ones.

    Raises:
        ConfigError: What is asked for is no multiple of what the encoder takes, or too large.
    """
    if asked is None:
        learned = recipe.learned_size or recipe.token_size
        x, y, z = (size if size > token else USUAL_EDGE for size, token in zip(learned, recipe.token_size, strict=True))
        return round_up(seen or (x, y, z), recipe.input_multiple)
    x, y, z = (asked,) * 3 if isinstance(asked, int) else asked
    check_patch((x, y, z), recipe.input_multiple, "window_size")
    return x, y, z


def _columns_of(
    spacings: tuple[Spacing | None, ...], levels: tuple[int, ...], widths: tuple[int, ...]
) -> tuple[str, ...]:
    """Names of the features: ``mean_00``; with the voxel size in front of several, and the level of several."""
    names = []
    for spacing_mm in spacings:
        size = "" if len(spacings) == 1 else f"{_size_in_words(spacing_mm)}_"
        for level in levels:
            place = "" if len(levels) == 1 else f"level{level}_"
            digits = len(str(widths[level] - 1))
            names += [f"{size}{place}{kind}_{n:0{digits}d}" for kind in POOLINGS for n in range(widths[level])]
    return tuple(names)


def _size_in_words(spacing_mm: Spacing | None) -> str:
    if spacing_mm is None:
        return "own"
    values = [f"{value:g}" for value in spacing_mm]
    return f"{values[0] if len(set(values)) == 1 else 'x'.join(values)}mm"


def home_of(out: str, form: str) -> Path:
    """The folder of what lies beside a table: that of its file, or the folder of HDF5 files itself."""
    return Path(out) if form == "h5" else Path(os.path.abspath(out)).parent
