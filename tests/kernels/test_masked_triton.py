"""The Triton kernels against a dense float64 convolution: interpreted here, as they are where there is a GPU."""

import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.kernels import machine
from mim3d.kernels.masked import triton as masked_triton

pytest.importorskip("triton")


@contextmanager
def triton_replaced_by(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Other modules in the place of Triton's, which come back afterwards; ``modules`` gets what is loaded inside."""
    before = take_out_triton()
    sys.modules.update(modules)
    try:
        yield
    finally:
        modules.update(take_out_triton())
        sys.modules.update(before)


def take_out_triton() -> dict[str, ModuleType]:
    # Its compiled part can be loaded only once, and serves both.
    names = [name for name in sys.modules if name.split(".")[0] == "triton" and not name.startswith("triton._C")]
    return {name: sys.modules.pop(name) for name in names}


@pytest.fixture(scope="module")
def second_copies() -> tuple[ModuleType, dict[str, ModuleType]]:
    """The module and all of Triton, loaded once more for the interpreter.

    Whether a function is compiled or interpreted is settled when it is decorated, and Triton decorates functions of
    its own when it is imported. The copies that everything else uses stay as they are.
    """
    modules: dict[str, ModuleType] = {}
    spec = importlib.util.spec_from_file_location("interpreted_depthwise", masked_triton.__file__ or "")
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch, triton_replaced_by(modules):
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(copy)
    return copy, modules


@pytest.fixture
def interpreted(
    second_copies: tuple[ModuleType, dict[str, ModuleType]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The module with kernels that run in Triton's interpreter."""
    copy, modules = second_copies
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with triton_replaced_by(modules):
        yield copy


class Case(NamedTuple):
    """A batch of volumes of which some tokens are visible."""

    visible_BXYZ: Tensor
    edge: int
    channels: int
    kernel_size: int = 5


def some_visible(batch: int, grid: tuple[int, int, int], num_visible: int) -> Tensor:
    """The same number of visible tokens in every sample, drawn at random."""
    order = torch.rand(batch, math.prod(grid), generator=torch.Generator().manual_seed(0)).argsort(1)
    return (order < num_visible).reshape(batch, *grid)


def only(token: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    visible_BXYZ = torch.zeros(1, *grid, dtype=torch.bool)
    visible_BXYZ[0][token] = True
    return visible_BXYZ


def neighbours(visible_BXYZ: Tensor) -> Tensor:
    """The table ``(N, 27)`` written out token by token, without the source's own."""
    places = [tuple(place) for place in visible_BXYZ.nonzero().tolist()]
    number = {place: n for n, place in enumerate(places)}
    offsets = [(dx, dy, dz) for dx in (-1, 0, 1) for dy in (-1, 0, 1) for dz in (-1, 0, 1)]
    rows = [[number.get((b, x + dx, y + dy, z + dz), -1) for dx, dy, dz in offsets] for b, x, y, z in places]
    return torch.tensor(rows)


def dense(features_NsssC: Tensor, weight_C1kkk: Tensor, visible_BXYZ: Tensor) -> Tensor:
    """Blocks put into volumes of zeros, convolved as a whole, and taken out again."""
    (batch, gx, gy, gz), (_, s, _, _, channels) = visible_BXYZ.shape, features_NsssC.shape
    blocks = features_NsssC.new_zeros(batch, gx, gy, gz, s, s, s, channels)
    blocks = blocks.index_put(visible_BXYZ.nonzero(as_tuple=True), features_NsssC)
    volume = blocks.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(batch, channels, gx * s, gy * s, gz * s)
    convolved = F.conv3d(volume, weight_C1kkk, padding=weight_C1kkk.shape[-1] // 2, groups=channels)
    parts = convolved.reshape(batch, channels, gx, s, gy, s, gz, s).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return parts[visible_BXYZ]


class Tensors(NamedTuple):
    features_NsssC: Tensor
    weight_C1kkk: Tensor
    neighbours_N27: Tensor
    grad_NsssC: Tensor


def draw(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensors:
    around = neighbours(case.visible_BXYZ)
    generator = torch.Generator().manual_seed(1)
    shape = (len(around), *(case.edge,) * 3, case.channels)
    features, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight = torch.randn(case.channels, 1, *(case.kernel_size,) * 3, generator=generator).to(device, dtype)
    return Tensors(features, weight, around.to(device), grad)


def compare(module: ModuleType, case: Case, drawn: Tensors, units: float = 1.0) -> None:
    """Result and both gradients, rounded by up to so many units in the features' last place."""
    features, weight = drawn.features_NsssC.double().requires_grad_(), drawn.weight_C1kkk.double().requires_grad_()
    expected = dense(features, weight, case.visible_BXYZ.to(features.device))
    expected_features, expected_weight = torch.autograd.grad(expected, (features, weight), drawn.grad_NsssC.double())

    flipped = drawn.weight_C1kkk.flip(2, 3, 4)
    out = module.convolve(drawn.features_NsssC, drawn.weight_C1kkk, None, drawn.neighbours_N27)
    grad_features = module.convolve(drawn.grad_NsssC, flipped, None, drawn.neighbours_N27)
    grad_weight = module.weight_gradient(drawn.features_NsssC, drawn.grad_NsssC, drawn.neighbours_N27, weight.shape[-1])
    assert out.dtype == grad_features.dtype == drawn.features_NsssC.dtype
    assert grad_weight.dtype == torch.float32
    # What float32 loses in a sum grows with the root of its length.
    rounded = 0.0 if out.dtype == torch.float32 else units * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=rounded, atol=3e-5)
    torch.testing.assert_close(grad_features.double(), expected_features, rtol=rounded, atol=3e-5)
    summed = 3e-6 * math.sqrt(drawn.features_NsssC[..., 0].numel())
    torch.testing.assert_close(grad_weight.double(), expected_weight, rtol=0, atol=summed)


CASES = {
    "two samples, channels of two tiles": Case(some_visible(2, (2, 3, 2), 5), edge=2, channels=48),
    "channels of a tile and a part": Case(some_visible(2, (3, 2, 1), 3), edge=4, channels=20),
    "channels of a part of a tile": Case(some_visible(1, (1, 3, 2), 3), edge=8, channels=6),
    "a column along each axis": Case(some_visible(1, (2, 3, 4), 11), edge=2, channels=32),
    "a smaller kernel": Case(some_visible(1, (3, 2, 2), 7), edge=2, channels=6, kernel_size=3),
    "all visible": Case(torch.ones(1, 3, 3, 2, dtype=torch.bool), edge=2, channels=6),
    "one token of many": Case(only((1, 0, 2), (2, 3, 3)), edge=4, channels=6),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_result_and_its_gradients_are_those_of_the_dense_convolution(interpreted: ModuleType, case: Case) -> None:
    compare(interpreted, case, draw(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once_at_the_end(interpreted: ModuleType, dtype: torch.dtype) -> None:
    case = Case(some_visible(1, (2, 2, 2), 3), edge=2, channels=20)
    # A whole unit: the interpreter cuts off the digits that a GPU rounds to the nearest.
    compare(interpreted, case, draw(case, dtype))


def test_a_kernel_in_float32_is_not_rounded_to_the_features(interpreted: ModuleType) -> None:
    case = Case(some_visible(1, (2, 2, 2), 3), edge=2, channels=6)
    compare(interpreted, case, draw(case, torch.bfloat16)._replace(weight_C1kkk=draw(case).weight_C1kkk))


def test_a_bias_is_added_and_neighbours_may_be_int32(interpreted: ModuleType) -> None:
    features, weight, around, _ = draw(Case(some_visible(1, (2, 2, 2), 3), edge=2, channels=20))
    bias = torch.arange(20.0)
    added = interpreted.convolve(features, weight, bias, around.int())
    torch.testing.assert_close(added, interpreted.convolve(features, weight, None, around) + bias)


@pytest.mark.parametrize(("edge", "kernel_size"), [(6, 5), (4, 4), (2, 7)])
def test_blocks_and_kernels_that_do_not_fit_are_refused(interpreted: ModuleType, edge: int, kernel_size: int) -> None:
    features, around = torch.zeros(1, *(edge,) * 3, 4), torch.full((1, 27), -1)
    with pytest.raises(ValueError, match=f"edge {edge} cannot"):
        interpreted.convolve(features, torch.zeros(4, 1, *(kernel_size,) * 3), None, around)
    with pytest.raises(ValueError, match=f"edge {edge} cannot"):
        interpreted.weight_gradient(features, features, around, kernel_size)


def test_triton_is_available_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not machine.triton_available()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert machine.triton_available()


@pytest.mark.parametrize(("edge", "channels", "dtype"), [(8, 48, "bf16"), (2, 20, "fp32")])
def test_kernels_compile_for_a_gpu_that_is_not_here(
    edge: int, channels: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs more of Python than the compiler takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {**masked_triton._constants(edge, channels, kernel_size=5), "HAS_BIAS": True}
    types = {"taps": "*fp32", "neighbours": "*i64", "partial_sums": "*fp32", "num_columns": "i32", "tiles_each": "i32"}
    for kernel in (masked_triton._convolve_kernel, masked_triton._weight_gradient_kernel):
        known = {name: constants[name] for name in kernel.arg_names if name in constants}
        signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
        source = ASTSource(kernel, {**signature, **dict.fromkeys(known, "constexpr")}, known)
        assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("edge", "channels"), [(8, 48), (4, 96), (2, 192), (8, 20)])
def test_kernels_on_a_gpu(edge: int, channels: int, dtype: torch.dtype) -> None:
    case = Case(some_visible(2, (6, 8, 9), 216), edge, channels)
    drawn = draw(case, dtype, "cuda")
    compare(masked_triton, case, drawn, units=0.51)
    parts = drawn.features_NsssC, drawn.grad_NsssC, drawn.neighbours_N27, 5
    assert torch.equal(masked_triton.weight_gradient(*parts), masked_triton.weight_gradient(*parts))
