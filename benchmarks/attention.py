"""Which attention is faster in training: the library's fused kernel, or matrix products written out.

Run: ``python benchmarks/attention.py`` (or ``make bench``). Forward and backward at the shapes of MiM base, one thread
on a CPU. The choice of ``mim3d.nn.blocks.attend`` rests on this. Writes benchmarks/results/attention_*.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from yardstick.machine import hardware_name, prepare, synchronize

RESULTS = Path(__file__).parent / "results"

#: (batch, heads, length, width of a head): decoder and encoder of one and of 21 volumes, a fine-tuning crop of 160^3.
SHAPES = ((3, 16, 216, 36), (21, 16, 216, 36), (4, 12, 108, 32), (1, 12, 1000, 32))


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention in matrix products."""
    return ((query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)).softmax(-1) @ value


def milliseconds(attend: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: str) -> float:
    """Best of several forward and backward passes."""
    parts = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    grad = torch.randn(shape, dtype=dtype, device=device)
    times = []
    for _ in range(5):
        synchronize(torch.device(device))
        start_s = time.perf_counter()
        attend(*parts).backward(grad)
        synchronize(torch.device(device))
        times.append(time.perf_counter() - start_s)
    return 1e3 * min(times)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    prepare(torch.device(device))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            fused = milliseconds(F.scaled_dot_product_attention, shape, dtype, device)
            plain = milliseconds(written_out, shape, dtype, device)
            row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape, "fused_ms": round(fused, 2)}
            rows.append(row | {"written_out_ms": round(plain, 2), "fused_over_written_out": round(fused / plain, 2)})
            print(rows[-1], flush=True)
    machine = {"hardware": hardware_name(torch.device(device)), "torch": torch.__version__, "threads": 1}
    target = RESULTS / f"attention_{torch.device(device).type}.json"
    target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"Results: {target}")
