"""Masked depth-wise convolution in plain PyTorch: blocks are gathered with their halo, a few at a time.

The reference for the other implementations, and what runs wherever they do not.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.kernels.depthwise import tile_weight_gradient
from mim3d.kernels.machine import chunk_length

# Shape suffixes: N blocks of edge s (h with a halo of k // 2), C channels, k kernel edge; n blocks of one chunk, H
# voxels of a block with its halo, R voxels of all blocks.


def convolve(features_NsssC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor | None, neighbours_N27: Tensor) -> Tensor:
    """Convolved blocks ``(N, s, s, s, C)``; hidden neighbours count as zeros."""
    weight = weight_C1kkk.to(features_NsssC.dtype)
    bias = None if bias_C is None else bias_C.to(features_NsssC.dtype)
    out_NsssC = torch.empty_like(features_NsssC)
    for chunk, halo_nhhhC in _with_halo(features_NsssC, neighbours_N27, weight.shape[-1]):
        convolved = F.conv3d(halo_nhhhC.permute(0, 4, 1, 2, 3), weight, bias, groups=len(weight))
        out_NsssC[chunk] = convolved.permute(0, 2, 3, 4, 1)
    return out_NsssC


def weight_gradient(features_NsssC: Tensor, grad_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> Tensor:
    """Gradient ``(C, 1, k, k, k)`` of the kernel, in float32 or better."""
    dtype = torch.promote_types(features_NsssC.dtype, torch.float32)
    total = features_NsssC.new_zeros(features_NsssC.shape[-1], 1, *(kernel_size,) * 3, dtype=dtype)
    for chunk, halo_nhhhC in _with_halo(features_NsssC, neighbours_N27, kernel_size):
        total += tile_weight_gradient(halo_nhhhC, grad_NsssC[chunk])
    return total


def _with_halo(features_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> Iterator[tuple[slice, Tensor]]:
    """All blocks, a few at a time, with the voxels around them ``(n, h, h, h, C)``: of visible tokens, else zero."""
    edge, channels = features_NsssC.shape[-2:]
    halo = edge + kernel_size - 1
    rows_RC = features_NsssC.reshape(-1, channels)
    neighbour_H, voxel_H = (torch.from_numpy(part).to(rows_RC.device) for part in _sources(edge, kernel_size))
    length = chunk_length(rows_RC.device, halo**3 * channels * rows_RC.element_size())
    for start in range(0, len(neighbours_N27), length):
        chunk = slice(start, start + length)
        block_nH = neighbours_N27[chunk, neighbour_H]
        row_nH = (block_nH * edge**3 + voxel_H).clamp_min(0)
        halo_nHC = rows_RC[row_nH.flatten()].reshape(*row_nH.shape, channels)
        # Multiplied, not filled: the library is several times faster at it.
        halo_nHC.mul_((block_nH >= 0)[..., None].to(halo_nHC.dtype))
        yield chunk, halo_nHC.reshape(-1, halo, halo, halo, channels)


@lru_cache(maxsize=32)
def _sources(edge: int, kernel_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each voxel of a block with its halo comes from: which of 27 neighbours, and which voxel of that block."""
    positions = np.arange(edge + kernel_size - 1) - kernel_size // 2
    neighbours = np.meshgrid(*[positions // edge + 1] * 3, indexing="ij")
    voxels = np.meshgrid(*[positions % edge] * 3, indexing="ij")
    neighbour = np.ravel_multi_index([axis.ravel() for axis in neighbours], (3, 3, 3))
    voxel = np.ravel_multi_index([axis.ravel() for axis in voxels], (edge, edge, edge))
    return neighbour, voxel
