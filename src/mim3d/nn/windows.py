"""Attention in shifted windows (Liu et al. 2021) over a grid of tokens, without shifting it and without masks.

A shift by half a window cuts the first and the last window of an axis in two, whose parts do not see each other. Here
such parts are windows of their own, only smaller: what a mask would throw away is never computed, and nothing is moved.
Windows that reach over the end of the grid are filled up with empty tokens, which are keys but ask nothing themselves.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.core.types import Triple
from mim3d.kernels.biased_attention import biased_attention

# Shape suffixes: B batch, X Y Z tokens along each axis, E embedding, H heads, N windows, Q tokens that ask, K that
# answer, d channels of a head, W places of a whole window.


@dataclass(frozen=True)
class WindowRun:
    """Consecutive windows of one kind along one axis.

    Attributes:
        count: Number of windows.
        length: Tokens of each, empty ones beyond the grid among them.
        shown: Tokens of each that lie in the grid.
        place: Where its first token lies in a whole window.
    """

    count: int
    length: int
    shown: int
    place: int


@lru_cache(maxsize=1024)
def window_runs(size: int, window: int, shift: int) -> tuple[WindowRun, ...]:
    """The windows along an axis of ``size`` tokens, side by side from its first token.

    Args:
        size: Tokens along the axis.
        window: Tokens of a whole window, at most ``size``.
        shift: Tokens by which windows are shifted.
    """
    # Shifted by rolling, the first tokens would end up in the last window, behind the axis's last ones.
    lengths = [shift] * (shift > 0) + [window] * ((size - shift) // window)
    rest = size - sum(lengths)
    cut = window - shift if shift else window
    # The part that is left holds as many empty tokens as fill its window up, or the part of it that is no first one.
    whole = math.ceil(size / window) * window
    if rest:
        lengths.append(window if sum(lengths) + cut < whole else cut)
    runs: list[WindowRun] = []
    for index, length in enumerate(lengths):
        last = index == len(lengths) - 1
        shown = rest if last and rest else length
        place = window - shift if shift and index == 0 else 0
        if runs and runs[-1] == WindowRun(runs[-1].count, length, shown, place):
            runs[-1] = WindowRun(runs[-1].count + 1, length, shown, place)
        else:
            runs.append(WindowRun(1, length, shown, place))
    return tuple(runs)


def relative_places(window: int) -> Tensor:
    """For every pair of places in a window of ``window^3`` tokens, where their offset stands in a table: ``(W, W)``.

    Offsets from ``1 - window`` to ``window - 1`` along X, Y, Z are numbered in raster order.
    """
    places = torch.cartesian_prod(*(torch.arange(window),) * 3)
    offsets = places[:, None] - places[None] + window - 1
    edge = 2 * window - 1
    return offsets @ torch.tensor([edge * edge, edge, 1])


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows of a token grid, with a learned bias for every offset of two tokens.

    Args:
        dim: Width of a token.
        num_heads: Heads; must divide ``dim``.
        window: Tokens of a window along each axis. Where the grid has fewer, the window is as long as the grid.
        shifted: Whether windows are shifted by half their length, along the axes that hold more than one.
    """

    def __init__(self, dim: int, num_heads: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.num_heads, self.window, self.shifted = num_heads, window, shifted
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 3, num_heads))
        nn.init.normal_(self.relative_position_bias_table, std=0.02)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens_BXYZE: Tensor, places_WW: Tensor) -> Tensor:
        """Tokens ``(B, X, Y, Z, E)`` after attention.

        Args:
            tokens_BXYZE: The grid of tokens.
            places_WW: Those of :func:`relative_places`, which all layers of one window length share.
        """
        grid = tokens_BXYZE.shape[1:4]
        window = tuple(min(self.window, size) for size in grid)
        runs = [
            window_runs(size, length, self.window // 2 if self.shifted and size > self.window else 0)
            for size, length in zip(grid, window, strict=True)
        ]
        lengths = [[run.count * run.length for run in along] for along in runs]
        filled = [sum(along) - size for along, size in zip(lengths, grid, strict=True)]
        if any(filled):
            # Empty tokens are zeros before the linear layer, and so its bias after it.
            pad = [amount for size in reversed(filled) for amount in (0, size)]
            qkv = F.pad(F.linear(tokens_BXYZE, self.qkv.weight), (0, 0, *pad))
            qkv = qkv + self.qkv.bias.to(qkv.dtype)
        else:
            qkv = self.qkv(tokens_BXYZE)
        places = self._places_in(window, places_WW)
        slabs = []
        for along_x, slab in zip(runs[0], torch.split(qkv, lengths[0], dim=1), strict=True):
            bars = []
            for along_y, bar in zip(runs[1], torch.split(slab, lengths[1], dim=2), strict=True):
                boxes = zip(runs[2], torch.split(bar, lengths[2], dim=3), strict=True)
                bars.append(
                    torch.cat([self._attend(box, (along_x, along_y, run), places) for run, box in boxes], dim=3)
                )
            slabs.append(torch.cat(bars, dim=2))
        return self.proj(torch.cat(slabs, dim=1))

    def _places_in(self, window: tuple[int, ...], places_WW: Tensor) -> Tensor:
        """Places in the table for every pair of tokens in a window: ``(*window, *window)``.

        A window cut short by the grid numbers its tokens as the first ones of a whole window, as Swin's authors and
        MONAI do: checkpoints are trained so, though the offsets are not the true ones then.
        """
        tokens = math.prod(window)
        return places_WW[:tokens, :tokens].reshape(*window, *window)

    def _attend(self, qkv_BXYZF: Tensor, runs: Sequence[WindowRun], places: Tensor) -> Tensor:
        """Attended tokens ``(B, X, Y, Z, E)`` of windows of one kind; those that lie in the grid."""
        counts, lengths, shown = zip(*((run.count, run.length, run.shown) for run in runs), strict=True)
        for axis, run in enumerate(runs):
            places = places.narrow(axis, run.place, run.shown).narrow(3 + axis, run.place, run.length)
        num_queries, num_keys = math.prod(shown), math.prod(lengths)
        bias_QKH = self.relative_position_bias_table.index_select(0, places.flatten())
        bias_HQK = bias_QKH.reshape(num_queries, num_keys, self.num_heads).permute(2, 0, 1).contiguous()
        split = [edge for pair in zip(counts, lengths, strict=True) for edge in pair]
        windows = qkv_BXYZF.reshape(qkv_BXYZF.shape[0], *split, 3, self.num_heads, -1)
        windows = windows.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9).flatten(1, 4)
        query, key, value = windows.unbind(0)
        query = query[:, :, : shown[0], : shown[1], : shown[2]].flatten(2, 4)
        attended = biased_attention(query, key.flatten(2, 4), value.flatten(2, 4), bias_HQK)
        attended = attended.reshape(-1, *counts, self.num_heads, *shown, attended.shape[-1])
        attended = attended.permute(0, 1, 5, 2, 6, 3, 7, 4, 8)
        x, y, z = (count * inside for count, inside in zip(counts, shown, strict=True))
        return attended.reshape(-1, x, y, z, self.proj.in_features)


def merge_neighbours(tokens_BXYZE: Tensor, order: Sequence[Triple]) -> Tensor:
    """Tokens of half the grid, ``(B, X / 2, Y / 2, Z / 2, 8 E)``: each 2^3 of them side by side.

    Args:
        tokens_BXYZE: A grid of even sizes.
        order: Which of the eight come first, by their offsets 0 or 1 along X, Y, Z.
    """
    x, y, z = (size // 2 for size in tokens_BXYZE.shape[1:4])
    split = tokens_BXYZE.reshape(tokens_BXYZE.shape[0], x, 2, y, 2, z, 2, -1)
    corners = (corner for slab in split.unbind(2) for bar in slab.unbind(3) for corner in bar.unbind(4))
    by_offset = dict(zip(itertools.product((0, 1), repeat=3), corners, strict=True))
    return torch.cat([by_offset[offset] for offset in order], dim=-1)
