"""The machine that is measured: its name, its peak, and the memory of this process."""

import argparse
import json
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mim3d.core.resources import peak_memory_bytes
from mim3d.kernels.machine import keep_freed_memory

RESULTS = Path(__file__).parents[1] / "results"

#: One line of results: what was measured and of what, by name, in types that JSON has.
Row = dict[str, Any]


def options(doc: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small, no results written: to try the script")
    return parser


def prepare(device: torch.device, threads: int = 1) -> None:
    """What mim3d does before it trains, for every network alike; so many threads on a CPU."""
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()


def hardware_name(device: torch.device) -> str:
    """The processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    amx = ", AMX" if any("amx_bf16" in line for line in lines) else ""
    return f"{names[0] if names else platform.processor() or platform.machine()} ({capability}{amx})"


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the best of several."""
    size = 4096 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: left @ right, device, num_times=6)


def best_seconds(work: Callable[[], object], device: torch.device, num_times: int) -> float:
    """Shortest time that the device takes for ``work``."""
    times = []
    for _ in range(num_times):
        _wait_for(device)
        start_s = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - start_s)
    return min(times)


def _wait_for(device: torch.device) -> None:
    """Until it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(device: torch.device) -> Row:
    """What a reader of results must know of the machine."""
    return {"hardware": hardware_name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}


def write_results(name: str, machine: Row, rows: Sequence[Row]) -> None:
    """Write ``benchmarks/results/NAME.json`` and say so."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")
    print(f"Results: {target}")


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident size on a CPU, the largest allocation on a GPU.

    Where the system does not tell a process's own, the account is taken that begins with its parent's.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory_bytes() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
