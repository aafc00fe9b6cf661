"""How training crops are varied: MONAI transforms on the image and its label map together."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mim3d.core.errors import ConfigError
from mim3d.core.types import Spacing, Triple

if TYPE_CHECKING:
    from monai.transforms.compose import Compose

#: Words in a label's name that tie it to one side of an axis: mirrored, it would carry the wrong name.
SIDED_NAMES = (
    re.compile(r"(left|right)|(^|[_\W])[lr]($|[_\W])", re.IGNORECASE),
    re.compile(r"anterior|posterior|ventral|dorsal|frontal|occipital", re.IGNORECASE),
    re.compile(r"superior|inferior|upper|lower|cranial|caudal|vertebra|(^|[_\W])[ctl]\d{1,2}($|[_\W])", re.IGNORECASE),
)

#: Voxels more than this anisotropic are not rotated across: the structure would be sheared, not turned.
MAX_ANISOTROPY = 2.0

_AXES = "XYZ"


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Probabilities and ranges; a probability of 0 switches a change off.

    Attributes:
        flip_axes: axes (0 X, 1 Y, 2 Z) that may be mirrored; None plans them: all those along which no label's name
            has a side (left, anterior, upper, ...).
        flip_prob: of a flip along each of them.
        rotate90_prob: of a quarter turn, in a plane of two flip axes along which patch and spacing are equal.
        affine_prob: of a small rotation and zoom about the crop's centre.
        rotation_degrees: largest rotation about X, Y and Z; None plans it: 15, but 0 across anisotropic voxels.
        zoom_ratio: largest relative change of size.
        scale_prob: of a factor on the intensities.
        scale_ratio: its largest relative size.
        shift_prob: of an offset on the intensities.
        shift: its largest size, in mapped intensities.
        noise_prob: of Gaussian noise.
        noise_std: its largest standard deviation, in mapped intensities.
        gamma_prob: of a gamma curve over the crop's range of intensities.
        gamma: smallest and largest exponent.
        blur_prob: of smoothing with a Gaussian.
        blur_sigma: its smallest and largest width along each axis, in voxels.
        low_resolution_prob: of a loss of resolution: fewer voxels, and back to as many as before.
        low_resolution_zoom: smallest and largest share of the voxels that are left along each axis.
    """

    flip_axes: tuple[int, ...] | None = None
    flip_prob: float = 0.5
    rotate90_prob: float = 0.1
    affine_prob: float = 0.2
    rotation_degrees: tuple[float, float, float] | None = None
    zoom_ratio: float = 0.2
    scale_prob: float = 0.3
    scale_ratio: float = 0.2
    shift_prob: float = 0.3
    shift: float = 0.1
    noise_prob: float = 0.15
    noise_std: float = 0.1
    gamma_prob: float = 0.15
    gamma: tuple[float, float] = (0.7, 1.5)
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    low_resolution_prob: float = 0.0
    low_resolution_zoom: tuple[float, float] = (0.5, 1.0)

    def __post_init__(self) -> None:
        for name in ("flip", "rotate90", "affine", "scale", "shift", "noise", "gamma", "blur", "low_resolution"):
            value = getattr(self, f"{name}_prob")
            if not 0 <= value <= 1:
                raise ConfigError(f"{name}_prob is {value}; it must lie between 0 and 1.")
        for name in ("scale_ratio", "zoom_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1 (1 excluded).")
        for name in ("shift", "noise_std"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be zero or more.")
        for name, example in (
            ("gamma", "[0.7, 1.5]"),
            ("blur_sigma", "[0.5, 1.0]"),
            ("low_resolution_zoom", "[0.5, 1.0]"),
        ):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"{name} {(low, high)} must be two rising numbers above 0, such as {example}.")
        if self.low_resolution_zoom[1] > 1:
            raise ConfigError(f"low_resolution_zoom {self.low_resolution_zoom} must not exceed 1, such as [0.5, 1.0].")
        if self.flip_axes is not None and not set(self.flip_axes) <= {0, 1, 2}:
            raise ConfigError(f"flip_axes {list(self.flip_axes)} must name axes among 0 (X), 1 (Y) and 2 (Z).")

    def planned(self, labels: Mapping[int, str], spacing_mm: Spacing) -> "Augmentation":
        """These settings with the axes and angles left open filled in.

        Args:
            labels: label value -> name.
            spacing_mm: typical of the training scans.
        """
        flip_axes = self.flip_axes
        if flip_axes is None:
            flip_axes = tuple(axis for axis in range(3) if not sided_labels(labels, axis))
        degrees = self.rotation_degrees
        if degrees is None:
            x, y, z = (0.0 if _anisotropic(spacing_mm, axis) else 15.0 for axis in range(3))
            degrees = (x, y, z)
        return replace(self, flip_axes=flip_axes, rotation_degrees=degrees)

    @property
    def margin_ratio(self) -> float:
        """What a crop needs on each side, relative to its size, for a zoom and rotation without empty corners."""
        angle = np.deg2rad(max(self.rotation_degrees or (0.0,)))
        # How far the corners of a square reach, turned in one plane and zoomed out.
        reach = (np.cos(angle) + np.sin(angle)) * (1 + self.zoom_ratio)
        return float((reach - 1) / 2)

    def describe(self) -> str:
        """The planned axes and angles in words."""
        flips = ", ".join(_AXES[axis] for axis in self.flip_axes or ()) or "no axis"
        angles = " ".join(f"{angle:g}" for angle in self.rotation_degrees or ())
        return f"mirrored along {flips}; turned by up to {angles} degrees about X, Y, Z"


