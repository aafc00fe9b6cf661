"""The device's kernel of the masked convolution, and PyTorch's path, against PyTorch in float64."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from mim3d.backbones import create_model
from mim3d.backbones.layouts import block_neighbours
from mim3d.kernels.masked.operator import Kernel, kernel_for, kernel_forced, masked_depthwise
from yardstick.machine import Row, best_seconds


def kernel_errors(size: str, batch_size: int, num_times: int, device: torch.device) -> Iterator[Row]:
    """Compare at the shapes of a hybrid encoder's stages.

    The error is the largest, of the result and of the gradients, each over the largest value of what it is an error of.

    Args:
        size: Size of the encoder.
        batch_size: Number of volumes of 6^3 tokens, of which half are visible.
        num_times: Number of passes, forward and backward, of which the best counts.
        device: Where they run.
    """
    encoder = create_model(f"hybrid_{size}")
    edges = [encoder.token_size[0] // stride for stride in encoder.strides]
    stages = [(edge, width) for edge, width in zip(edges, encoder.widths, strict=True) if edge > 1]
    # float32 loses digits in the sums of the weight's gradient, over some hundred thousand voxels.
    limits = {torch.float32: 1e-4, torch.bfloat16: torch.finfo(torch.bfloat16).eps}
    visible_BV = torch.rand(batch_size, 216, device=device).argsort(1)[:, :108].sort(1).values
    around = block_neighbours(visible_BV, (6, 6, 6))
    for (edge, width), dtype in itertools.product(stages, limits):
        block = (len(around), *(edge,) * 3, width)
        inputs = [torch.randn(shape, device=device).to(dtype) for shape in (block, (width, 1, 5, 5, 5), (width,))]
        grad = torch.randn(block, device=device).to(dtype)
        kernel = kernel_for(inputs[0], 5)
        expected = _convolved("torch", [one.double() for one in inputs], around, grad.double())
        row: Row = {"edge": edge, "channels": width, "dtype": str(dtype), "kernel": kernel}
        errors: dict[Kernel, float] = {}
        for name in (kernel, "torch"):
            found = _convolved(name, inputs, around, grad)
            pairs = zip(found, expected, strict=True)
            errors[name] = max(((ours - exact).abs().max() / exact.abs().max()).item() for ours, exact in pairs)
            work = partial(_convolved, name, inputs, around, grad)
            row |= {f"{name}_error": float(f"{errors[name]:.1e}")}
            row |= {f"{name}_ms": round(1e3 * best_seconds(work, device, num_times), 3)}
        yield row | {"agrees": errors[kernel] <= limits[dtype] and (device.type == "cpu" or kernel == "triton")}


def _convolved(kernel: Kernel, inputs: list[Tensor], around: Tensor, grad: Tensor) -> list[Tensor]:
    features, weight, bias = (one.detach().requires_grad_() for one in inputs)
    with kernel_forced(kernel):
        out = masked_depthwise(features, weight, bias, around)
        return [out.detach(), *torch.autograd.grad(out, (features, weight, bias), grad)]
