"""Spatial masks: units of masking on a grid, and the tokens that lie inside them. A mask is boolean, True = hidden."""

import math

import numpy as np
import torch
from torch import Tensor

from mim3d.types import Triple


def num_hidden(num_units: int, hidden_ratio: float) -> int:
    """``hidden_ratio x num_units``, half rounded up."""
    # The small term keeps a product such as 0.7 x 45 = 31.499999999999996 from losing its half to binary rounding.
    return math.floor(hidden_ratio * num_units + 0.5 + 1e-9)


def draw_hidden_units(num_units: int, hidden_ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of the hidden units, sorted; always ``num_hidden(num_units, hidden_ratio)`` of them."""
    return np.sort(rng.permutation(num_units)[: num_hidden(num_units, hidden_ratio)])


def unit_mask(hidden_units: np.ndarray, unit_grid: Triple, tokens_per_unit: Triple) -> np.ndarray:
    """Token mask ``(L,)`` in raster order that hides exactly the tokens inside the hidden units.

    Args:
        hidden_units: raster indices of hidden units on ``unit_grid``.
        unit_grid: units along X, Y, Z.
        tokens_per_unit: tokens of one unit along X, Y, Z.
    """
    units = np.zeros(math.prod(unit_grid), dtype=bool)
    units[hidden_units] = True
    mask = units.reshape(unit_grid)
    for axis, repeats in enumerate(tokens_per_unit):
        mask = np.repeat(mask, repeats, axis=axis)
    return mask.reshape(-1)


def unit_index(unit: int, unit_grid: Triple) -> Triple:
    """Position of a raster index on ``unit_grid``."""
    x, y, z = np.unravel_index(unit, unit_grid)
    return int(x), int(y), int(z)


def split_units(grid_BXYZE: Tensor, unit_grid: Triple) -> Tensor:
    """Group a grid ``(B, X, Y, Z, E)`` into its units: ``(B, U, N, E)``, ``N`` places inside each of ``U`` units."""
    batch, *shape, width = grid_BXYZE.shape
    ux, uy, uz = unit_grid
    nx, ny, nz = (size // units for size, units in zip(shape, unit_grid, strict=True))
    grouped = grid_BXYZE.reshape(batch, ux, nx, uy, ny, uz, nz, width).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return grouped.reshape(batch, ux * uy * uz, nx * ny * nz, width)


def visible_indices(hidden_BL: Tensor) -> Tensor:
    """Raster indices ``(B, V)`` of visible tokens; every sample of the batch hides the same number.

    Raises:
        ValueError: when the samples hide different numbers of tokens.
    """
    counts = (~hidden_BL).sum(1)
    visible = (~hidden_BL).nonzero()[:, 1]
    if visible.numel() != hidden_BL.shape[0] * int(counts[0]):
        raise ValueError(f"every sample must hide the same number of tokens, got {hidden_BL.sum(1).tolist()} hidden")
    return visible.reshape(hidden_BL.shape[0], -1)


def take_tokens(tokens_BLE: Tensor, indices_BV: Tensor) -> Tensor:
    """Tokens ``(B, V, E)`` at raster indices ``(B, V)``."""
    return torch.take_along_dim(tokens_BLE, indices_BV[..., None], dim=1)
