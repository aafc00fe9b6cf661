"""What a data set asks for when nobody described it: how its intensities are mapped."""

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

from mim3d.data.foreground import HU_BELOW
from mim3d.data.transforms import Intensity

if TYPE_CHECKING:
    from mim3d.data.cache import CachedScan


def plan_intensity(scans: Sequence["CachedScan"]) -> Intensity:
    """CT (air far below zero) gets the Hounsfield window, every other modality the z-score of its foreground."""
    lowest = median(stats.minimum for scan in scans for stats in scan.statistics)
    return Intensity() if lowest < HU_BELOW else Intensity(kind="zscore", window=None)
