"""Softmax attention with a learned bias on its scores, on a CPU, without keeping the scores.

The library's fused kernel takes a bias, but on a CPU not one that learns: there it writes all scores out and keeps them
for the backward pass. Here the forward pass is the fused kernel's, and the backward pass computes the scores of a few
sequences again while they lie in the processor's cache. The result is the same up to rounding.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.kernels.machine import chunk_length

#: Heads of fewer channels are narrow: the library's matrix product has no good kernel for as few columns.
_NARROW_HEAD = 16

# Shape suffixes: N sequences, n sequences of one chunk, H heads, Q queries, K keys, d channels of a head.


def biased_attention(query_NHQd: Tensor, key_NHKd: Tensor, value_NHKd: Tensor, bias_HQK: Tensor) -> Tensor:
    """Attention ``(N, H, Q, d)`` by softmax of ``query . key / sqrt(d) + bias``.

    Args:
        query_NHQd: Queries.
        key_NHKd: Keys.
        value_NHKd: Values.
        bias_HQK: What is added to the scores of every sequence.
    """
    bias_HQK = bias_HQK.to(query_NHQd.dtype)
    learns = torch.is_grad_enabled() and bias_HQK.requires_grad
    if learns and query_NHQd.device.type == "cpu":
        attended: Tensor = _biased_attention(query_NHQd, key_NHKd, value_NHKd, bias_HQK)
        return attended
    return F.scaled_dot_product_attention(query_NHQd, key_NHKd, value_NHKd, bias_HQK[None])


@torch.library.custom_op("mim3d::biased_attention", mutates_args=())
def _biased_attention(query_NHQd: Tensor, key_NHKd: Tensor, value_NHKd: Tensor, bias_HQK: Tensor) -> Tensor:
    # Detached, since the fused kernel passes a bias that asks for a gradient on to the slower one.
    query, key, value, bias = (tensor.detach() for tensor in (query_NHQd, key_NHKd, value_NHKd, bias_HQK))
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query, key, value, bias[None]).contiguous()


@torch.library.custom_op("mim3d::biased_attention_backward", mutates_args=())
def _biased_attention_backward(
    grad_NHQd: Tensor,
    attended_NHQd: Tensor,
    query_NHQd: Tensor,
    key_NHKd: Tensor,
    value_NHKd: Tensor,
    bias_HQK: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values and bias, computed in float32 or better."""
    wide = torch.promote_types(query_NHQd.dtype, torch.float32)
    scale = query_NHQd.shape[-1] ** -0.5
    # New and contiguous, whatever the layout of what they belong to, so that parts of them are views.
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query_NHQd, key_NHKd, value_NHKd))
    bias_HQK = bias_HQK.to(wide)
    grad_bias = torch.zeros_like(bias_HQK)
    # The gradient of a softmax is its output times what comes in, less the mean of that under the softmax.
    mean_NHQ1 = (grad_NHQd.to(wide) * attended_NHQd).sum(-1, keepdim=True)
    size = chunk_length(query_NHQd.device, bias_HQK.numel() * bias_HQK.itemsize)
    for rows in (slice(start, start + size) for start in range(0, len(query_NHQd), size)):
        grad, query, key, value, mean = (
            tensor[rows].flatten(0, 1).to(wide) for tensor in (grad_NHQd, query_NHQd, key_NHKd, value_NHKd, mean_NHQ1)
        )
        to_query, to_key, to_value = (tensor[rows].flatten(0, 1) for tensor in (grad_query, grad_key, grad_value))
        bias = bias_HQK.expand(len(query) // len(bias_HQK), -1, -1, -1).flatten(0, 1)
        # Autocast would narrow some of these operations, and leave others.
        with torch.autocast("cpu", enabled=False):
            weights = torch.baddbmm(bias, query, key.mT, alpha=scale).softmax(-1)
            to_value.copy_(_product(weights.mT, grad))
            weights *= torch.bmm(grad, value.mT).sub_(mean)
            to_query.copy_(_product(weights, key).mul_(scale))
            to_key.copy_(_product(weights.mT, query).mul_(scale))
        grad_bias += weights.reshape(-1, *bias_HQK.shape).sum(0)
    return grad_query, grad_key, grad_value, grad_bias.to(query_NHQd.dtype)


def _product(weights: Tensor, narrow: Tensor) -> Tensor:
    """``weights @ narrow``; as the transpose of a product where heads are so narrow that this takes a third of it."""
    if narrow.shape[-1] >= _NARROW_HEAD:
        return torch.bmm(weights, narrow)
    return torch.bmm(narrow.mT, weights.mT).mT


@_biased_attention.register_fake
def _(query_NHQd: Tensor, *_: Tensor) -> Tensor:
    return query_NHQd.new_empty(query_NHQd.shape)


@_biased_attention_backward.register_fake
def _(_grad: Tensor, _attended: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(output, *inputs)


def _backward(ctx: Any, grad_NHQd: Tensor) -> tuple[Tensor, ...]:
    grads: tuple[Tensor, ...] = _biased_attention_backward(grad_NHQd.contiguous(), *ctx.saved_tensors)
    return grads


_biased_attention.register_autograd(_backward, setup_context=_save)
