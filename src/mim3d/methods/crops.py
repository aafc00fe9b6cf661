"""What methods share that cut crops out of scans: where a crop lies, how it is varied, and whether scans hold it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import numpy as np

from mim3d.core.errors import ConfigError
from mim3d.core.types import Triple
from mim3d.methods.contract import Method

#: More padding than this share is refused.
MAX_PADDING = 0.5

#: What holds too much air is drawn anew until it was drawn so many times; the draw with least air is kept.
MAX_DRAWS = 8

#: Rules of :func:`require_share`.
AMOUNT, PROBABILITY = "must lie between 0 (none) and 1", "is no probability; use 0 to 1"
AIR_SHARE = "is no share; use 0 to 1, or null for no limit"

Drawn = TypeVar("Drawn")


@dataclass(frozen=True, kw_only=True)
class VariedMethod(Method):
    """Settings of a method whose samples are flipped and changed in intensity as a whole.

    Attributes:
        flip_prob: Probability of a flip along each axis, one draw for all crops of a sample.
        intensity_gain: The intensities of a sample are multiplied by 1 plus or minus at most this.
        intensity_bias: And shifted by at most this.
    """

    flip_prob: float = 0.5
    intensity_gain: float = 0.1
    intensity_bias: float = 0.1

    def __post_init__(self) -> None:
        for name in ("intensity_gain", "intensity_bias"):
            require_share(name, getattr(self, name), AMOUNT)
        require_share("flip_prob", self.flip_prob, PROBABILITY)

    def variation(self, rng: np.random.Generator) -> tuple[tuple[bool, bool, bool], float, float]:
        """Axes along which a sample is flipped, and the gain and bias of its intensities."""
        x, y, z = (bool(flip) for flip in rng.random(3) < self.flip_prob)
        gain = 1 + self.intensity_gain * rng.uniform(-1, 1)
        return (x, y, z), gain, self.intensity_bias * rng.uniform(-1, 1)


def require_share(name: str, value: float | None, rule: str) -> None:
    """Refuse a setting of a method that is given and not from 0 to 1: a ConfigError that ends in ``rule``."""
    if value is not None and not 0 <= value <= 1:
        raise ConfigError(f"method.{name} ({value}) {rule}.")


def median_shape(shapes: Sequence[Triple]) -> Triple:
    """Voxels of the median scan along X, Y, Z."""
    x, y, z = (int(median(axis)) for axis in zip(*shapes, strict=True))
    return x, y, z


def padding_ratio(footprint: Triple, shapes: Sequence[Triple]) -> float:
    """Share of a crop of ``footprint`` voxels that lies outside the scan, averaged over scans of ``shapes``."""
    inside = np.minimum(np.array(footprint), np.array(shapes)) / np.array(footprint)
    return float(1 - inside.prod(axis=1).mean())


def check_crop(
    what: str, size: Triple, fitting: Triple, shapes: Sequence[Triple], *, otherwise: str, fits: str = ""
) -> None:
    """Refuse crops that are mostly padding.

    Args:
        what: Name of the setting.
        size: Voxels of a crop.
        fitting: Voxels of the crop that would be planned.
        shapes: Voxels of every scan.
        otherwise: Remedy where that one is mostly padding, too.
        fits: Remedy where it is not; to use its size if not given.

    Raises:
        ConfigError: Above ``MAX_PADDING``, with the remedy.
    """
    share = padding_ratio(size, shapes)
    if share > MAX_PADDING:
        remedy = (fits or f"use {by_text(fitting)}") if padding_ratio(fitting, shapes) <= MAX_PADDING else otherwise
        raise ConfigError(
            f"{what}: {share:.0%} of every {by_text(size)} crop would be padding, since the scans have "
            f"{by_text(median_shape(shapes))} voxels (median); {remedy}."
        )


def with_little_air(draw: Callable[[], tuple[Drawn, float]], max_air: float | None) -> tuple[Drawn, float]:
    """What was drawn, and its share of air: drawn anew while that is above ``max_air``, up to ``MAX_DRAWS`` times.

    Args:
        draw: Draws once.
        max_air: Largest share of air; None keeps the first draw.
    """
    best = draw()
    for _ in range(MAX_DRAWS - 1):
        if max_air is None or best[1] <= max_air:
            break
        best = min(best, draw(), key=lambda candidate: candidate[1])
    return best


def draw_origin(
    shape: Triple, body_box: tuple[Triple, Triple], footprint: Triple, rng: np.random.Generator, step: int = 1
) -> Triple:
    """First voxel of a random crop: inside the scan and the body box where it fits, else covering them.

    With ``step`` it is a multiple of that along every axis, the next one below where none lies in that range.
    """
    origin = []
    for voxels, start, stop, size in zip(shape, *body_box, footprint, strict=True):
        low, high = sorted((start, stop - size))
        if voxels >= size:
            low, high = max(low, 0), min(high, voxels - size)
        else:
            low, high = voxels - size, 0
        last = high // step
        first = min(-(-low // step), last)
        origin.append(step * int(rng.integers(first, last + 1)))
    return origin[0], origin[1], origin[2]


def by_text(size: Sequence[int]) -> str:
    """A size in a line or an error: ``36x52x36``."""
    return "x".join(map(str, size))
