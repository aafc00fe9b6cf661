"""From a case's files to arrays a network can read, one file at a time: besides the result no more than one is held."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import Foreground, Statistics, foreground_of, statistics_of, threshold_of
from mim3d.caching.marks import Marks, marks_of
from mim3d.caching.resampling import Axes, plan_resampling, resample_labels, resample_linear, target_grid
from mim3d.core.errors import ConfigError, DataError, TooLargeError, listed
from mim3d.core.types import Spacing
from mim3d.datasets.cases import Case
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import Grid, require_same_grid, require_spacing, times
from mim3d.scans.modality import ChannelModality, decide, modality_of_channels, sign_of
from mim3d.scans.volumes import modality_of, read_grid, read_volume

#: Resolutions that a cache can hold: the coarsest voxel of eight is 128 voxels a side.
MAX_LEVELS = 8

#: Voxels kept on every side of the body where it is cropped.
CROP_MARGIN = 8

#: Integer types in order of preference: the first that holds every value is kept.
_INTEGER_TYPES = (np.uint8, np.int16, np.uint16, np.int32, np.int64)


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How scans are prepared and stored; intensities are mapped to network input when they are loaded.

    Attributes:
        spacing_mm: Voxel size along X, Y, Z that every scan is resampled to; None keeps each scan's own.
        intensities: How the cache stores them: ``lossless``, whole numbers as they are and fractions in 65,536 even
            steps; ``8-bit``, a third of the size and twice as fast to read; or ``auto``, lossless where the data set
            has labels, else 8-bit.
        window: What 8 bits of a CT cover, HU; values beyond are clipped, in lossless caches those of reduced levels
            alone. Other modalities are clipped to the 0.1 to 99.9 percentiles of each channel's foreground where they
            are stored in 8 bits, so that its darkest thousandth looks like background.
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
        require_spacing(self.spacing_mm)
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
        image: (C, X, Y, Z) contiguous. Integers stay integers, in the smallest type that holds them; floating point
            numbers are float32.
        label: (X, Y, Z) uint8 or uint16, or None.
        affine: (4, 4) float64, voxel index of ``image`` to RAS millimetres.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Statistics of each channel, after resampling and before cropping.
        modalities: What each channel is.
        grid: Grid of the first image as stored; a crop does not change it.
        foreground: Foreground of ``image`` as it is here.
        marks: What the first channel is recognised by, as it was before resampling; None where it was not asked for.
    """

    image: npt.NDArray[Any]
    label: npt.NDArray[Any] | None
    affine: npt.NDArray[np.float64]
    spacing_mm: Spacing
    statistics: tuple[Statistics, ...]
    modalities: tuple[ChannelModality, ...]
    grid: Grid
    foreground: Foreground
    marks: Marks | None = None


def prepare(
    case: Case,
    preprocessing: Preprocessing,
    *,
    with_label: bool = True,
    labels: Mapping[int, str] | None = None,
    set_in_hu: Sequence[bool] = (),
    with_marks: bool = False,
) -> Prepared:
    """Read a case, check it, and resample it where asked.

    Images are resampled linearly, with anti-aliasing where voxels grow, and integers are rounded to integers again;
    labels take the class with the largest share of a voxel. Last the body is cropped where asked; predictions need the
    whole scan, so they prepare it without ``body_crop``.

    Memory: what is returned, and one file more: a channel or the label while it is resampled, a channel while it is
    put beside others or turned into a type of another size, a crop beside the whole, and what a multi-frame DICOM
    file unpacks at once. All else is done in slabs, 0.1 to 0.3 GiB at 1024 x 1024 voxels per slice.
    What ``to_stored`` makes comes on top: a byte per voxel for 8 bits, two for fractions, nothing for whole numbers.
    So a worker of 4 GiB caches 1.5 GiB of 16-bit voxels, with a label, on their own grid or one of about their size.
    Voxels in float32 count double: 3 GiB of them take 4 GiB in 8 bits and 4.8 GiB lossless.

    Args:
        case: The case with its files.
        preprocessing: The voxel size wanted, and whether to crop.
        with_label: Whether to read the label too, where the case has one.
        labels: Declared label values; empty or None allows all.
        set_in_hu: For each channel whether the other scans of its set are CT; it decides where nothing else does.
        with_marks: Whether to find what the scan is recognised by, see ``caching/marks.py``.

    Raises:
        DataError: A file that cannot be used, grids that disagree, label values that are not declared, or a scan
            larger than memory.
    """
    grid = read_grid(case.images[0])
    shape, spacing_mm, affine = grid.ras_shape, grid.spacing_mm, grid.ras_affine
    if preprocessing.spacing_mm is not None:
        shape, spacing_mm, affine = target_grid(shape, affine, spacing_mm, preprocessing.spacing_mm)
        # Every channel has 2 bytes per voxel at least.
        needed_bytes = math.prod(shape) * (2 * len(case.images) + (case.label is not None))
        if needed_bytes > available_memory_bytes():
            spacing = " x ".join(f"{mm:g}" for mm in spacing_mm)
            raise TooLargeError(
                f"{case.images[0]}: at {spacing} mm it has {times(shape)} voxels ({needed_bytes / 2**30:.1f} GiB when "
                "resampled), more than the memory available; use a larger spacing_mm, or check its header."
            )
    axes = plan_resampling(grid.ras_shape, grid.spacing_mm, shape, spacing_mm)
    marks: list[Marks] = []
    image = _read_images(case.images, grid, axes, marks if with_marks else None)
    label = _read_label(case.label, grid, axes, labels or {}) if with_label and case.label is not None else None
    modalities = _modalities(case, image, set_in_hu)
    in_hu = [channel.in_hu for channel in modalities]
    thresholds = [threshold_of(channel, is_ct) for channel, is_ct in zip(image, in_hu, strict=True)]
    prepared = Prepared(
        image=image,
        label=label,
        affine=affine,
        spacing_mm=spacing_mm,
        statistics=tuple(map(statistics_of, image, thresholds, in_hu)),
        modalities=modalities,
        grid=grid,
        foreground=foreground_of(image, thresholds),
        marks=next(iter(marks), None),
    )
    return _cropped(prepared, thresholds) if preprocessing.body_crop else prepared


