"""The second half of a convolution block, ``x + W2 gelu(W1 LN(x) + b1) + b2``, a few voxels at a time.

Its hidden layer is the widest tensor of the network, four times the features. Written out, it is stored, read and
stored again by every operation, which costs more time than the matrix products, and kept for the backward pass. Here
rows are taken through all of it while they lie in the processor's cache, and the backward pass computes the hidden
layer again: nothing but the features is kept. The result is the same up to rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.kernels.machine import chunk_length

# Shape suffixes: R rows (voxels of all blocks), C channels, H hidden channels; r rows of one chunk.


def residual_mlp(
    features: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_HC: Tensor,
    bias_H: Tensor,
    out_weight_CH: Tensor,
    out_bias_C: Tensor,
    eps: float,
) -> Tensor:
    """Features ``(..., C)`` plus their MLP, in their own precision; products in that of autocast, where it is on."""
    device = features.device.type
    narrow = torch.is_autocast_enabled(device)
    products = torch.get_autocast_dtype(device) if narrow else features.dtype
    parameters = (norm_weight_C, norm_bias_C, weight_HC, bias_H, out_weight_CH, out_bias_C)
    out_RC: Tensor = _residual_mlp(features.reshape(-1, features.shape[-1]), *parameters, eps, products)
    return out_RC.reshape(features.shape)


@torch.library.custom_op("mim3d::residual_mlp", mutates_args=())
def _residual_mlp(
    features_RC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_HC: Tensor,
    bias_H: Tensor,
    out_weight_CH: Tensor,
    out_bias_C: Tensor,
    eps: float,
    products: torch.dtype,
) -> Tensor:
    norm_weight, norm_bias = norm_weight_C.to(features_RC.dtype), norm_bias_C.to(features_RC.dtype)
    weight, bias, out_weight, out_bias = (p.to(products) for p in (weight_HC, bias_H, out_weight_CH, out_bias_C))
    out_RC = features_RC.new_empty(features_RC.shape)
    for rows in _chunks(features_RC, len(weight), products):
        features_rC = features_RC[rows]
        normed_rC = F.layer_norm(features_rC, norm_weight.shape, norm_weight, norm_bias, eps).to(products)
        hidden_rH = F.gelu(F.linear(normed_rC, weight, bias))
        torch.add(features_rC, F.linear(hidden_rH, out_weight, out_bias), out=out_RC[rows])
    return out_RC


@torch.library.custom_op("mim3d::residual_mlp_backward", mutates_args=())
def _residual_mlp_backward(
    grad_RC: Tensor,
    features_RC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_HC: Tensor,
    bias_H: Tensor,
    out_weight_CH: Tensor,
    eps: float,
    products: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the features and of the six parameters, the latter summed in float32 or better."""
    norm_weight, norm_bias = norm_weight_C.to(features_RC.dtype), norm_bias_C.to(features_RC.dtype)
    weight, bias, out_weight = (p.to(products) for p in (weight_HC, bias_H, out_weight_CH))
    shape = list(norm_weight.shape)
    grad_features_RC = features_RC.new_empty(features_RC.shape)
    wide = torch.promote_types(products, torch.float32)
    shapes = (norm_weight_C, norm_bias_C, weight_HC, bias_H, out_weight_CH, norm_bias_C)
    sums = [torch.zeros_like(parameter, dtype=wide) for parameter in shapes]
    for rows in _chunks(features_RC, len(weight), products):
        grad_rC, features_rC = grad_RC[rows], features_RC[rows]
        narrow_rC = grad_rC.to(products)
        normed_rC, mean, rstd = torch.native_layer_norm(features_rC, shape, norm_weight, norm_bias, eps)
        normed_rC = normed_rC.to(products)
        hidden_rH = F.linear(normed_rC, weight, bias)
        grad_hidden_rH = torch.ops.aten.gelu_backward(narrow_rC @ out_weight, hidden_rH)
        grad_normed_rC = (grad_hidden_rH @ weight).to(features_rC.dtype)
        through_norm = torch.ops.aten.native_layer_norm_backward(
            grad_normed_rC, features_rC, shape, mean, rstd, norm_weight, norm_bias, [True, True, True]
        )
        torch.add(grad_rC, through_norm[0], out=grad_features_RC[rows])
        parts = (
            through_norm[1],
            through_norm[2],
            grad_hidden_rH.t() @ normed_rC,
            grad_hidden_rH.sum(0, dtype=wide),
            narrow_rC.t() @ F.gelu(hidden_rH),
            grad_rC.sum(0, dtype=wide),
        )
        for total, part in zip(sums, parts, strict=True):
            total += part
    norm_weight_sum, norm_bias_sum, weight_sum, bias_sum, out_weight_sum, out_bias_sum = (
        total.to(parameter.dtype) for total, parameter in zip(sums, shapes, strict=True)
    )
    return grad_features_RC, norm_weight_sum, norm_bias_sum, weight_sum, bias_sum, out_weight_sum, out_bias_sum


@_residual_mlp.register_fake
def _(features_RC: Tensor, *_: Any) -> Tensor:
    return features_RC.new_empty(features_RC.shape)


@_residual_mlp_backward.register_fake
def _(
    grad_RC: Tensor,
    features_RC: Tensor,
    norm_weight_C: Tensor,
    norm_bias_C: Tensor,
    weight_HC: Tensor,
    bias_H: Tensor,
    out_weight_CH: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:
    like = (features_RC, norm_weight_C, norm_bias_C, weight_HC, bias_H, out_weight_CH, norm_bias_C)
    return tuple(tensor.new_empty(tensor.shape) for tensor in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _, eps, products = inputs
    ctx.save_for_backward(*tensors)
    ctx.eps, ctx.products = eps, products


def _backward(ctx: Any, grad_RC: Tensor) -> tuple[Tensor | None, ...]:
    grads = _residual_mlp_backward(grad_RC.contiguous(), *ctx.saved_tensors, ctx.eps, ctx.products)
    return *grads, None, None


_residual_mlp.register_autograd(_backward, setup_context=_save)


def _chunks(features_RC: Tensor, hidden_dim: int, products: torch.dtype) -> list[slice]:
    size = chunk_length(features_RC.device, hidden_dim * products.itemsize)
    return [slice(start, start + size) for start in range(0, len(features_RC), size)]
