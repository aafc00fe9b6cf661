"""One scan as the encoder of given weights takes it, for work in Python: ``mim3d.load_scan(SCAN, WEIGHTS)``."""

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mim3d.backbones.contract import Backbone, check_multiple, round_up
from mim3d.caching.preprocessing import Prepared, Preprocessing, prepare
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.names import number_of
from mim3d.core.settings import build_settings, to_mapping
from mim3d.core.types import Named, Spacing, Triple
from mim3d.core.warned import UnlikeTrainingWarning, WeightsWarning
from mim3d.datasets.cases import Case, read_cases
from mim3d.inference.input_range import InputRange
from mim3d.inference.prediction import padding_values
from mim3d.inference.windows import cut_window
from mim3d.scans.grids import times
from mim3d.scans.intensity import Intensity
from mim3d.weights.cards import card_settings, seen_size
from mim3d.weights.description import origin_of
from mim3d.weights.loading import recipe_of
from mim3d.weights.opened import OpenedWeights

#: Voxel sizes count as one where they agree to this share, as rounded headers do.
_SAME_SPACING = 0.01


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanInput:
    """A scan in the voxel size and intensities of a network, read in whole or in parts.

    Attributes:
        shape: Voxels along X, Y, Z of the scan as it is prepared.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) float64, voxel index to RAS millimetres.
        intensity: How intensities are mapped.
        multiple: What the sizes of an input must be multiples of, along X, Y, Z.
        padding: What stands for "nothing there" in each channel, in mapped intensities.
        part_of: Gives a part ``(C, X, Y, Z)`` float32, by a slice of channels and one of each axis.
    """

    shape: Triple
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    intensity: Intensity
    multiple: Triple
    padding: tuple[float, ...]
    part_of: Callable[[tuple[slice, ...]], Tensor]

    @property
    def image(self) -> Tensor:
        """The whole scan ``(1, C, X, Y, Z)``, padded behind its last voxels to sizes that the encoder takes."""
        return self.crop((0, 0, 0), round_up(self.shape, self.multiple))

    def crop(self, origin: Triple, size: Triple) -> Tensor:
        """A crop ``(1, C, *size)``; what lies beyond the scan is padding.

        Args:
            origin: First voxel along X, Y, Z; it may be negative.
            size: Voxels along X, Y, Z, multiples of ``multiple``.

        Raises:
            ConfigError: The size is no such multiple, with the nearest that are; or the crop lies outside the scan.
        """
        check_multiple(size, self.multiple, "size")
        if any(not -edge < first < voxels for first, edge, voxels in zip(origin, size, self.shape, strict=True)):
            raise ConfigError(
                f"A crop of {times(size)} voxels from {list(origin)} lies outside a scan of {times(self.shape)}."
            )
        return cut_window(self.part_of, origin, size, self.shape, self.padding)[None]

    def windows(self, size: Triple, step: Triple | None = None) -> Iterator[tuple[Triple, Tensor]]:
        """Windows that cover the scan, each with its first voxel, along X, Y and Z in turn; one is read at a time.

        Args:
            size: Voxels of a window along X, Y, Z, multiples of ``multiple``.
            step: Voxels from one window to the next; windows lie side by side if not given.

        Raises:
            ConfigError: The size or the step is no such multiple.
        """
        check_multiple(size, self.multiple, "size")
        stride = step or size
        check_multiple(stride, self.multiple, "step")
        counts = (
            1 + max(0, -(-(voxels - edge) // move)) for voxels, edge, move in zip(self.shape, size, stride, strict=True)
        )
        for x, y, z in itertools.product(*map(range, counts)):
            origin = (x * stride[0], y * stride[1], z * stride[2])
            yield origin, self.crop(origin, size)


@dataclass(frozen=True, kw_only=True)
class LearnedInput:
    """What the encoder of some weights takes, as far as these say it.

    Attributes:
        weights: Where they lie, as the user named it.
        recipe: Settings of the encoder.
        preprocessing: The voxel size that it learned from; each scan's own where nothing says it.
        intensity: How intensities were mapped; None where nothing says it.
        input_range: What it learned from, in ranges; None where nothing says it.
        window_size: Voxels of what it saw at a time; None where nothing says it.
    """

    weights: str
    recipe: Backbone
    preprocessing: Preprocessing
    intensity: Intensity | None
    input_range: InputRange | None
    window_size: Triple | None

    @classmethod
    def of(cls, weights: str | Path, backbone: Named | None = None) -> "LearnedInput":
        """What the card of some weights says; of those without one, what is known of their family, if they have one.

        Raises:
            CheckpointError: The weights cannot be read, or do not say which encoder they are of.
            ConfigError: The backbone is unknown.
        """
        opened = OpenedWeights.of(weights)
        recipe, card = recipe_of(opened, backbone), opened.card
        if (origin := origin_of(opened)) is not None:
            expects = to_mapping(origin.expects)
            card = {"spacing_mm": expects["spacing_mm"], "intensity": expects["intensity"]}
        with card_settings(weights):
            known, mapped = card.get("input_range"), card.get("intensity")
            return cls(
                weights=str(weights),
                recipe=recipe,
                preprocessing=build_settings(Preprocessing, {"spacing_mm": card.get("spacing_mm")}, "card"),
                intensity=None if mapped is None else build_settings(Intensity, mapped, "intensity"),
                input_range=None if known is None else build_settings(InputRange, known, "input_range"),
                window_size=seen_size(card),
            )

    @property
    def in_hu(self) -> tuple[bool, ...]:
        """For each channel whether it learned from CT in HU; empty where nothing says it."""
        return () if self.input_range is None else self.input_range.in_hu

    def check_channels(self, num_channels: int, name: str) -> None:
        """Refuse a scan of another number of channels than the encoder learned from.

        Args:
            num_channels: Its channels.
            name: Its first file, for the message.

        Raises:
            DataError: The sentence names both numbers.
        """
        if num_channels != self.recipe.in_channels:
            raise DataError(
                f"{name}: a scan of {number_of(num_channels, 'channel')}, but {self.weights} learned from "
                f"{self.recipe.in_channels}; give one file for each channel, in the order of training."
            )

    def warnings_on(self, prepared: Prepared) -> list[str]:
        """Sentences on what of a scan lies far outside of what the encoder learned from."""
        return [] if self.input_range is None else self.input_range.warnings_on(prepared)

    def scan(self, found: CachedScan | Prepared, intensity: Intensity) -> ScanInput:
        """A scan as the encoder takes it.

        Args:
            found: The scan, in a cache or in memory.
            intensity: How its intensities are mapped.
        """
        x, y, z = found.shape if isinstance(found, CachedScan) else found.image.shape[1:]
        return ScanInput(
            shape=(x, y, z),
            spacing_mm=found.spacing_mm,
            affine=found.affine,
            intensity=intensity,
            multiple=self.recipe.input_multiple,
            padding=tuple(padding_values(intensity, found.statistics)),
            part_of=partial(_part_of, found, intensity),
        )


def usual_intensity(found: CachedScan | Prepared) -> Intensity:
    """The mapping of intensities for weights that do not say it: the window of CT, else the z-score."""
    is_ct = all(channel.in_hu for channel in found.modalities)
    return Intensity() if is_ct else Intensity(kind="zscore", window=None)


def load_scan(
    scan: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | CachedScan,
    weights: str | Path,
    *,
    modality: str | None = None,
    backbone: Named | None = None,
) -> ScanInput:
    """A scan as the encoder of given weights learned to see it: in its voxel size, its intensities mapped alike.

    Both are those of the card beside the weights. For weights without a card the voxel size stays the scan's own, a CT
    gets the window from -1000 to 1000 HU and any other scan the z-score of its foreground, with a warning.

    Args:
        scan: A file, a folder with a DICOM series, the files of the channels of one scan, or a scan of a cache.
        weights: A run, an exported folder, a weights file or a Hugging Face id, as in ``load_encoder``.
        modality: What made the scan, such as CT, where neither its header nor its voxels say it.
        backbone: The backbone as in ``load_encoder``, where the weights do not say it.

    Raises:
        DataError: There is no scan, or more than one; it cannot be read; or it has another number of channels, or was
            cached in another voxel size, than the encoder learned from.
        CheckpointError: The weights cannot be read, or do not say which encoder they are of.
        ConfigError: The modality or the backbone is unknown.
    """
    learned = LearnedInput.of(weights, backbone)
    case = scan.case if isinstance(scan, CachedScan) else _case_of(scan, modality)
    num_channels = scan.num_channels if isinstance(scan, CachedScan) else len(case.images)
    learned.check_channels(num_channels, case.images[0])
    found: CachedScan | Prepared
    if isinstance(scan, CachedScan):
        _check_spacing(scan, learned.preprocessing.spacing_mm, weights)
        found = scan
    else:
        found = prepare(case, learned.preprocessing, with_label=False, set_in_hu=learned.in_hu)
        for text in learned.warnings_on(found):
            warnings.warn(f"{case.images[0]}: {text}", category=UnlikeTrainingWarning, stacklevel=2)
    intensity = learned.intensity
    if intensity is None:
        intensity = usual_intensity(found)
        warnings.warn(
            f"{weights} does not say how scans were prepared; "
            f"{'the window of CT' if intensity.kind == 'window' else 'a z-score'} and the scan's own voxel size are "
            "used.",
            category=WeightsWarning,
            stacklevel=2,
        )
    return learned.scan(found, intensity)


def _part_of(scan: CachedScan | Prepared, intensity: Intensity, part: tuple[slice, ...]) -> Tensor:
    """A part ``(C, X, Y, Z)`` of a scan as network input; of a cached scan nothing else is read."""
    if isinstance(scan, CachedScan):
        x, y, z = part[1:]
        stored = scan.read((x.start, y.start, z.start), (x.stop - x.start, y.stop - y.start, z.stop - z.start))
        values: npt.NDArray[Any] = scan.to_values(stored)
    else:
        values = scan.image[part]
    return torch.from_numpy(np.ascontiguousarray(intensity.apply(values, scan.statistics)))


def _case_of(scan: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], modality: str | None) -> Case:
    """The one scan that is meant.

    Raises:
        DataError: There is none, or more than one.
    """
    if not isinstance(scan, (str, os.PathLike)):
        return Case(images=tuple(os.path.abspath(path) for path in scan), modality=modality)
    found = read_cases(os.fspath(scan), recursive_images_only=True, modality=modality)
    if len(found.cases) != 1:
        raise DataError(
            f"{os.fspath(scan)}: {len(found.cases)} scans in here ({listed([case.id for case in found.cases])}); give "
            "one of them, or the files of its channels as a list."
        )
    return found.cases[0]


def _check_spacing(scan: CachedScan, spacing_mm: Spacing | None, weights: str | Path) -> None:
    """Refuse a cached scan of another voxel size than the encoder learned from.

    Raises:
        DataError: The sentence names both and the remedy.
    """
    if spacing_mm is not None and not np.allclose(scan.spacing_mm, spacing_mm, rtol=_SAME_SPACING, atol=0):
        own, wanted = (" ".join(f"{mm:.4g}" for mm in size) for size in (scan.spacing_mm, spacing_mm))
        raise DataError(
            f"{scan.case.id}: cached in voxels of {own} mm, but {weights} learned from voxels of {wanted} mm; make the "
            f"cache with --spacing_mm {wanted}, or give the scan's file."
        )