def _modalities(case: Case, image: npt.NDArray[Any], set_in_hu: Sequence[bool]) -> tuple[ChannelModality, ...]:
    declared = modality_of_channels(case.modality, len(image))
    others = set_in_hu if len(set_in_hu) == len(image) else [False] * len(image)
    return tuple(
        decide(sign_of(channel), declared=name, header=modality_of(path), set_in_hu=is_ct)
        for channel, path, name, is_ct in zip(image, case.images, declared, others, strict=True)
    )


def _read_images(paths: Sequence[str], grid: Grid, axes: Axes, marks: list[Marks] | None) -> npt.NDArray[Any]:
    """(C, X, Y, Z) resampled, in one type that holds every channel: integers without loss, else float32.

    The marks of the first channel are added to a list that is given.
    """
    image = np.empty(0)
    low, high = math.inf, -math.inf
    for place, path in enumerate(paths):
        channel = _read_channel(path, grid, axes, marks if place == 0 else None)
        low, high = min(low, channel.min().item()), max(high, channel.max().item())
        dtype: np.dtype[Any] = np.dtype(np.float32)
        if channel.dtype.kind in "iu":
            held = (kept for kept in _INTEGER_TYPES if np.iinfo(kept).min <= low and high <= np.iinfo(kept).max)
            dtype = np.dtype(next(held, dtype))
        if len(paths) == 1:
            return _as_type(channel, dtype)[None]
        if place == 0:
            image = np.empty((len(paths), *channel.shape), dtype=dtype)
        elif image.dtype.kind != "f":
            image = _as_type(image, dtype)
        image[place] = channel
        del channel
    return image


def _read_channel(path: str, grid: Grid, axes: Axes, marks: list[Marks] | None) -> npt.NDArray[Any]:
    """One image, resampled: integers keep their type, all else is float32."""
    volume = read_volume(path)
    require_same_grid(grid, volume.grid)
    if marks is not None:
        marks.append(marks_of(volume.array, grid.spacing_mm, grid.ras_affine))
    dtype = volume.array.dtype if volume.array.dtype.kind in "iu" else np.dtype(np.float32)
    channel: npt.NDArray[Any] = resample_linear(volume.array, axes, dtype)
    return channel


def _as_type(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The array in a type that holds its values; integers of the same size look the same in both."""
    if array.dtype.kind in "iu" and dtype.kind in "iu" and array.dtype.itemsize == dtype.itemsize:
        return array.view(dtype)
    return array.astype(dtype, copy=False)


def _read_label(path: str, grid: Grid, axes: Axes, labels: Mapping[int, str]) -> npt.NDArray[Any]:
    """(X, Y, Z) label map, resampled, in the smaller of 8 and 16 bits that holds its values."""
    volume = read_volume(path, label=True, narrow=True)
    require_same_grid(grid, volume.grid)
    label = volume.array
    high = int(label.max())
    label = label.astype(np.uint8 if high < 256 else np.uint16, copy=False)
    if labels:
        counts = np.zeros(high + 1, dtype=np.int64)
        for plane in label:
            counts += np.bincount(plane.ravel(), minlength=high + 1)
        unknown = [int(value) for value in np.flatnonzero(counts) if int(value) not in labels]
        if unknown:
            declared = ", ".join(f"{value} {name}" for value, name in labels.items())
            raise DataError(
                f"{path}: label values {listed(unknown)} are not declared (declared: {declared}); correct the label "
                "map or the declaration."
            )
    return resample_labels(label, axes)


def _cropped(whole: Prepared, thresholds: Sequence[float]) -> Prepared:
    """The body alone: image and label cut alike, the affine moved to the first voxel kept."""
    box = tuple(
        slice(max(0, start - CROP_MARGIN), min(size, stop + CROP_MARGIN))
        for start, stop, size in zip(*whole.foreground.box, whole.image.shape[1:], strict=True)
    )
    move = np.eye(4)
    move[:3, 3] = [span.start for span in box]
    image = np.ascontiguousarray(whole.image[:, *box])
    return replace(
        whole,
        image=image,
        label=None if whole.label is None else np.ascontiguousarray(whole.label[box]),
        affine=whole.affine @ move,
        foreground=foreground_of(image, thresholds),
    )
