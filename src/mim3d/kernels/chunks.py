"""How much is worked on at a time."""

import torch

#: Bytes of a chunk: what a processor's cache holds, or a GPU has to spare.
CHUNK_BYTES = {"cpu": 2**21, "cuda": 2**28}


def chunk_length(device: torch.device, item_bytes: int) -> int:
    """Items of ``item_bytes`` each that are worked on at a time, at least one."""
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // item_bytes)
