"""Masked depth-wise convolution for CPUs in C++ (masked.cpp), compiled on first use where there is a compiler."""

import ctypes
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from mim3d.kernels.compiling import compile_library

# Shape suffixes: N blocks of edge s, C channels, k kernel edge, T threads.

#: What the C++ source has code for.
KERNEL_SIZE, EDGES, DTYPES = 5, (2, 4, 8), (torch.float32, torch.bfloat16)

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled source; None where it cannot be compiled."""
    path = compile_library(Path(__file__).with_name("masked.cpp"))
    if path is None:
        return None
    loaded = ctypes.CDLL(str(path))
    loaded.mim3d_convolve.argtypes = [ctypes.c_int, *[_POINTER] * 5, *[_INT64] * 4]
    loaded.mim3d_weight_gradient.argtypes = [ctypes.c_int, *[_POINTER] * 4, *[_INT64] * 4]
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
    num_blocks, edge, *_, channels = features_NsssC.shape
    neighbours_N27 = neighbours_N27.contiguous()
    taps = weight_C1kkk.float().reshape(channels, -1).t().contiguous()
    bias = None if bias_C is None else bias_C.float().contiguous()
    out_NsssC = torch.empty_like(features_NsssC)
    run = _library().mim3d_convolve

    def work(first: int, last: int, thread: int) -> int:
        return int(
            run(
                features_NsssC.dtype == torch.bfloat16,
                features_NsssC.data_ptr(),
                taps.data_ptr(),
                None if bias is None else bias.data_ptr(),
                neighbours_N27.data_ptr(),
                out_NsssC.data_ptr(),
                edge,
                channels,
                first,
                last,
            )
        )

    _share(work, num_blocks)
    return out_NsssC


def weight_gradient(features_NsssC: Tensor, grad_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> Tensor:
    """Gradient ``(C, 1, k, k, k)`` of the kernel in float32; the same bits for the same number of threads."""
    num_blocks, edge, *_, channels = features_NsssC.shape
    neighbours_N27 = neighbours_N27.contiguous()
    totals = torch.zeros(torch.get_num_threads(), kernel_size**3, channels)
    run = _library().mim3d_weight_gradient

    def work(first: int, last: int, thread: int) -> int:
        return int(
            run(
                features_NsssC.dtype == torch.bfloat16,
                features_NsssC.data_ptr(),
                grad_NsssC.data_ptr(),
                neighbours_N27.data_ptr(),
                totals[thread].data_ptr(),
                edge,
                channels,
                first,
                last,
            )
        )

    _share(work, num_blocks)
    return totals.sum(0).t().reshape(channels, 1, *(kernel_size,) * 3)


def _library() -> ctypes.CDLL:
    loaded = library()
    if loaded is None:
        raise RuntimeError("the C++ kernel is not available: no compiler was found")
    return loaded


def _share(work: Callable[[int, int, int], int], num_blocks: int) -> None:
    """Run ``work(first, last, thread)`` over all blocks, a contiguous part for each of the library's threads."""
    num_threads = torch.get_num_threads()
    bounds = [num_blocks * part // num_threads for part in range(num_threads + 1)]
    parts = [(first, last, thread) for thread, (first, last) in enumerate(itertools.pairwise(bounds))]
    # A call through ctypes holds no interpreter lock.
    codes = [work(*parts[0])] if num_threads == 1 else list(_pool(num_threads).map(lambda part: work(*part), parts))
    if any(codes):
        raise RuntimeError(f"the C++ kernel has no code for these blocks (edges {EDGES}, kernel {KERNEL_SIZE})")


@lru_cache(maxsize=4)
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="mim3d-depthwise")
