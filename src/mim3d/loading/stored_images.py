"""Images of a batch as they travel from the cache to the device: stored numbers, and what they mean.

A batch of 8-bit crops is a quarter of the same batch in float32. It is put together, handed over and uploaded as it is
stored; the device makes float32 of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim3d.scans.intensity import apply_rescaling

#: Gives an array to be filled, of a shape and type.
Allocate = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]

#: The widest voxels that travel.
MAX_VOXEL_BYTES = 4

#: Unsigned types with which torch does not calculate on every device -> the type whose bits they travel as, a type
#: that holds all their values, and the bits that are theirs in it.
_UNSIGNED = {
    np.dtype(np.uint16): (np.int16, torch.int32, 0xFFFF),
    np.dtype(np.uint32): (np.int32, torch.int64, 0xFFFFFFFF),
}


@dataclass(frozen=True)
class StoredCrops:
    """Crops of one sample under one batch key, before they become part of a batch.

    Attributes:
        crops: Stored numbers, ``(C, X, Y, Z)`` each; may be views of what was read, such as flipped ones.
        rescaling: ``(C, 4)`` float32, how they become network input, see ``Intensity.rescaling``.
    """

    crops: Sequence[np.ndarray]
    rescaling: np.ndarray


@dataclass(frozen=True)
class Packed:
    """What a batch holds under one key, as plain arrays: what reading processes hand over.

    Attributes:
        array: The values, ``(B, ...)``.
        rescaling: ``(B, C, 4)`` float32 for images, see ``Intensity.rescaling``; None for everything else.
    """

    array: np.ndarray
    rescaling: np.ndarray | None = None

    def unpacked(self) -> "Tensor | StoredImages":
        """The same memory as the trainer sees it."""
        if self.rescaling is None:
            return torch.from_numpy(self.array)
        dtype = self.array.dtype
        signed = _UNSIGNED[dtype][0] if dtype in _UNSIGNED else dtype
        return StoredImages(torch.from_numpy(self.array.view(signed)), self.rescaling, dtype.name)


@dataclass(frozen=True)
class StoredImages:
    """Images of a batch that become float32 network input on the device they are sent to.

    Attributes:
        numbers: Stored numbers, ``(B, N, C, X, Y, Z)``; unsigned ones of 16 or 32 bits as signed ones of the same bits.
        rescaling: ``(B, C, 4)`` float32, see ``Intensity.rescaling``.
        type_name: Name that numpy gives the type of the numbers.
    """

    numbers: Tensor
    rescaling: np.ndarray
    type_name: str

    def to(self, device: torch.device | str) -> Tensor:
        """The images as ``(B, N, C, X, Y, Z)`` float32 on ``device``, in memory of their own.

        On a GPU only the stored numbers are uploaded, and nothing waits for that where they lie in pinned memory.
        """
        numbers = self.numbers.to(device, non_blocking=torch.device(device).type == "cuda")
        unsigned = _UNSIGNED.get(np.dtype(self.type_name))
        if unsigned is not None:
            _, wider, bits = unsigned
            numbers = numbers.to(wider) & bits
        images = numbers.to(torch.float32, copy=True)
        for sample, rescaling in zip(images, self.rescaling, strict=True):
            apply_rescaling(sample, rescaling)
        return images


def pack(samples: Sequence[Mapping[str, StoredCrops | Tensor]], allocate: Allocate) -> dict[str, Packed]:
    """Put samples of the same keys and shapes together.

    Args:
        samples: Batch key -> crops or any tensor, for each sample.
        allocate: Gives the arrays that the batch is written to.
    """
    return {key: _pack([sample[key] for sample in samples], allocate) for key in samples[0]}


def _pack(values: Sequence[StoredCrops | Tensor], allocate: Allocate) -> Packed:
    images = [value for value in values if isinstance(value, StoredCrops)]
    if not images:
        arrays = [value.numpy() for value in values if isinstance(value, Tensor)]
        return Packed(np.stack(arrays, out=allocate((len(arrays), *arrays[0].shape), arrays[0].dtype)))
    crops = [crop for image in images for crop in image.crops]
    shape = (len(images), len(images[0].crops), *crops[0].shape)
    # The smallest type that holds the voxels of all crops; float32, as which they end, where that is too wide.
    common = np.result_type(*(crop.dtype for crop in crops)).newbyteorder("=")
    numbers = allocate(shape, common if common.itemsize <= MAX_VOXEL_BYTES else np.dtype(np.float32))
    for place, crop in zip(numbers.reshape(-1, *crops[0].shape), crops, strict=True):
        place[...] = crop
    rescaling = allocate((len(images), *images[0].rescaling.shape), images[0].rescaling.dtype)
    return Packed(numbers, np.stack([image.rescaling for image in images], out=rescaling))
