"""Depth-wise convolution with a backward pass made of forward convolutions.

The library's CPU kernels for the gradients of a depth-wise convolution take twenty times as long as its forward pass.
Both gradients are forward convolutions themselves, exactly:

- of the input: the output's gradient convolved with the flipped kernel;
- of the weight: the padded input convolved with the output's gradient as the kernel, one group per sample and channel.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# Shape suffixes: N samples, C channels, X Y Z space, k kernel edge.


class _DepthwiseConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features_NCXYZ: Tensor, weight_C1kkk: Tensor) -> Tensor:
        ctx.save_for_backward(features_NCXYZ, weight_C1kkk)
        return _convolve(features_NCXYZ, weight_C1kkk)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        features_NCXYZ, weight_C1kkk = ctx.saved_tensors
        grad_NCXYZ = grads[0].to(features_NCXYZ.dtype)
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_features = _convolve(grad_NCXYZ, weight_C1kkk.flip(2, 3, 4))
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(features_NCXYZ, grad_NCXYZ, weight_C1kkk)
        return grad_features, grad_weight


def _convolve(features_NCXYZ: Tensor, weight_C1kkk: Tensor) -> Tensor:
    return F.conv3d(features_NCXYZ, weight_C1kkk, padding=weight_C1kkk.shape[-1] // 2, groups=len(weight_C1kkk))


def _weight_gradient(features_NCXYZ: Tensor, grad_NCXYZ: Tensor, weight_C1kkk: Tensor) -> Tensor:
    groups = features_NCXYZ.shape[0] * features_NCXYZ.shape[1]
    padded = F.pad(features_NCXYZ, (weight_C1kkk.shape[-1] // 2,) * 6)
    kernels = grad_NCXYZ.reshape(groups, 1, *grad_NCXYZ.shape[2:])
    per_sample = F.conv3d(padded.reshape(1, groups, *padded.shape[2:]), kernels, groups=groups)
    per_sample = per_sample.reshape(features_NCXYZ.shape[0], *weight_C1kkk.shape)
    return per_sample.sum(0, dtype=torch.promote_types(weight_C1kkk.dtype, torch.float32)).to(weight_C1kkk.dtype)


def depthwise_dense(features_NXYZC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor) -> Tensor:
    """Depth-wise convolution of channels-last volumes ``(N, X, Y, Z, C)`` with an odd kernel, zeros outside."""
    features_NCXYZ = features_NXYZC.permute(0, 4, 1, 2, 3)
    weight_C1kkk = weight_C1kkk.to(features_NCXYZ.dtype)
    if features_NCXYZ.device.type == "cpu":
        out_NCXYZ: Tensor = _DepthwiseConvolution.apply(features_NCXYZ, weight_C1kkk)  # type: ignore[no-untyped-call]
    else:
        out_NCXYZ = _convolve(features_NCXYZ, weight_C1kkk)
    return out_NCXYZ.permute(0, 2, 3, 4, 1) + bias_C.to(out_NCXYZ.dtype)
