"""The machine that is measured: its name, its peak, and the memory of this process."""

import platform
import resource
import time
from pathlib import Path

import torch

from mim3d.kernels.allocator import keep_freed_memory


def prepare(device: torch.device) -> None:
    """What mim3d does before it trains, for every network alike."""
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
    best_s = float("inf")
    for _ in range(6):
        synchronize(device)
        start_s = time.perf_counter()
        left @ right
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * size**3 / best_s


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the process's largest resident size on a CPU, the largest allocation on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
