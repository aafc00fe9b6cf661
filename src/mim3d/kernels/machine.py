"""What kernels ask of the machine: compilers, how much fits into a cache, and how memory is handed out."""

import ctypes
import os
import shutil
from functools import lru_cache

import torch

#: The oldest GPUs that Triton compiles for, as NVIDIA numbers them.
MIN_CAPABILITY = (8, 0)

#: Bytes of a chunk: what a processor's cache holds, or a GPU has to spare.
CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


def find_compiler() -> str | None:
    """A C++ compiler on the search path."""
    return shutil.which("g++") or shutil.which("clang++")


def triton_available() -> bool:
    """Whether Triton is installed and has a GPU to run on, or its interpreter is asked for.

    Triton is not imported where neither is so.
    """
    # The words that Triton itself takes for yes.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
    has_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() >= MIN_CAPABILITY
    return (interpreted or has_gpu) and _has_triton()


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        # Releases before 3.3 have no tuples of tensors, which the kernels are written with.
        from triton.language import tuple as _  # noqa: F401
    except ImportError:
        return False
    return True


def chunk_length(device: torch.device, item_bytes: int) -> int:
    """Items of ``item_bytes`` each that are worked on at a time, at least one."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // item_bytes)


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of giving it back after every tensor.

    A training step frees and takes the same large tensors over and over; each time the system must clear every page of
    them again, which can take a third of the step. The price is memory: holes in the heap.
    Pre-training grows by a few to some 25 percent; fine-tuning, where the library copies whole volumes, by up to 70.

    Returns:
        Whether the C library knows how; nothing happens elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 2**26}
    return all(mallopt(option, value) == 1 for option, value in options.items())
