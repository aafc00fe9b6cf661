"""Arrays on disk in blocks: the only file that knows how the cache stores voxels.

One zarr (version 3) array of 32-voxel cubes, compressed one by one with Blosc/Zstd, packed into a single shard, so that
a crop unpacks only the cubes it touches and a volume is two files.
"""

import os
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.errors import DataError

BLOCK = 32


def write_array(path: str, array: npt.NDArray[Any]) -> None:
    """Store an array whose last three axes are X, Y, Z; earlier axes are not cut.

    Raises:
        OSError: The disk is full or not writable.
    """
    import zarr
    from zarr.codecs import BloscCodec

    lead = array.shape[:-3]
    shard = tuple(-(-size // BLOCK) * BLOCK for size in array.shape[-3:])
    stored = zarr.create_array(
        path,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(*lead, BLOCK, BLOCK, BLOCK),
        shards=(*lead, *shard),
        compressors=BloscCodec(cname="zstd", clevel=5, shuffle=_better_shuffle(array)),
        fill_value=0,
        # An absent shard would read as zeros; written even where empty, its absence is damage.
        config={"write_empty_chunks": True},
    )
    stored[...] = array


def _better_shuffle(array: npt.NDArray[Any]) -> Literal["shuffle", "noshuffle"]:
    """Whether to sort a block's bytes by significance: a gain for true numbers, a loss for floats made from 8 bits."""
    from numcodecs import Blosc

    middle = tuple(slice(max(0, size // 2 - BLOCK // 2), size // 2 + BLOCK // 2) for size in array.shape[-3:])
    block = np.ascontiguousarray(array.reshape(-1, *array.shape[-3:])[:, middle[0], middle[1], middle[2]])
    sorted_bytes, plain = (len(Blosc("zstd", 5, mode).encode(block)) for mode in (Blosc.SHUFFLE, Blosc.NOSHUFFLE))
    return "shuffle" if sorted_bytes <= plain else "noshuffle"


class StoredArray:
    """A stored array, opened at the first read; cheap to pickle."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type["StoredArray"], tuple[str]]:
        return StoredArray, (self.path,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the stored values."""
        dtype: np.dtype[Any] = self._array.dtype
        return dtype

    def read(self, *ranges: slice) -> npt.NDArray[Any]:
        """The voxels of one slice per axis; only the blocks they touch are unpacked.

        Raises:
            DataError: The array is missing or damaged.
        """
        try:
            return np.asarray(self._array[ranges])
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise self._damage() from error

    @cached_property
    def _array(self) -> Any:
        import zarr

        try:
            array = zarr.open_array(self.path, mode="r")
        except (OSError, ValueError, KeyError) as error:
            raise self._damage() from error
        if not os.path.isfile(os.path.join(self.path, "c", *["0"] * array.ndim)):
            raise self._damage()
        return array

    def _damage(self) -> DataError:
        return DataError(
            f"{self.path}: missing or damaged; delete {os.path.dirname(self.path)} and run `mim3d cache` again."
        )
