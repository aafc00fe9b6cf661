"""Masked depth-wise convolution for CPUs in C++ (masked.cpp), compiled on first use where there is a compiler."""

import ctypes
import hashlib
import os
import subprocess
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mim3d.core.files import atomic_file
from mim3d.kernels.machine import find_compiler

# Shape suffixes: N blocks of edge s, C channels, k kernel edge.

#: What the C++ source has code for.
KERNEL_SIZE, EDGES, DTYPES = 5, (2, 4, 8), (torch.float32, torch.bfloat16)

#: Optimised for this very processor; no fast-math, so that results do not depend on the compiler's mood.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")

#: Longest time that a compilation may take.
TIMEOUT_S = 120


def compile_library(source: Path) -> Path | None:
    """The shared library made from ``source``; None where there is no C++ compiler, or it fails (with a warning).

    Kept in the user's cache folder under a digest of the source, the compiler and the processor, so that machines
    sharing a home folder never load each other's code.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        folder = Path.home() / ".cache" / "mim3d"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # The compiler says its version and what "native" means here on the standard error.
        described = _run(compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull)
        content = "\0".join((source.read_text(encoding="utf-8"), described, *FLAGS))
        target = folder / f"{source.stem}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.so"
        if not target.exists():
            with atomic_file(target, remedy=None) as built:
                _run(compiler, *FLAGS, str(source), "-o", str(built))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        reason = detail.splitlines()[0] if detail else type(error).__name__
        warnings.warn(
            f"{source.name} could not be compiled with {compiler} ({reason}); the slower PyTorch path is used.",
            stacklevel=2,
        )
        return None
    return target


def _run(*command: str) -> str:
    """Run a command that must succeed, and return what it wrote to the standard error."""
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stderr


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled source; None where it cannot be compiled."""
    path = compile_library(Path(__file__).with_name("masked.cpp"))
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    numbers = [ctypes.c_int64] * 4
    loaded.mim3d_convolve.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 5, *numbers]
    loaded.mim3d_weight_gradient.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 4, *numbers]
    return loaded


def supports(features_NsssC: Tensor, kernel_size: int) -> bool:
    """Whether these features can be convolved here."""
    return (
        features_NsssC.device.type == "cpu"
        and features_NsssC.dtype in DTYPES
        and features_NsssC.shape[1] in EDGES
        and kernel_size == KERNEL_SIZE
        and library() is not None
    )


def convolve(features_NsssC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor | None, neighbours_N27: Tensor) -> Tensor:
    """Convolved blocks ``(N, s, s, s, C)`` of contiguous ones; sums in float32."""
    neighbours_N27 = neighbours_N27.contiguous()
    taps = weight_C1kkk.float().reshape(len(weight_C1kkk), -1).t().contiguous()
    bias = None if bias_C is None else bias_C.float().contiguous()
    out_NsssC = torch.empty_like(features_NsssC)
    _share("mim3d_convolve", features_NsssC, lambda thread: (features_NsssC, taps, bias, neighbours_N27, out_NsssC))
    return out_NsssC


def weight_gradient(features_NsssC: Tensor, grad_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> Tensor:
    """Gradient ``(C, 1, k, k, k)`` of the kernel in float32; the same bits for the same number of threads."""
    neighbours_N27 = neighbours_N27.contiguous()
    channels = features_NsssC.shape[-1]
    totals = torch.zeros(torch.get_num_threads(), kernel_size**3, channels)
    _share(
        "mim3d_weight_gradient",
        features_NsssC,
        lambda thread: (features_NsssC, grad_NsssC, neighbours_N27, totals[thread]),
    )
    return totals.sum(0).t().reshape(channels, 1, *(kernel_size,) * 3)


def _share(name: str, features_NsssC: Tensor, tensors_of: Callable[[int], tuple[Tensor | None, ...]]) -> None:
    """Call a function of the library for all blocks, a contiguous part of them in each of PyTorch's threads.

    Args:
        name: The function.
        features_NsssC: The blocks.
        tensors_of: Gives the tensors that the function reads and writes in a thread, by the number of the thread.
    """
    loaded = library()
    if loaded is None:
        raise RuntimeError("the C++ kernel is not available: no compiler was found")
    function, num_threads = getattr(loaded, name), torch.get_num_threads()
    num_blocks, edge, *_, channels = features_NsssC.shape

    def work(thread: int) -> int:
        first, last = (num_blocks * part // num_threads for part in (thread, thread + 1))
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors_of(thread)]
        return int(function(features_NsssC.dtype == torch.bfloat16, *pointers, edge, channels, first, last))

    # A call through ctypes holds no interpreter lock.
    codes = [work(0)] if num_threads == 1 else list(_pool(num_threads).map(work, range(num_threads)))
    if any(codes):
        raise RuntimeError(f"the C++ kernel has no code for these blocks (edges {EDGES}, kernel {KERNEL_SIZE})")


@lru_cache(maxsize=4)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mim3d-depthwise")
