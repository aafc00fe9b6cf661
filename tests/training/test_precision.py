"""How exactly a device computes is said, not left to defaults of the library, and chosen where it is left open."""

from collections.abc import Callable, Iterator

import pytest
import torch

from mim3d.core.errors import ConfigError
from mim3d.training import precision
from mim3d.training.launch import allow_tf32, launch, spare_thin_convolutions
from mim3d.training.precision import choose_precision, measured_speedups, require_precision
from mim3d.training.settings import LoopSettings

KINDS = ("matrix products", "dense convolutions", "depth-wise convolutions")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_holds_for_products_and_convolutions_alike(allowed: bool) -> None:
    allow_tf32(allowed)
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_run_computes_in_full_float32_unless_told_otherwise() -> None:
    allow_tf32(True)
    launch(LoopSettings(max_steps=1, accelerator="cpu"))
    assert not torch.backends.cudnn.allow_tf32


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float, float, float], None]]:
    """Makes bfloat16 so many times as fast as float32, kind by kind, and lets all steps run."""
    measured_speedups.cache_clear()

    def fake(*speedups: float) -> None:
        waiting, steps = list(speedups), {}
        now = iter(range(10**6))
        monkeypatch.setattr(precision, "_clock", lambda: next(now) * precision.MEASURED_S)

        def seconds_of(step: precision.Step, dtype: torch.dtype) -> float:
            step(dtype)
            if step not in steps:
                steps[step] = waiting.pop(0)
            return 1.0 / steps[step] if dtype == torch.bfloat16 else 1.0

        monkeypatch.setattr(precision, "seconds_of", seconds_of)

    yield fake
    measured_speedups.cache_clear()


@pytest.mark.parametrize(
    ("speedups", "chosen"),
    [
        ((3.5, 1.6, 1.0), "bf16-mixed"),
        # AMX.
        ((6.0, 4.0, 1.2), "bf16-mixed"),
        # Without instructions for bfloat16, with AVX-512 and AVX2.
        ((0.8, 0.4, 0.05), "32-true"),
        ((0.1, 0.1, 0.04), "32-true"),
        # One of them is enough to say no.
        ((3.5, 1.1, 1.0), "32-true"),
        ((1.1, 1.6, 1.0), "32-true"),
        ((3.5, 1.6, 0.5), "32-true"),
    ],
)
def test_auto_takes_bfloat16_on_a_cpu_only_where_all_that_matters_is_clearly_faster(
    clock: Callable[..., None], speedups: tuple[float, float, float], chosen: str
) -> None:
    clock(*speedups)
    choice = choose_precision("cpu")
    assert choice.precision == chosen
    assert choice.speedups == pytest.approx(dict(zip(KINDS, speedups, strict=True)))
    assert f"{speedups[1]:.2g}x in dense convolutions" in choice.reason


def test_a_cpu_is_measured_once_on_one_thread_and_without_random_numbers(
    clock: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(2.0, 2.0, 2.0)
    state, num_threads, seen = torch.get_rng_state(), torch.get_num_threads(), set()
    timed = precision.seconds_of
    monkeypatch.setattr(
        precision, "seconds_of", lambda step, dtype: seen.add(torch.get_num_threads()) or timed(step, dtype)
    )
    assert choose_precision("cpu") == choose_precision("cpu")
    assert seen == {1}
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clock_is_read_around_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([3.0, 5.5])
    monkeypatch.setattr(precision, "_clock", lambda: next(now))
    assert precision.seconds_of(lambda dtype: None, torch.float32) == 2.5


@pytest.mark.parametrize(("device", "has", "chosen"), [("cuda", True, "bf16-mixed"), ("cuda", False, "32-true")])
def test_auto_asks_a_gpu_what_it_computes_in(
    monkeypatch: pytest.MonkeyPatch, device: str, has: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    choice = choose_precision(device)
    assert (choice.precision, choice.speedups) == (chosen, {})


def test_auto_is_float32_on_apples_gpus() -> None:
    assert choose_precision("mps").precision == "32-true"


def test_a_precision_that_a_device_lacks_is_refused_with_those_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    with pytest.raises(
        ConfigError, match=r"'bf16-mixed', but cuda \(Tesla V100\) does not compute in bfloat16; use --pr"
    ):
        require_precision("bf16-mixed", "cuda")
    require_precision("16-mixed", "cuda")
    require_precision("32-true", "cuda")


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), NotImplementedError("conv3d"), TypeError("no such type")])
def test_where_a_convolution_fails_in_a_type_the_device_lacks_it(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    require_precision("bf16-mixed", "cpu")
    monkeypatch.setattr(precision.F, "conv3d", fail)
    with pytest.raises(ConfigError, match="cpu does not compute in bfloat16; use --precision auto, or 32-true"):
        require_precision("bf16-mixed", "cpu")
    require_precision("32-true", "cpu")


def test_float16_on_a_cpu_is_refused_for_its_slowness() -> None:
    with pytest.raises(
        ConfigError, match="'16-mixed', which is for GPUs, and slower than float32 by far on a CPU; use"
    ):
        require_precision("16-mixed", "cpu")


@pytest.mark.parametrize(("size", "dtype"), [((2, 4, 4), torch.float32), ((4, 2, 2), torch.bfloat16)])
def test_convolutions_whose_gradient_is_wrong_in_bfloat16_compute_in_float32(
    size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv3d(8, 8, 3, padding=1))
    volume, names = torch.randn(2, 8, *size), list(network.state_dict())
    network(volume).sum().backward()
    expected = network[0].weight.grad.clone()
    network.zero_grad()
    spare_thin_convolutions(network)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(volume)
    features.float().sum().backward()
    assert (features.dtype, list(network.state_dict())) == (dtype, names)
    if dtype == torch.float32:
        assert torch.equal(network[0].weight.grad, expected)
    torch.testing.assert_close(network[0].weight.grad, expected, rtol=0.02, atol=0.1)
