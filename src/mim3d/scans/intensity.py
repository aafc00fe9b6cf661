"""How intensities become network input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from mim3d.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from mim3d.caching.foreground import Statistics
    from mim3d.caching.stored_voxels import StoredIntensity

#: Clipping range of CT pre-training, HU.
CT_WINDOW_HU = (-1000.0, 1000.0)

#: The rescaling (factor, offset, lower and upper bound) that leaves numbers as they are.
NO_RESCALING = (1.0, 0.0, -np.inf, np.inf)


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """How intensities become network input.

    Attributes:
        kind: ``window`` clips to ``window`` and maps it to [0, 1] (CT); ``zscore`` subtracts the mean and divides by
            the standard deviation of the scan's foreground (MRI, whose scale differs from file to file).
        window: Lower and upper bound in source units (HU for CT); only ``window`` needs it.
    """

    kind: Literal["window", "zscore"] = "window"
    window: tuple[float, float] | None = CT_WINDOW_HU

    def __post_init__(self) -> None:
        window = (0.0, 1.0) if self.window is None and self.kind == "zscore" else self.window
        if window is None or not -np.inf < window[0] < window[1] < np.inf:
            raise ConfigError(f"intensity window {self.window} must be two rising numbers, such as [-1000, 1000].")

    @property
    def bounds(self) -> tuple[float, float]:
        """Range in source units to which intensities are clipped; infinite where they are not."""
        return self.window if self.kind == "window" and self.window is not None else (-np.inf, np.inf)

    def apply(self, image_CXYZ: np.ndarray, statistics: Sequence["Statistics"]) -> np.ndarray:
        """Map ``(C, X, Y, Z)`` voxels in source units to float32 network input, channel by channel."""
        image = image_CXYZ.astype(np.float32)
        for channel, stats in zip(image, statistics, strict=True):
            low, width = self._zero_and_unit(stats)
            if self.kind == "window":
                np.clip(channel, *self.bounds, out=channel)
            channel -= low
            channel /= width
        return image

    def rescaling(
        self,
        stored: Sequence["StoredIntensity"],
        statistics: Sequence["Statistics"],
        *,
        gain: float = 1.0,
        bias: float = 0.0,
    ) -> np.ndarray:
        """The map from stored numbers to network input: ``apply`` to their values, then gain and bias.

        Every step of it is affine, so all together are one multiplication, one addition and one clip, see
        ``apply_rescaling``.

        Args:
            stored: Map from stored numbers to source units, for each channel.
            statistics: Statistics of each channel.
            gain: Factor on the network input.
            bias: Offset of the network input, added after the factor.

        Returns:
            ``(C, 4)`` float32: factor, offset, lower and upper bound of each channel.
        """
        bounds = (min(bias, gain + bias), max(bias, gain + bias)) if self.kind == "window" else (-np.inf, np.inf)
        rescaling = np.empty((len(stored), len(NO_RESCALING)), dtype=np.float32)
        for row, units, stats in zip(rescaling, stored, statistics, strict=True):
            low, width = self._zero_and_unit(stats)
            row[:] = gain * units.scale / width, gain * (units.offset - low) / width + bias, *bounds
        return rescaling

    def _zero_and_unit(self, stats: "Statistics") -> tuple[float, float]:
        """The intensity that becomes 0, and the step from there to 1."""
        if self.kind == "window":
            assert self.window is not None
            return self.window[0], self.window[1] - self.window[0]
        return stats.mean, max(stats.std, 1e-6)


def apply_rescaling(image: "Tensor", rescaling: np.ndarray) -> None:
    """Make network input of stored numbers, channel by channel, in place: ``clip(number * factor + offset)``.

    Args:
        image: ``(..., C, X, Y, Z)`` float32 on any device.
        rescaling: ``(C, 4)``, see ``Intensity.rescaling``.
    """
    # Bounds that are plain numbers are several times faster on a CPU than tensors of them.
    for channel, (factor, offset, low, high) in zip(image.movedim(-4, 0), rescaling.tolist(), strict=True):
        channel.mul_(factor).add_(offset).clamp_(low, high)