def sided_labels(labels: Mapping[int, str], axis: int) -> list[str]:
    """Names of the labels that name a side of an axis (0 X, 1 Y, 2 Z)."""
    return [name for value, name in labels.items() if value != 0 and SIDED_NAMES[axis].search(name)]


def _anisotropic(spacing_mm: Spacing, about: int) -> bool:
    one, other = (spacing_mm[axis] for axis in range(3) if axis != about)
    return max(one, other) > MAX_ANISOTROPY * min(one, other)


class Augmenter:
    """Changes one finished sample, as a pure function of the sample and a seed; can be sent to worker processes.

    Args:
        settings: planned settings.
        patch_size: voxels the network sees; a larger crop is cut to it by an affine change.
        spacing_mm: typical of the training scans.
    """

    def __init__(self, settings: Augmentation, patch_size: Triple, spacing_mm: Spacing) -> None:
        self.patch_size = patch_size
        self._affine = _affine(settings, patch_size)
        self._changes = _changes(settings, patch_size, spacing_mm)

    def __call__(self, sample: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
        """Vary ``image`` ``(1, C, *size)`` and ``label`` ``(1, *size)``; both come back in the patch size."""
        data = {"image": sample["image"][0], "label": sample["label"].float()}
        if tuple(data["label"].shape[1:]) != self.patch_size:
            self._affine.set_random_state(seed)
            data = self._affine(data)
        self._changes.set_random_state(seed)
        data = self._changes(data)
        image, label = (torch.as_tensor(data[key]).contiguous() for key in ("image", "label"))
        return {**sample, "image": image[None], "label": label.round().long()}


def _affine(settings: Augmentation, patch_size: Triple) -> "Compose":
    from monai.transforms.compose import Compose
    from monai.transforms.spatial.dictionary import RandAffined

    radians = [float(np.deg2rad(angle)) for angle in settings.rotation_degrees or (0.0, 0.0, 0.0)]
    change = RandAffined(
        ["image", "label"],
        prob=1.0,
        rotate_range=radians,
        scale_range=(settings.zoom_ratio,) * 3,
        spatial_size=patch_size,
        mode=("bilinear", "nearest"),
        padding_mode="border",
    )
    return Compose([change])


def _changes(settings: Augmentation, patch_size: Triple, spacing_mm: Spacing) -> "Compose":
    from monai.transforms.compose import Compose
    from monai.transforms.intensity import dictionary as intensity
    from monai.transforms.spatial import dictionary as spatial

    from mim3d.tasks.segmentation.blur import RandBlurd

    both, flip_axes = ["image", "label"], settings.flip_axes or ()
    flips = [spatial.RandFlipd(both, prob=settings.flip_prob, spatial_axis=axis) for axis in flip_axes]
    turns = [
        spatial.RandRotate90d(both, prob=settings.rotate90_prob, max_k=3, spatial_axes=plane)
        for plane in square_planes(flip_axes, patch_size, spacing_mm)
    ]
    # In the order of nnU-Net (Isensee et al. 2021): the scanner's noise and blur before what maps intensities.
    intensities = [
        intensity.RandGaussianNoised("image", prob=settings.noise_prob, std=settings.noise_std),
        RandBlurd("image", settings.blur_prob, settings.blur_sigma),
        intensity.RandScaleIntensityd("image", prob=settings.scale_prob, factors=settings.scale_ratio),
        intensity.RandShiftIntensityd("image", prob=settings.shift_prob, offsets=settings.shift),
        spatial.RandSimulateLowResolutiond(
            "image", prob=settings.low_resolution_prob, zoom_range=settings.low_resolution_zoom
        ),
        intensity.RandAdjustContrastd("image", prob=settings.gamma_prob, gamma=settings.gamma),
    ]
    return Compose([*flips, *turns, *intensities])


def square_planes(flip_axes: Sequence[int], patch_size: Triple, spacing_mm: Spacing) -> list[tuple[int, int]]:
    """Planes in which a quarter turn keeps the patch size and the proportions of the anatomy."""
    return [
        (one, other)
        for one, other in itertools.combinations(sorted(flip_axes), 2)
        if patch_size[one] == patch_size[other] and abs(spacing_mm[one] / spacing_mm[other] - 1) < 0.05
    ]
