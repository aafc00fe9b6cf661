"""Which attention is faster in training: the library's fused kernel, or matrix products written out.

Run: ``python benchmarks/attention.py`` (or ``make bench``). Forward and backward at the shapes of MiM base, one thread
on a CPU. The choice of ``mim3d.nn.blocks.attend`` rests on this. Writes benchmarks/results/attention_*.json.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from yardstick.machine import best_seconds, describe, options, prepare, write_results

#: (batch, heads, length, width of a head): decoder and encoder of one and of 21 volumes, a fine-tuning crop of 160^3.
SHAPES = ((3, 16, 216, 36), (21, 16, 216, 36), (4, 12, 108, 32), (1, 12, 1000, 32))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in matrix products."""
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(-1) @ value


def milliseconds(
    attend: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> float:
    """Best of several forward and backward passes."""
    parts = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=dtype, device=device)
    return 1e3 * best_seconds(lambda: torch.autograd.backward(attend(*parts), grad), device, num_times=5)


if __name__ == "__main__":
    arguments = options(__doc__).parse_args()
    device = torch.device(arguments.device)
    prepare(device)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES[:1] if arguments.quick else SHAPES:
            fused = milliseconds(F.scaled_dot_product_attention, shape, dtype, device)
            plain = milliseconds(written_out, shape, dtype, device)
            row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape, "fused_ms": round(fused, 2)}
            rows.append(row | {"written_out_ms": round(plain, 2), "fused_over_written_out": round(fused / plain, 2)})
            print(rows[-1], flush=True)
    if not arguments.quick:
        write_results(f"attention_{device.type}", describe(device), rows)
