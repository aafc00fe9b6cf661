"""Which precision training computes in: what a device lacks is refused, and auto is what the device is good at.

Bfloat16 halves the time of a step where a processor has instructions for it, and takes it tenfold and more where it has
none, which no list of processors tells as well as a look at the clock.
"""

import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from mim3d.core.errors import ConfigError
from mim3d.core.resources import choose_accelerator, device_name
from mim3d.kernels.depthwise import depthwise_dense

#: What each precision computes products in.
DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

#: Least speed of bfloat16 against float32 with which auto takes it on a CPU, for each kind of operation that a step is
#: made of. Depth-wise convolutions gain little anywhere (1.0 times, with instructions for bfloat16), and without such
#: instructions take twenty times as long.
LEAST_SPEEDUPS = {"matrix products": 1.2, "dense convolutions": 1.2, "depth-wise convolutions": 0.75}

#: Seconds for which each kind is measured.
MEASURED_S = 0.2

#: Time of this process alone, which other programs do not disturb; where it is coarse (Windows), that on the wall.
_clock = time.process_time if time.get_clock_info("process_time").resolution < 1e-4 else time.perf_counter

#: A small step of one kind, forward and backward, that computes in the type it is given.
Step = Callable[[torch.dtype], object]


@dataclass(frozen=True)
class PrecisionChoice:
    """What auto came to.

    Attributes:
        precision: ``32-true`` or ``bf16-mixed``.
        reason: Why, in words.
        speedups: Speed of bfloat16 against float32 by kind of operation; empty where nothing was measured.
    """

    precision: str
    reason: str
    speedups: Mapping[str, float] = field(default_factory=dict)


def choose_precision(accelerator: str) -> PrecisionChoice:
    """What ``auto`` is on a device: bf16-mixed where that is clearly faster, else 32-true.

    Args:
        accelerator: The setting of that name, whose device is known to be there.
    """
    device = choose_accelerator(accelerator)
    if device == "cuda":
        if _computes_in(torch.bfloat16, device):
            return PrecisionChoice("bf16-mixed", "this GPU computes in bfloat16")
        return PrecisionChoice("32-true", "this GPU has no bfloat16")
    if device != "cpu":
        return PrecisionChoice("32-true", f"on {device} always")
    speedups = measured_speedups()
    is_faster = all(speedups[kind] >= least for kind, least in LEAST_SPEEDUPS.items())
    measured = ", ".join(f"{speedup:.2g}x in {kind}" for kind, speedup in speedups.items())
    reason = f"speed of bfloat16 against float32, measured here: {measured}"
    return PrecisionChoice("bf16-mixed" if is_faster else "32-true", reason, speedups)


def require_precision(precision: str, accelerator: str) -> None:
    """Refuse a precision that the device lacks.

    Args:
        precision: The setting of that name, other than ``auto``.
        accelerator: The setting of that name, whose device is known to be there.
    Raises:
        ConfigError: The device does not compute in this precision.
    """
    device, dtype = choose_accelerator(accelerator), DTYPES.get(precision)
    if (device, dtype) == ("cpu", torch.float16):
        # The library has kernels, but a step that takes seconds in float32 took minutes.
        raise ConfigError(
            f"precision is '{precision}', which is for GPUs, and slower than float32 by far on a CPU; use --precision "
            "auto, or 32-true."
        )
    if dtype is None or _computes_in(dtype, device):
        return
    others = "32-true or 16-mixed" if device == "cuda" else "32-true"
    raise ConfigError(
        f"precision is '{precision}', but {device_name(torch.device(device))} does not compute in "
        f"{str(dtype).removeprefix('torch.')}; use --precision auto, or {others}."
    )


def _computes_in(dtype: torch.dtype, device: str) -> bool:
    """Whether a convolution can be trained in this type."""
    if device == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    volume, kernel = (torch.ones(2, 2, 3, 3, 3, device=device, requires_grad=True) for _ in range(2))
    try:
        # Where a type is not there, autocast says so and goes on in float32.
        with warnings.catch_warnings(), torch.autocast(device, dtype):
            warnings.simplefilter("error")
            out = F.conv3d(volume, kernel)
        torch.autograd.grad(out, (volume, kernel), torch.ones_like(out))
    except (RuntimeError, TypeError, UserWarning):
        return False
    return out.dtype == dtype


@functools.cache
def measured_speedups() -> dict[str, float]:
    """Speed of bfloat16 against float32 on one core of this CPU, by kind of operation.

    It takes about a second, once in a process. One thread tells what the processor can do; several wait for each other
    where other programs are at work. No random number is drawn.
    """
    tokens, weight = _numbers(256, 384), _numbers(1536, 384)
    # Smaller ones the library convolves in another, slower way in float32.
    volume, kernel = _numbers(1, 32, 28, 28, 8), _numbers(32, 32, 3, 3, 3)
    features, taps, bias = _numbers(1, 24, 24, 8, 48), _numbers(48, 1, 5, 5, 5), _numbers(48)
    steps: dict[str, Step] = {
        "matrix products": _step(lambda dtype: F.linear(tokens, weight), (tokens, weight)),
        "dense convolutions": _step(lambda dtype: F.conv3d(volume, kernel, padding=1), (volume, kernel)),
        "depth-wise convolutions": _step(
            lambda dtype: depthwise_dense(features.to(dtype), taps, bias), (features, taps, bias)
        ),
    }
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {kind: _speedup(step) for kind, step in steps.items()}
    finally:
        torch.set_num_threads(num_threads)


def _speedup(step: Step) -> float:
    """Least time of a step in float32 over that in bfloat16, of turns that follow each other."""
    step(torch.float32)
    times: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    end = _clock() + MEASURED_S
    while not times[torch.float32] or _clock() < end:
        for dtype, found in times.items():
            found.append(seconds_of(step, dtype))
    return min(times[torch.float32]) / min(times[torch.bfloat16])


def seconds_of(step: Step, dtype: torch.dtype) -> float:
    """How long a step takes in a type."""
    start = _clock()
    step(dtype)
    return _clock() - start


def _step(forward: Callable[[torch.dtype], Tensor], inputs: Sequence[Tensor]) -> Step:
    def step(dtype: torch.dtype) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = forward(dtype)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return step


def _numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape).requires_grad_()
