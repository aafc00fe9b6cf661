"""Masked depth-wise convolution for GPUs in Triton, on the blocks of visible tokens alone.

A thread holds whole columns of a block: all voxels along Z at one (x, y), for a few neighbouring channels. A column
with its halo is loaded once for each of the k x k taps across and used for all k taps along Z, from registers, so
that an output costs 1.5 k x k loads where blocks have 8 voxels along an edge, and not k x k x k. Sums are in float32,
always in the same order: results are the same bits from run to run.

The module can be imported without Triton, but not used; see :func:`mim3d.kernels.machine.triton_available`.
"""

# ruff: noqa: RUF005 - Triton's language has no unpacking inside a tuple

# Kernels say in annotations what they are compiled for, in Triton's words: unread where it is absent.
from __future__ import annotations

from collections.abc import Callable
from typing import Any, no_type_check

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:  # an extra of the package
    triton = tl = None

# Shape suffixes: N blocks of edge s, C channels, k kernel edge. Inside kernels a program works on a tile of R columns
# (a column is a block's voxels along Z at one x, y; there are N x s x s) and C channels.

#: Columns x channels of a tile: 4 neighbouring channels, one vector load, for every thread of WARPS.
TILE, WARPS = 512, 4

#: Channels of a tile, at most and at least: fewer than 16 would waste the bytes that a GPU loads together.
MAX_CHANNELS, MIN_CHANNELS = 32, 16

#: Partial sums of the weight's gradient, at most, and tiles of columns that each is worth.
MAX_PARTIALS, TILES_PER_PARTIAL = 64, 4


def convolve(features_NsssC: Tensor, weight_C1kkk: Tensor, bias_C: Tensor | None, neighbours_N27: Tensor) -> Tensor:
    """Convolved blocks ``(N, s, s, s, C)`` in the features' dtype; hidden neighbours count as zeros.

    With the kernel flipped along its three axes and the output's gradient as features, the gradient of the input.

    Args:
        features_NsssC: Float32, bfloat16 or float16; ``s`` a power of two.
        weight_C1kkk: The kernel, ``k`` odd and ``k // 2 <= s``, in any of these precisions.
        bias_C: Added to the result.
        neighbours_N27: The block at each offset in {-1, 0, 1}^3, raster order; -1 where it is hidden or outside.
    """
    edge, channels, kernel_size = features_NsssC.shape[1], features_NsssC.shape[-1], weight_C1kkk.shape[-1]
    _check(features_NsssC, neighbours_N27, kernel_size)
    features_NsssC = features_NsssC.contiguous()
    out_NsssC = torch.empty_like(features_NsssC)
    num_columns, constants = features_NsssC.shape[0] * edge**2, _constants(edge, channels, kernel_size)
    # Channels last here as well: the channels of one tap are loaded together.
    taps = weight_C1kkk.reshape(channels, -1).t().contiguous()
    _launch(
        _convolve_kernel,
        (triton.cdiv(channels, constants["CHANNELS"]) * triton.cdiv(num_columns, constants["COLUMNS"]),),
        features_NsssC,
        taps,
        taps if bias_C is None else bias_C.contiguous(),
        neighbours_N27.contiguous(),
        out_NsssC,
        num_columns,
        HAS_BIAS=bias_C is not None,
        **constants,
    )
    return out_NsssC


