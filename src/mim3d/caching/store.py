"""Writing the cache's arrays: one sharded zarr (version 3) array per resolution, its blocks compressed one by one.

A block holds 32 voxels a side of one channel: blocks of one size whatever the number of channels, each of one kind of
values, which pack better than several side by side. Blocks of zeros alone are not stored. Any zarr library opens the
arrays; mim3d reads them with :mod:`mim3d.caching.shard_reader`.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.pyramid import levels_of
from mim3d.caching.shard_reader import METADATA, Layout
from mim3d.caching.stored_intensity import StoredIntensity


def write_image(path: str, stored_CXYZ: npt.NDArray[Any], lines: Sequence[StoredIntensity], num_levels: int) -> None:
    """Store an image as a group of arrays ``0``, ``1``, ...: full resolution, and each level half the one before.

    Args:
        path: The group's folder.
        stored_CXYZ: Integers.
        lines: What they mean in each channel; written beside them for other programs.
        num_levels: How many arrays.

    Raises:
        OSError: The disk is full or not writable.
    """
    write_group(path, {"stored_intensities": [asdict(line) for line in lines]})
    for level, image in enumerate(levels_of(stored_CXYZ, num_levels)):
        # Noise in 8 bits: LZ4 of single bits is the fastest to unpack. More bits: Zstandard packs much better.
        fast = image.dtype.itemsize == 1
        write_array(os.path.join(path, str(level)), image, _blosc("lz4", 9, "bitshuffle") if fast else None)


def write_group(path: str, attributes: dict[str, Any]) -> None:
    """Make a folder a zarr group.

    Raises:
        OSError: The disk is full or not writable.
    """
    os.makedirs(path, exist_ok=True)
    _write_metadata(path, {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_label(path: str, label_XYZ: npt.NDArray[Any]) -> None:
    """Store a label map as one array.

    Raises:
        OSError: The disk is full or not writable.
    """
    write_array(path, label_XYZ)


def write_array(path: str, array: npt.NDArray[Any], blosc: dict[str, Any] | None = None) -> None:
    """Store ``(X, Y, Z)`` or ``(C, X, Y, Z)`` integers as one array of one shard.

    Args:
        path: The array's folder.
        array: The voxels.
        blosc: Configuration of the compressor; Zstandard of shuffled bytes if not given.

    Raises:
        OSError: The disk is full or not writable.
    """
    layout = Layout(array.shape, array.dtype.name)
    blosc = blosc or _blosc("zstd", 3, "shuffle" if array.dtype.itemsize > 1 else "noshuffle")
    blosc = {"typesize": array.dtype.itemsize, **blosc}
    shard = os.path.join(path, *layout.shard_name.split("/"))
    os.makedirs(os.path.dirname(shard))
    _write_metadata(path, layout.described(blosc))
    _write_shard(shard, array, layout, blosc)


def _blosc(cname: str, clevel: int, shuffle: str) -> dict[str, Any]:
    return {"cname": cname, "clevel": clevel, "shuffle": shuffle, "blocksize": 0}


def _write_metadata(path: str, content: dict[str, Any]) -> None:
    with open(os.path.join(path, METADATA), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _write_shard(path: str, array: npt.NDArray[Any], layout: Layout, blosc: dict[str, Any]) -> None:
    from numcodecs import Blosc

    shuffle = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE, "bitshuffle": Blosc.BITSHUFFLE}
    codec = Blosc(blosc["cname"], blosc["clevel"], shuffle[blosc["shuffle"]], blosc["blocksize"])
    index = np.full((*layout.grid, 2), np.iinfo(np.uint64).max, dtype="<u8")
    position = 0
    with open(path, "wb") as file:
        for place in product(*(range(count) for count in layout.grid)):
            block = _block(array, layout, place)
            if not block.any():
                continue
            packed = _with_checksum(codec.encode(block))
            file.write(packed)
            index[place] = position, len(packed)
            position += len(packed)
        file.write(_with_checksum(index.tobytes()))


def _block(array: npt.NDArray[Any], layout: Layout, place: tuple[int, ...]) -> npt.NDArray[Any]:
    """One block, filled up with zeros where it reaches over the edge."""
    slices = tuple(slice(n * edge, (n + 1) * edge) for n, edge in zip(place, layout.block, strict=True))
    part = array[slices]
    if part.shape == layout.block:
        return np.ascontiguousarray(part, dtype=layout.dtype)
    block = np.zeros(layout.block, dtype=layout.dtype)
    block[tuple(slice(0, length) for length in part.shape)] = part
    return block


def _with_checksum(data: bytes) -> bytes:
    import google_crc32c

    return data + int(google_crc32c.value(data)).to_bytes(4, "little")
