"""The dense depth-wise convolution: its tiled gradients are those of the library."""

import pytest
import torch
from torch.nn import functional as F

from mim3d.kernels.depthwise import depthwise_dense


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (2, 5, 11, 16), (1, 24, 3, 9), (3, 2, 2, 2), (2, 7, 6, 5)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_result_and_gradients_equal_the_librarys(shape: tuple[int, ...], kernel_size: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 1, *(kernel_size,) * 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inputs = (features, weight, bias)
    reference = F.conv3d(features.permute(0, 4, 1, 2, 3), weight, bias, padding=kernel_size // 2, groups=6)
    reference = reference.permute(0, 2, 3, 4, 1)
    direction = torch.randn_like(reference)
    ours = depthwise_dense(*inputs)
    torch.testing.assert_close(ours, reference)
    expected = torch.autograd.grad((reference * direction).sum(), inputs)
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), inputs), expected)


@pytest.mark.parametrize(("shape", "kernel_size"), [((1, 3, 4, 9), 3), ((2, 4, 3, 5), 5)])
def test_gradients_pass_the_finite_difference_check(shape: tuple[int, ...], kernel_size: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(*shape, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, *(kernel_size,) * 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(depthwise_dense, (features, weight, bias))