def weight_gradient(features_NsssC: Tensor, grad_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> Tensor:
    """Gradient ``(C, 1, k, k, k)`` of the kernel in float32.

    Args:
        features_NsssC: What was convolved.
        grad_NsssC: Gradient of the result.
        neighbours_N27: Table of neighbours, as for :func:`convolve`.
        kernel_size: ``k``.
    """
    edge, channels = features_NsssC.shape[1], features_NsssC.shape[-1]
    _check(features_NsssC, neighbours_N27, kernel_size)
    num_columns, constants = features_NsssC.shape[0] * edge**2, _constants(edge, channels, kernel_size)
    num_tiles = triton.cdiv(num_columns, constants["COLUMNS"])
    # Set by the data and not by the GPU, so that the order of the sum is always the same.
    partials = max(1, min(MAX_PARTIALS, triton.cdiv(num_tiles, TILES_PER_PARTIAL)))
    tiles_each = triton.cdiv(num_tiles, partials)
    sums = features_NsssC.new_empty(partials, kernel_size**3, channels, dtype=torch.float32)
    _launch(
        _weight_gradient_kernel,
        (triton.cdiv(channels, constants["CHANNELS"]), kernel_size, partials),
        features_NsssC.contiguous(),
        grad_NsssC.contiguous(),
        neighbours_N27.contiguous(),
        sums,
        num_columns,
        tiles_each,
        **constants,
    )
    return sums.sum(0).t().reshape(channels, 1, *(kernel_size,) * 3)


def _check(features_NsssC: Tensor, neighbours_N27: Tensor, kernel_size: int) -> None:
    edge = features_NsssC.shape[1]
    if edge & (edge - 1) or kernel_size % 2 == 0 or kernel_size // 2 > edge:
        raise ValueError(f"blocks of edge {edge} cannot be convolved with a kernel of edge {kernel_size}")
    if neighbours_N27.shape != (len(features_NsssC), 27):
        raise ValueError(f"neighbours are {tuple(neighbours_N27.shape)} for {len(features_NsssC)} blocks")


def _constants(edge: int, channels: int, kernel_size: int) -> dict[str, int]:
    """What kernels are compiled for."""
    # The largest power of two that divides the channels, within bounds: no thread is then left without work.
    tile = min(MAX_CHANNELS, max(MIN_CHANNELS, channels & -channels))
    return {
        "WIDTH": channels,
        "EDGE": edge,
        "LOG_EDGE": edge.bit_length() - 1,
        "KERNEL": kernel_size,
        "COLUMNS": TILE // tile,
        "CHANNELS": tile,
        "num_warps": WARPS,
    }


def _launch(kernel: Any, grid: tuple[int, ...], features: Tensor, *others: Tensor | int, **constants: int) -> None:
    # On the GPU of the tensors, which need not be the current one.
    with torch.cuda.device_of(features):  # type: ignore[no-untyped-call]
        kernel[grid](features, *others, **constants)


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


# Below is Triton's language, a subset of Python that it compiles. Tuples of tensors are registers: everything that
# indexes them is known when the code is compiled.


@_jit
@no_type_check
def _load_column(
    features, neighbours, column_R1, channel_1C, tap_x, tap_y,
    WIDTH: tl.constexpr, EDGE: tl.constexpr, LOG_EDGE: tl.constexpr, HALO: tl.constexpr,
):  # fmt: skip
    """What one tap of the kernel across meets: EDGE + 2 x HALO tensors ``(R, C)`` in float32, along Z."""
    block_R1 = column_R1 >> (2 * LOG_EDGE)
    # Counted from the first voxel of the neighbour at offset -1, so that neither is negative.
    x_R1 = ((column_R1 >> LOG_EDGE) & (EDGE - 1)) + (tap_x + (EDGE - HALO))
    y_R1 = (column_R1 & (EDGE - 1)) + (tap_y + (EDGE - HALO))
    around_R1 = neighbours + block_R1 * 27 + (x_R1 >> LOG_EDGE) * 9 + (y_R1 >> LOG_EDGE) * 3
    offset_RC = ((x_R1 & (EDGE - 1)) * EDGE + (y_R1 & (EDGE - 1))) * (EDGE * WIDTH) + channel_1C
    column = ()
    for z_offset in tl.static_range(3):
        # int64: features may have more than 2^31 elements.
        source_R1 = tl.load(around_R1 + z_offset).to(tl.int64)
        pointers_RC = features + source_R1 * (EDGE * EDGE * EDGE * WIDTH) + offset_RC
        visible_RC = (source_R1 >= 0) & (channel_1C < WIDTH)
        for z in tl.static_range(EDGE - HALO if z_offset == 0 else 0, HALO if z_offset == 2 else EDGE):
            value_RC = tl.load(pointers_RC + z * WIDTH, mask=visible_RC, other=0.0)
            column = column + (value_RC.to(tl.float32),)
    return column


@_jit
@no_type_check
def _convolve_kernel(
    features, taps, bias, neighbours, out, num_columns, HAS_BIAS: tl.constexpr, WIDTH: tl.constexpr,
    EDGE: tl.constexpr, LOG_EDGE: tl.constexpr, KERNEL: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One tile of the result. Tiles that differ in channels alone run side by side: they share lines of memory."""
    # One axis of programs: a GPU takes no more than 65535 along the others.
    tiles_across: tl.constexpr = (WIDTH + CHANNELS - 1) // CHANNELS
    channel_1C = (tl.program_id(0) % tiles_across * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    column_R1 = (tl.program_id(0) // tiles_across * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    # Columns after the last one repeat it and are not stored.
    source_R1 = tl.minimum(column_R1, num_columns - 1)
    first_RC = tl.full((COLUMNS, CHANNELS), 0.0, tl.float32)
    if HAS_BIAS:
        first_RC += tl.load(bias + channel_1C, mask=channel_1C < WIDTH, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(EDGE):
        sums = sums + (first_RC,)
    # A loop at run time: unrolled, the code would outgrow the cache of instructions.
    for across in range(KERNEL * KERNEL):
        column = _load_column(
            features, neighbours, source_R1, channel_1C, across // KERNEL, across % KERNEL,
            WIDTH, EDGE, LOG_EDGE, KERNEL // 2,
        )  # fmt: skip
        weights = ()
        for tap in tl.static_range(KERNEL):
            pointers_1C = taps + (across * KERNEL + tap) * WIDTH + channel_1C
            weights = weights + (tl.load(pointers_1C, mask=channel_1C < WIDTH, other=0.0).to(tl.float32),)
        added = ()
        for z in tl.static_range(EDGE):
            sum_RC = sums[z]
            for tap in tl.static_range(KERNEL):
                sum_RC += column[z + tap] * weights[tap]
            added = added + (sum_RC,)
        sums = added
    pointers_RC = out + column_R1.to(tl.int64) * (EDGE * WIDTH) + channel_1C
    for z in tl.static_range(EDGE):
        inside_RC = (column_R1 < num_columns) & (channel_1C < WIDTH)
        tl.store(pointers_RC + z * WIDTH, sums[z].to(out.dtype.element_ty), mask=inside_RC)


@_jit
@no_type_check
def _weight_gradient_kernel(
    features, grad, neighbours, partial_sums, num_columns, tiles_each, WIDTH: tl.constexpr,
    EDGE: tl.constexpr, LOG_EDGE: tl.constexpr, KERNEL: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of one plane of the kernel (one tap along X) over a part of the columns: KERNEL x KERNEL in registers."""
    channel_1C = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    tap_x, partial = tl.program_id(1), tl.program_id(2)
    sums = ()
    for _ in tl.static_range(KERNEL * KERNEL):
        sums = sums + (tl.full((COLUMNS, CHANNELS), 0.0, tl.float32),)
    for tile in range(partial * tiles_each, (partial + 1) * tiles_each):
        column_R1 = (tile * COLUMNS + tl.arange(0, COLUMNS))[:, None]
        pointers_RC = grad + column_R1.to(tl.int64) * (EDGE * WIDTH) + channel_1C
        inside_RC = (column_R1 < num_columns) & (channel_1C < WIDTH)
        grads = ()
        for z in tl.static_range(EDGE):
            grads = grads + (tl.load(pointers_RC + z * WIDTH, mask=inside_RC, other=0.0).to(tl.float32),)
        added = ()
        for tap_y in tl.static_range(KERNEL):
            column = _load_column(
                features, neighbours, tl.minimum(column_R1, num_columns - 1), channel_1C, tap_x, tap_y,
                WIDTH, EDGE, LOG_EDGE, KERNEL // 2,
            )  # fmt: skip
            for tap in tl.static_range(KERNEL):
                sum_RC = sums[tap_y * KERNEL + tap]
                for z in tl.static_range(EDGE):
                    sum_RC += column[z + tap] * grads[z]
                added = added + (sum_RC,)
        sums = added
    pointers_C = partial_sums + (partial * KERNEL + tap_x) * (KERNEL * KERNEL * WIDTH) + channel_1C
    for tap in tl.static_range(KERNEL * KERNEL):
        tl.store(pointers_C + tap * WIDTH, tl.sum(sums[tap], 0)[None, :], mask=channel_1C < WIDTH)
