"""The masked depth-wise convolution: every implementation against a dense convolution, gradients included."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.backbones.layouts import block_neighbours, flat_tokens
from mim3d.core.types import Triple
from mim3d.kernels.masked import cpp as masked_cpp
from mim3d.kernels.masked.operator import kernel_for, kernel_forced, masked_depthwise
from mim3d.nn.volumes import from_blocks, to_blocks

needs_compiler = pytest.mark.skipif(masked_cpp.library() is None, reason="no C++ compiler")
KERNELS = ["torch", pytest.param("cpp", marks=needs_compiler)]


def visible_tokens(batch: int, grid: Triple, num_visible: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(batch, math.prod(grid), generator=generator).argsort(1)
    return order[:, :num_visible].sort(1).values


def random_parts(num_blocks: int, edge: int, channels: int, dtype: torch.dtype, kernel_size: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_blocks, *(edge,) * 3, channels), (channels, 1, *(kernel_size,) * 3), (channels,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def dense_convolution(blocks: Tensor, weight: Tensor, bias: Tensor, visible: Tensor, grid: Triple) -> Tensor:
    """Blocks in a volume of zeros, the library's convolution, blocks again."""
    flat = flat_tokens(visible, math.prod(grid))
    canvas = blocks.new_zeros(len(visible) * math.prod(grid), *blocks.shape[1:]).index_copy(0, flat, blocks)
    volume = from_blocks(canvas.reshape(len(visible), -1, *blocks.shape[1:]), grid).permute(0, 4, 1, 2, 3)
    out = F.conv3d(volume, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))
    return to_blocks(out, (blocks.shape[1],) * 3).flatten(0, 1)[flat]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("grid", "num_visible", "edge", "channels"),
    [
        ((3, 3, 3), 13, 8, 16),
        ((2, 3, 4), 10, 4, 20),
        ((4, 2, 3), 24, 2, 70),
        ((3, 2, 2), 1, 8, 5),
        ((5, 4, 3), 3, 2, 64),
    ],
)
def test_convolution_and_gradients_equal_the_dense_ones(
    kernel: str, grid: Triple, num_visible: int, edge: int, channels: int
) -> None:
    visible = visible_tokens(2, grid, num_visible)
    exact = random_parts(visible.numel(), edge, channels, torch.float64)
    direction = torch.randn(exact[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inputs = [part.requires_grad_() for part in exact]
    expected = dense_convolution(*inputs, visible, grid)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    parts = [part.detach().float().requires_grad_() for part in exact]
    with kernel_forced(kernel):
        out = masked_depthwise(*parts, block_neighbours(visible, grid))
        grads = torch.autograd.grad((out * direction.float()).sum(), parts)
    for ours, reference in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-6 * float(reference.detach().abs().max()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_differs_by_rounding_and_weights_get_gradients_in_their_own_precision(kernel: str) -> None:
    grid: Triple = (3, 3, 2)
    visible = visible_tokens(1, grid, 9)
    features, weight, bias = random_parts(9, 4, 24, torch.float32)
    neighbours = block_neighbours(visible, grid)
    narrow = features.bfloat16()
    with kernel_forced("torch"):
        expected = masked_depthwise(narrow.float(), weight.bfloat16().float(), bias, neighbours)
    weight.requires_grad_()
    with kernel_forced(kernel):
        out = masked_depthwise(narrow, weight, bias, neighbours)
    out.float().square().sum().backward()
    assert out.dtype == torch.bfloat16
    assert weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_custom_gradients_pass_the_finite_difference_check() -> None:
    grid: Triple = (2, 2, 2)
    visible = visible_tokens(1, grid, 5)
    parts = [part.requires_grad_() for part in random_parts(5, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(masked_depthwise, (*parts, block_neighbours(visible, grid)))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_operator_keeps_the_librarys_contract(kernel: str) -> None:
    """Fake tensors, compilation and autograd see what really happens, also for features that are not contiguous."""
    visible = visible_tokens(1, (2, 2, 2), 4)
    features, weight, bias = random_parts(4, 4, 6, torch.float32)
    neighbours = block_neighbours(visible, (2, 2, 2))
    strided = features.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    with kernel_forced(kernel):
        for blocks in (features, strided):
            arguments = (blocks.detach().requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), neighbours)
            torch.library.opcheck(masked_depthwise, arguments)


def test_another_kernel_edge_runs_in_pytorch() -> None:
    grid: Triple = (2, 3, 2)
    visible = visible_tokens(1, grid, 6)
    parts = random_parts(6, 4, 8, torch.float32, kernel_size=3)
    assert kernel_for(parts[0], 3) == "torch"
    out = masked_depthwise(*parts, block_neighbours(visible, grid))
    torch.testing.assert_close(out, dense_convolution(*parts, visible, grid), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_the_cpp_kernel_gives_the_same_bits_again_and_under_several_threads() -> None:
    visible = visible_tokens(2, (3, 3, 3), 14)
    features, weight, bias = random_parts(28, 4, 32, torch.float32)
    neighbours = block_neighbours(visible, (3, 3, 3))
    num_threads = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 1, 3):
            torch.set_num_threads(threads)
            out = masked_cpp.convolve(features, weight, bias, neighbours)
            results.append((out, masked_cpp.weight_gradient(features, out, neighbours, 5)))
    finally:
        torch.set_num_threads(num_threads)
    (first, first_grad), (again, again_grad), (shared, shared_grad) = results
    assert torch.equal(first, again)
    assert torch.equal(first_grad, again_grad)
    assert torch.equal(first, shared)
    torch.testing.assert_close(first_grad, shared_grad, rtol=1e-5, atol=1e-3)


def test_neighbours_are_found_across_a_grid_and_never_across_samples() -> None:
    visible = torch.tensor([[0, 1, 5], [1, 4, 5]])  # of 1 x 2 x 3 tokens
    neighbours = block_neighbours(visible, (1, 2, 3))
    itself, after, below = 13, 14, 16  # offsets (0, 0, 0), (0, 0, 1), (0, 1, 0)
    assert neighbours[:, itself].tolist() == [0, 1, 2, 3, 4, 5]
    assert neighbours[:, after].tolist() == [1, -1, -1, -1, 5, -1]
    assert neighbours[:, below].tolist() == [-1, -1, -1, 4, -1, -1]
    assert (neighbours[:, :9] == -1).all()
