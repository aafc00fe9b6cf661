"""The plain way from a prepared grid back to the scan's own: what prediction does row by row, done at once."""

import numpy as np

from mim3d.caching.preprocessing import Prepared
from mim3d.caching.resampling import plan_resampling, resample_linear


def restore(scores_KXYZ: np.ndarray, prepared: Prepared) -> np.ndarray:
    """Bring scores from the grid of ``prepared`` to the RAS+ form of ``prepared.grid``, (K, X, Y, Z) float32."""
    grid = prepared.grid
    axes = plan_resampling(prepared.image.shape[1:], prepared.spacing_mm, grid.ras_shape, grid.spacing_mm)
    return np.stack([resample_linear(scores, axes) for scores in scores_KXYZ])
