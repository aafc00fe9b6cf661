"""How the C library hands out memory, tuned for work that takes and frees large arrays over and over."""

import ctypes

# Options of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4


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
