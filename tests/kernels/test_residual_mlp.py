"""The chunked MLP of a convolution block equals the layers written out, gradients included."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.kernels import machine
from mim3d.kernels import residual_mlp as module
from mim3d.kernels.residual_mlp import residual_mlp

EPS = 1e-5


def parts(rows: tuple[int, ...], channels: int, hidden: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (*rows, channels),
        (channels,),
        (channels,),
        (hidden, channels),
        (hidden,),
        (channels, hidden),
        (channels,),
    ]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [part.requires_grad_() for part in drawn]


def written_out(features: Tensor, *parameters: Tensor) -> Tensor:
    norm_weight, norm_bias, weight, bias, out_weight, out_bias = parameters
    normed = F.layer_norm(features, norm_weight.shape, norm_weight, norm_bias, EPS)
    return features + F.linear(F.gelu(F.linear(normed, weight, bias)), out_weight, out_bias)


@pytest.fixture(params=[1, 3, 1000])
def rows_at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of one row, chunks that leave a rest, and all rows at once."""
    monkeypatch.setitem(machine.CHUNK_BYTES, "cpu", request.param * 8 * 8)
    return int(request.param)


def test_result_and_gradients_equal_the_layers_written_out(rows_at_a_time: int) -> None:
    inputs = parts((2, 2, 1, 2), 4, 8, torch.float64)
    ours, expected = residual_mlp(*inputs, EPS), written_out(*inputs)
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad((ours * direction).sum(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * direction).sum(), inputs))


def test_gradients_pass_the_finite_difference_check() -> None:
    inputs = parts((3,), 2, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *given: residual_mlp(*given, EPS), inputs)


def test_the_operators_keep_the_librarys_contract() -> None:
    inputs = parts((5,), 4, 8, torch.float32)
    torch.library.opcheck(module._residual_mlp, (*inputs, EPS, torch.float32))


@pytest.mark.parametrize("features_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_narrow_and_parameters_get_float32_gradients(features_dtype: torch.dtype) -> None:
    inputs = parts((40,), 16, 64, torch.float32)
    features = inputs[0].detach().to(features_dtype)
    expected = written_out(features.float(), *inputs[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = residual_mlp(features, *inputs[1:], EPS)
    out.float().square().sum().backward()
    assert out.dtype == features_dtype
    assert all(parameter.grad.dtype == torch.float32 for parameter in inputs[1:])
    error = (out.float() - expected).detach().abs().max() / expected.detach().abs().max()
    assert 0 < float(error) < 0.02
