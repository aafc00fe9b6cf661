"""How training crops and boxes are varied: settings, and what of them is planned from the labels."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mim3d.backbones.contract import check_axes
from mim3d.core.errors import ConfigError
from mim3d.core.types import Spacing
from mim3d.datasets.published.presets import Preset

#: Words in a label's name that tie it to one side of an axis: mirrored, it would carry the wrong name.
SIDED_NAMES = (
    re.compile(r"(left|right)|(^|[_\W])[lr]($|[_\W])", re.IGNORECASE),
    re.compile(r"anterior|posterior|ventral|dorsal|frontal|occipital", re.IGNORECASE),
    re.compile(r"superior|inferior|upper|lower|cranial|caudal|vertebra|(^|[_\W])[ctl]\d{1,2}($|[_\W])", re.IGNORECASE),
)

#: Voxels more than this anisotropic are not rotated across: the structure would be sheared, not turned.
MAX_ANISOTROPY = 2.0


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Probabilities and ranges; a probability of 0 switches a change off.

    Attributes:
        flip_axes: Axes (0 X, 1 Y, 2 Z) that may be mirrored. None plans them: all those along which no label's name
            has a side (left, anterior, upper, ...).
        flip_prob: Probability of a flip along each of them.
        rotate90_prob: Probability of a quarter turn, in a plane of two flip axes along which patch and spacing are
            equal.
        affine_prob: Probability of a small rotation and zoom about the crop's centre.
        rotation_degrees: Largest rotation about X, Y and Z. None plans it: 15, but 0 across anisotropic voxels.
        zoom_ratio: Largest relative change of size.
        scale_prob: Probability of a factor on the intensities.
        scale_ratio: Largest relative size of that factor.
        shift_prob: Probability of an offset on the intensities.
        shift: Largest size of that offset, in mapped intensities.
        noise_prob: Probability of Gaussian noise.
        noise_std: Largest standard deviation of that noise, in mapped intensities.
        gamma_prob: Probability of a gamma curve over the crop's range of intensities.
        gamma: Smallest and largest exponent of that curve.
        blur_prob: Probability of smoothing with a Gaussian.
        blur_sigma: Smallest and largest width of that Gaussian along each axis, in voxels.
        low_resolution_prob: Probability of a loss of resolution: fewer voxels, and back to as many as before.
        low_resolution_zoom: Smallest and largest share of the voxels that are left along each axis.
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
        check_axes(self.flip_axes or (), "flip_axes")

    def planned(self, labels: Mapping[int, str], spacing_mm: Spacing) -> "Augmentation":
        """Return these settings with the axes and angles left open filled in.

        Args:
            labels: Label value -> name.
            spacing_mm: Typical voxel size of the training scans.
        """
        flip_axes = self.flip_axes
        if flip_axes is None:
            flip_axes = tuple(axis for axis in range(3) if not sided_labels(labels, axis))
        degrees = self.rotation_degrees
        if degrees is None:
            largest = []
            for axis in range(3):
                one, other = (spacing_mm[across] for across in range(3) if across != axis)
                largest.append(0.0 if max(one, other) > MAX_ANISOTROPY * min(one, other) else 15.0)
            degrees = (largest[0], largest[1], largest[2])
        return replace(self, flip_axes=flip_axes, rotation_degrees=degrees)

    @property
    def margin_ratio(self) -> float:
        """What a crop needs on each side, relative to its size, for a zoom and rotation without empty corners."""
        angle = np.deg2rad(max(self.rotation_degrees or (0.0,)))
        # How far the corners of a square reach, turned in one plane and zoomed out.
        reach = (np.cos(angle) + np.sin(angle)) * (1 + self.zoom_ratio)
        return float((reach - 1) / 2)

    def describe(self) -> str:
        """Return the planned axes and angles in words."""
        flips = ", ".join("XYZ"[axis] for axis in self.flip_axes or ()) or "no axis"
        angles = " ".join(f"{angle:g}" for angle in self.rotation_degrees or ())
        return f"mirrored along {flips}; turned by up to {angles} degrees about X, Y, Z"

    def check_mirrors(self, mirror_axes: Sequence[int], names: Mapping[int, str], kind: str) -> None:
        """Refuse to mirror at prediction what was never mirrored in training.

        Args:
            mirror_axes: Axes to be mirrored at prediction.
            names: Value -> name of labels or classes.
            kind: What the names stand for, in the words of the error.

        Raises:
            ConfigError: The sentence names the axis, and the label or class because of which it was left out.
        """
        unseen = set(mirror_axes) - set(self.flip_axes or ())
        if unseen:
            sided = sided_labels(names, min(unseen))
            reason = f" (left out because of the {kind} '{sided[0]}')" if sided else ""
            raise ConfigError(
                f"mirror_axes names axis {min(unseen)}, which is none of the augmentation's flip axes "
                f"{list(self.flip_axes or ())}{reason}; leave it out, or set augmentation.flip_axes."
            )


def sided_labels(labels: Mapping[int, str], axis: int) -> list[str]:
    """Return the names of labels that name a side of an axis (0 X, 1 Y, 2 Z); the background has none."""
    return [name for value, name in labels.items() if value != 0 and SIDED_NAMES[axis].search(name)]


def published_augmentation(preset: Preset) -> Augmentation:
    """The augmentation that is published for a data set, or the default one where none is.

    As published: along every axis, whatever the labels' names say, and nothing that is not named.
    """
    if preset.variation is None:
        return Augmentation()
    return Augmentation(flip_axes=(0, 1, 2), scale_prob=0.0, gamma_prob=0.0, **asdict(preset.variation))
