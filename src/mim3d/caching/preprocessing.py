"""From a case's files to arrays a network can read, and from a network's scores back to the scan's grid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.case_reading import Plan, read_images, read_label
from mim3d.caching.foreground import Foreground, Statistics, foreground_of, statistics_of, threshold_of
from mim3d.caching.resampling import plan_resampling, resample_linear
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.types import Spacing
from mim3d.datasets.cases import Case
from mim3d.scans.grids import times
from mim3d.scans.volumes import Grid

__all__ = ["Prepared", "Preprocessing", "Statistics", "prepare", "restore"]

#: Resolutions that a cache can hold: the coarsest voxel of eight is 128 voxels a side.
MAX_LEVELS = 8

#: Voxels kept on every side of the body where it is cropped.
CROP_MARGIN = 8


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How scans are prepared and stored; intensities are mapped to network input when they are loaded.

    Attributes:
        spacing_mm: Voxel size along X, Y, Z that every scan is resampled to; None keeps each scan's own.
        intensities: How the cache stores them: ``lossless``, whole numbers as they are and fractions in 65,536 even
            steps; ``8-bit``, a third of the size and twice as fast to read; or ``auto``, lossless where the data set
            has labels, else 8-bit.
        window: What 8 bits of a CT cover, HU; values beyond are clipped. Other modalities are clipped to the 0.1 to
            99.9 percentiles of each channel's foreground, so that its darkest thousandth looks like background.
        num_levels: Resolutions stored, full resolution first, each half the one before; 1 for full resolution alone.
        body_crop: Keep only the body: the box around what is not air or background, and 8 voxels more on every side.
            Image and label are cut alike and no voxel moves in the world, but they no longer lie on the grid of the
            files, so a cache made this way is for training, never for predictions.
    """

    spacing_mm: Spacing | None = None
    intensities: Literal["auto", "lossless", "8-bit"] = "auto"
    window: tuple[float, float] = (-1000.0, 1000.0)
    num_levels: int = 3
    body_crop: bool = False

    def __post_init__(self) -> None:
        if self.spacing_mm is not None and not (
            len(self.spacing_mm) == 3 and all(math.isfinite(value) and value > 0 for value in self.spacing_mm)
        ):
            raise ConfigError(f"spacing_mm {self.spacing_mm} must be three positive numbers, such as 1.5 1.5 2.0.")
        if self.intensities not in ("auto", "lossless", "8-bit"):
            raise ConfigError(f"intensities {self.intensities!r} is unknown; use auto, lossless or 8-bit.")
        rising = len(self.window) == 2 and -math.inf < self.window[0] < self.window[1] < math.inf
        if not rising:
            raise ConfigError(f"window {self.window} must be two rising numbers, such as -1000 1000.")
        if not 1 <= self.num_levels <= MAX_LEVELS:
            raise ConfigError(f"num_levels {self.num_levels} must be between 1 (full resolution) and {MAX_LEVELS}.")

    def settled(self, has_labels: bool) -> "Preprocessing":
        """These settings with ``auto`` replaced by what it means for a data set with or without labels."""
        if self.intensities != "auto":
            return self
        return replace(self, intensities="lossless" if has_labels else "8-bit")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case in memory, on its RAS+ grid or resampled, whole or cropped to the body.

    Attributes:
        image: (C, X, Y, Z) contiguous; integers stay integers (in the smallest type that holds them), floats are
            float32.
        label: (X, Y, Z) uint8 or uint16, or None.
        affine: (4, 4) float64, voxel index of ``image`` to RAS millimetres.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Of each channel, after resampling and before cropping.
        grid: Of the first image, as stored; a crop does not change it.
        foreground: Of ``image`` as it is here.
    """

    image: npt.NDArray[Any]
    label: npt.NDArray[Any] | None
    affine: npt.NDArray[np.float64]
    spacing_mm: Spacing
    statistics: tuple[Statistics, ...]
    grid: Grid
    foreground: Foreground


def prepare(
    case: Case, preprocessing: Preprocessing, *, with_label: bool = True, labels: Mapping[int, str] | None = None
) -> Prepared:
    """Read a case, check it, and resample it where asked.

    Images are resampled linearly, with anti-aliasing where voxels grow, and integers are rounded to integers again;
    labels take the class with the largest share of a voxel. Last the body is cropped where asked; ``restore`` needs
    the whole scan, so whoever predicts prepares without ``body_crop``.

    Memory: what is returned, and one file more: a channel or the label while it is resampled, a channel while it is
    put beside others or turned into a type of another size, a crop beside the whole, and what SimpleITK or a
    multi-frame DICOM file unpacks at once. All else is done in slabs, 0.1 to 0.3 GiB at 1024 x 1024 voxels per slice.
    What ``to_stored`` makes comes on top: a byte per voxel for 8 bits, two for fractions, nothing for whole numbers.
    So a worker of 4 GiB caches 1.5 GiB of 16-bit voxels, with a label, on their own grid or one of about their size.
    Voxels in float32 count double: 3 GiB of them take 4 GiB in 8 bits and 4.8 GiB lossless.

    Args:
        case: The files.
        preprocessing: The voxel size wanted, and whether to crop.
        with_label: Read the label too, where the case has one.
        labels: Declared label values; empty or None allows all.

    Raises:
        DataError: A file that cannot be used, grids that disagree, label values that are not declared, or a scan
            larger than memory.
    """
    plan = Plan.of(case, preprocessing.spacing_mm)
    image = read_images(case, plan)
    label = read_label(case.label, plan, labels or {}) if with_label and case.label is not None else None
    thresholds = [threshold_of(channel) for channel in image]
    prepared = Prepared(
        image=image,
        label=label,
        affine=plan.affine,
        spacing_mm=plan.spacing_mm,
        statistics=tuple(statistics_of(channel, at) for channel, at in zip(image, thresholds, strict=True)),
        grid=plan.grid,
        foreground=foreground_of(image, thresholds),
    )
    return _cropped(prepared, thresholds) if preprocessing.body_crop else prepared


def restore(scores_KXYZ: npt.NDArray[Any], prepared: Prepared) -> npt.NDArray[np.float32]:
    """Bring scores from the prepared grid to the scan's own.

    Args:
        scores_KXYZ: (K, X, Y, Z) scores or probabilities on the grid of ``prepared``.
        prepared: What the scores were computed from.

    Returns:
        (K, X, Y, Z) float32 on the RAS+ form of ``prepared.grid``: interpolated linearly where the spacing was
        changed, else the scores themselves. ``prepared`` must be the whole scan, made without ``body_crop``: both
        grids are taken to share their centre.

    Raises:
        DataError: The scores do not have the shape of the prepared scan.
    """
    shape = prepared.image.shape[1:]
    if scores_KXYZ.ndim != 4 or scores_KXYZ.shape[1:] != shape:
        raise DataError(
            f"scores of shape {times(scores_KXYZ.shape)} do not fit the prepared scan {prepared.grid.path}: expected "
            f"classes x {times(shape)}."
        )
    grid = prepared.grid
    taps = plan_resampling((shape[0], shape[1], shape[2]), prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)
    if all(axis.is_identity for axis in taps):
        return np.asarray(scores_KXYZ, dtype=np.float32)
    restored = np.empty((len(scores_KXYZ), *grid.ras_shape), dtype=np.float32)
    for channel, scores in zip(restored, scores_KXYZ, strict=True):
        channel[...] = resample_linear(scores, taps)
    return restored


def _cropped(whole: Prepared, thresholds: Sequence[float]) -> Prepared:
    """The body alone: image and label cut alike, the affine moved to the first voxel kept."""
    spans = [
        (max(0, start - CROP_MARGIN), min(size, stop + CROP_MARGIN))
        for start, stop, size in zip(*whole.foreground.box, whole.image.shape[1:], strict=True)
    ]
    box = tuple(slice(*span) for span in spans)
    move = np.eye(4)
    move[:3, 3] = [start for start, _ in spans]
    image = np.ascontiguousarray(whole.image[:, *box])
    return replace(
        whole,
        image=image,
        label=None if whole.label is None else np.ascontiguousarray(whole.label[box]),
        affine=whole.affine @ move,
        foreground=foreground_of(image, thresholds),
    )
