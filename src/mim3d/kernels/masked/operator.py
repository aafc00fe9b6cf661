"""Depth-wise convolution on blocks of visible tokens: hidden neighbours count as zeros and cost nothing.

A convolution of edge k reaches k // 2 voxels into the blocks around. They are found through a table of neighbours, so
that the work is that of visible tokens alone. Registered as operators of the library: differentiable, known to
``torch.compile`` and to dry runs on fake tensors, with one implementation per kind of device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from mim3d.kernels.machine import triton_available
from mim3d.kernels.masked import cpp, pytorch

# Shape suffixes: N blocks of edge s, C channels, k kernel edge.

Kernel = Literal["cpp", "triton", "torch"]

#: What the Triton source is compiled for.
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_forced: list[Kernel] = []


@torch.library.custom_op("mim3d::masked_depthwise", mutates_args=())
def masked_depthwise(features_NsssC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor, neighbours_N27: Tensor) -> Tensor:
    """Convolve blocks ``(N, s, s, s, C)`` with an odd kernel of edge ``k <= 2 s + 1``.

    Args:
        features_NsssC: One block per visible token.
        weight_C1kkk: The kernel, applied in the features' precision.
        bias_C: Added to the result.
        neighbours_N27: Block at each offset in {-1, 0, 1}^3 from each block, in raster order; -1 where there is none.
    """
    implementation = _implementation(features_NsssC, weight_C1kkk.shape[-1])
    out_NsssC: Tensor = implementation.convolve(features_NsssC.contiguous(), weight_C1kkk, bias_C, neighbours_N27)
    return out_NsssC


@torch.library.custom_op("mim3d::masked_depthwise_backward", mutates_args=())
def masked_depthwise_backward(
    grad_NsssC: Tensor, features_NsssC: Tensor, weight_C1kkk: Tensor, neighbours_N27: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the features and of the kernel.

    That of the features is the convolution with the flipped kernel: being neighbours is mutual.
    """
    features_NsssC, grad_NsssC = features_NsssC.contiguous(), grad_NsssC.contiguous()
    kernel_size = weight_C1kkk.shape[-1]
    implementation = _implementation(features_NsssC, kernel_size)
    grad_features = implementation.convolve(grad_NsssC, weight_C1kkk.flip(2, 3, 4), None, neighbours_N27)
    grad_weight = implementation.weight_gradient(features_NsssC, grad_NsssC, neighbours_N27, kernel_size)
    return grad_features, grad_weight.to(weight_C1kkk.dtype).contiguous()


@masked_depthwise.register_fake
def _(features_NsssC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor, neighbours_N27: Tensor) -> Tensor:
    return features_NsssC.new_empty(features_NsssC.shape)


@masked_depthwise_backward.register_fake
def _(
    grad_NsssC: Tensor, features_NsssC: Tensor, weight_C1kkk: Tensor, neighbours_N27: Tensor
) -> tuple[Tensor, Tensor]:
    return features_NsssC.new_empty(features_NsssC.shape), weight_C1kkk.new_empty(weight_C1kkk.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    features_NsssC, weight_C1kkk, _, neighbours_N27 = inputs
    ctx.save_for_backward(features_NsssC, weight_C1kkk, neighbours_N27)


def _backward(ctx: Any, grad_NsssC: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    features_NsssC, weight_C1kkk, neighbours_N27 = ctx.saved_tensors
    grad_NsssC = grad_NsssC.to(features_NsssC.dtype)
    grad_features, grad_weight = masked_depthwise_backward(grad_NsssC, features_NsssC, weight_C1kkk, neighbours_N27)
    grad_bias = grad_NsssC.sum((0, 1, 2, 3), dtype=torch.promote_types(grad_NsssC.dtype, torch.float32))
    return grad_features, grad_weight, grad_bias.to(weight_C1kkk.dtype), None


masked_depthwise.register_autograd(_backward, setup_context=_save)


def kernel_for(features_NsssC: Tensor, kernel_size: int) -> Kernel:
    """Which implementation these features are convolved by."""
    if _forced:
        return _forced[-1]
    if cpp.supports(features_NsssC, kernel_size):
        return "cpp"
    edge = features_NsssC.shape[1]
    on_gpu = features_NsssC.is_cuda and features_NsssC.dtype in TRITON_DTYPES
    return "triton" if on_gpu and edge & (edge - 1) == 0 and triton_available() else "torch"


@contextmanager
def kernel_forced(kernel: Kernel) -> Iterator[None]:
    """Use one implementation inside, wherever it can run: for comparing them."""
    _forced.append(kernel)
    try:
        yield
    finally:
        _forced.pop()


def _implementation(features_NsssC: Tensor, kernel_size: int) -> ModuleType:
    kernel = kernel_for(features_NsssC, kernel_size)
    if kernel == "triton":
        # Imported here: it takes a second, and the package is an extra.
        from mim3d.kernels.masked import triton

        return triton
    return cpp if kernel == "cpp" else pytorch
