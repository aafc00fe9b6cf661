"""Whether kernels that need more than PyTorch can run here."""

import os
from functools import lru_cache

import torch

#: The oldest GPUs that Triton compiles for, as NVIDIA numbers them.
MIN_CAPABILITY = (8, 0)


def triton_available() -> bool:
    """Whether Triton is installed and has a GPU to run on, or its interpreter is asked for.

    Triton is not imported where neither is so.
    """
    # The words that Triton itself takes for yes.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")
    return (interpreted or _has_gpu()) and _has_triton()


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= MIN_CAPABILITY


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        # Releases before 3.3 have no tuples of tensors, which the kernels are written with.
        from triton.language import tuple as _  # noqa: F401
    except ImportError:
        return False
    return True
