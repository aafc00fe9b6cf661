"""Depth-wise convolution of whole volumes with a backward pass made of forward convolutions.

The library's CPU kernels for the gradients of a depth-wise convolution take twenty times as long as its forward pass.
Both gradients are forward convolutions themselves, exactly:

- of the input: the output's gradient convolved with the flipped kernel;
- of the weight: the input convolved with the output's gradient as the kernel, cut into tiles of 8^3 that stay in the
  processor's cache, one group per tile and channel, summed over tiles.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape suffixes: B samples, X Y Z space, C channels, k kernel edge; N tiles of edge s (h with a halo of k // 2).

#: Edge of the tiles that the gradient of the weight is summed over.
TILE = 8


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_BXYZC: Tensor, weight_C1kkk: Tensor) -> Tensor:
        ctx.save_for_backward(features_BXYZC, weight_C1kkk)
        return _convolve(features_BXYZC, weight_C1kkk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features_BXYZC, weight_C1kkk = ctx.saved_tensors
        grad_BXYZC = grads[0].to(features_BXYZC.dtype)
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = _convolve(grad_BXYZC, weight_C1kkk.flip(2, 3, 4))
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(features_BXYZC, grad_BXYZC, weight_C1kkk)
        return grad_features, grad_weight


def _convolve(features_BXYZC: Tensor, weight_C1kkk: Tensor) -> Tensor:
    weight = weight_C1kkk.to(features_BXYZC.dtype)
    out = F.conv3d(features_BXYZC.permute(0, 4, 1, 2, 3), weight, padding=weight.shape[-1] // 2, groups=len(weight))
    return out.permute(0, 2, 3, 4, 1)


def _weight_gradient(features_BXYZC: Tensor, grad_BXYZC: Tensor, weight_C1kkk: Tensor) -> Tensor:
    """Sum over all tiles; one column of tiles along Z at a time is cut, so that little is copied."""
    kernel_size = weight_C1kkk.shape[-1]
    lacking = [-size % TILE for size in grad_BXYZC.shape[1:4]]
    pad = [part for size in reversed(lacking) for part in (kernel_size // 2, size + kernel_size // 2)]
    padded = F.pad(features_BXYZC, (0, 0, *pad))
    grad = F.pad(grad_BXYZC, (0, 0, *[part for size in reversed(lacking) for part in (0, size)]))
    halo = TILE + kernel_size - 1
    total_C1kkk = torch.zeros_like(weight_C1kkk, dtype=torch.promote_types(weight_C1kkk.dtype, torch.float32))
    for sample, grad_sample in zip(padded, grad, strict=True):
        for x in range(0, grad.shape[1], TILE):
            for y in range(0, grad.shape[2], TILE):
                column_hhNCh = sample[x : x + halo, y : y + halo].unfold(2, halo, TILE)
                grads_ssNCs = grad_sample[x : x + TILE, y : y + TILE].unfold(2, TILE, TILE)
                total_C1kkk += tile_weight_gradient(
                    column_hhNCh.permute(2, 0, 1, 4, 3), grads_ssNCs.permute(2, 0, 1, 4, 3)
                )
    return total_C1kkk.to(weight_C1kkk.dtype)


def tile_weight_gradient(features_NhhhC: Tensor, grad_NsssC: Tensor) -> Tensor:
    """Gradient ``(C, 1, k, k, k)`` of a depth-wise kernel, ``k = h - s + 1``, summed over a few tiles, in float32.

    Tiles become channels of one grouped convolution whose kernel is the gradient, channels last.
    """
    num_tiles, halo, *_, channels = features_NhhhC.shape
    edge = grad_NsssC.shape[1]
    groups = num_tiles * channels
    features = features_NhhhC.permute(1, 2, 3, 0, 4).reshape(1, halo, halo, halo, groups).permute(0, 4, 1, 2, 3)
    kernels = grad_NsssC.permute(0, 4, 1, 2, 3).reshape(groups, 1, edge, edge, edge)
    per_tile = F.conv3d(features, kernels, groups=groups).reshape(num_tiles, channels, -1)
    kernel_size = halo - edge + 1
    summed = per_tile.sum(0, dtype=torch.promote_types(per_tile.dtype, torch.float32))
    return summed.reshape(channels, 1, kernel_size, kernel_size, kernel_size)


def depthwise_dense(features_BXYZC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor) -> Tensor:
    """Depth-wise convolution of channels-last volumes ``(B, X, Y, Z, C)`` with an odd kernel, zeros outside."""
    if features_BXYZC.device.type == "cpu":
        out: Tensor = _DepthwiseConvolution.apply(features_BXYZC, weight_C1kkk)  # type: ignore[no-untyped-call]
    else:
        out = _convolve(features_BXYZC, weight_C1kkk)
    return out + bias_C.to(out.dtype)
