"""Tokens on a grid: which are hidden, by units of masking, and where they lie. A mask is boolean, True = hidden."""

import math
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mim3d.core.types import Triple

#: Channels of a head that rotary positions turn as a pair: i and i + d / 2 of d (halves), or 2 i and 2 i + 1.
RotaryPairs = Literal["halves", "neighbours"]


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
        hidden_units: Raster indices of hidden units on ``unit_grid``.
        unit_grid: Units along X, Y, Z.
        tokens_per_unit: Tokens of one unit along X, Y, Z.
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


def split_tokens(hidden_BL: Tensor, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Raster indices of the visible ``(B, L - num_hidden)`` and of the hidden ``(B, num_hidden)`` tokens.

    The number is given, not counted, so that nothing waits for a GPU.

    Args:
        hidden_BL: Token mask, True = hidden.
        num_hidden: Hidden tokens of every sample.
    Raises:
        RuntimeError: A sample hides another number of tokens.
    """
    torch._assert_async((hidden_BL.sum(1) == num_hidden).all(), f"every sample must hide {num_hidden} tokens")
    order_BL = hidden_BL.to(torch.uint8).argsort(dim=1, stable=True)
    return order_BL[:, : hidden_BL.shape[1] - num_hidden], order_BL[:, hidden_BL.shape[1] - num_hidden :]


def take_tokens(tokens_BLE: Tensor, indices_BV: Tensor) -> Tensor:
    """Tokens ``(B, V, E)`` at raster indices ``(B, V)``."""
    return torch.take_along_dim(tokens_BLE, indices_BV[..., None], dim=1)


def sincos_positions(grid: Triple, embed_dim: int) -> Tensor:
    """Embeddings ``(L, embed_dim)`` of a token grid, in raster order.

    A third of the channels each for X, Y and Z: sines, then cosines, of the index times 10000^(-i / n) for
    ``n = embed_dim // 6`` frequencies. Channels left over when ``embed_dim`` is no multiple of 6 are zero.
    """
    return torch.from_numpy(_table(grid, embed_dim))


def resized_positions(table_LE: Tensor, own: Triple, grid: Triple) -> Tensor:
    """Learned embeddings ``(L, E)`` of a grid from a table of those of another, by trilinear interpolation.

    As DINOv2 does it, a tenth of a token is added to the size that is asked for, along axes that differ.

    Args:
        table_LE: Embeddings in raster order of the grid ``own``.
        own: Tokens along X, Y, Z that the table has.
        grid: Tokens along X, Y, Z that are asked for.
    """
    if own == grid:
        return table_LE
    scales = [1.0 if have == want else (want + 0.1) / have for have, want in zip(own, grid, strict=True)]
    table_1EXYZ = table_LE.T.reshape(1, -1, *own)
    return functional.interpolate(table_1EXYZ, scale_factor=scales, mode="trilinear")[0].flatten(1).T


def rotary_angles(grid: Triple, head_dim: int, base: float = 100.0) -> Tensor:
    """Angles ``(L, head_dim // 2)`` by which rotary positions turn pairs of channels, in raster order of the tokens.

    A third of the pairs each for X, Y and Z (Su et al. 2021; axial as in Heo et al. 2024): the index times
    base^(-i / n) for ``n = head_dim // 6`` frequencies. Pairs left over when ``head_dim`` is no multiple of 6 are not
    turned.
    """
    return torch.from_numpy(_angles(grid, head_dim, base))


def rotate(vectors: Tensor, angles: Tensor, pairs: RotaryPairs = "halves") -> Tensor:
    """Turn pairs of channels of vectors ``(..., d)`` by angles ``(..., d / 2)``.

    Args:
        vectors: Queries or keys.
        angles: An angle for each pair.
        pairs: Which channels are a pair.
    """
    sine, cosine = angles.sin().to(vectors.dtype), angles.cos().to(vectors.dtype)
    if pairs == "neighbours":
        first, second = vectors[..., ::2], vectors[..., 1::2]
        return torch.stack([first * cosine - second * sine, first * sine + second * cosine], dim=-1).flatten(-2)
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


@lru_cache(maxsize=32)
def _angles(grid: Triple, head_dim: int, base: float) -> np.ndarray:
    num_frequencies = head_dim // 6
    frequencies = base ** (-np.arange(num_frequencies) / num_frequencies)
    axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing="ij")
    angles = np.concatenate([axis.reshape(-1, 1) * frequencies for axis in axes], axis=1)
    return np.pad(angles, ((0, 0), (0, head_dim // 2 - angles.shape[1]))).astype(np.float32)


# Tables are kept as arrays: a tensor made in one mode (a dry run on fake tensors, say) must not turn up in another.
@lru_cache(maxsize=32)
def _table(grid: Triple, embed_dim: int) -> np.ndarray:
    num_frequencies = embed_dim // 6
    frequencies = 10000.0 ** (-np.arange(num_frequencies) / num_frequencies)
    axes = np.meshgrid(*(np.arange(size, dtype=np.float64) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in axes]
    waves = np.concatenate([part for angle in angles for part in (np.sin(angle), np.cos(angle))], axis=1)
    return np.pad(waves, ((0, 0), (0, embed_dim - waves.shape[1]))).astype(np.float32)
