"""The arrays of a cache: sharded zarr (version 3) arrays of one shard each, whose blocks are compressed one by one.

A block holds 32 voxels a side of one channel: all blocks have one size whatever the number of channels, and each holds
one kind of values, which compress better than several side by side. Blocks of zeros alone are not stored.

Any zarr library opens the arrays. mim3d reads a crop in a few reads, straight from the file: the blocks that the crop
touches are looked up in the shard's index, those that lie close together are read at once, and each is compared with
its checksum and unpacked into its place. zarr-python is several times slower: it plans, locks and copies per block.

Reading is safe in threads, forked and spawned processes: an array holds no open file and no position in one.
"""

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.layout import METADATA, ByteSource, FileRange, PackedCase, forget_open_files, open_bytes
from mim3d.core.errors import DamagedError

#: Edge of a block along X, Y and Z.
BLOCK = 32
#: Blocks with at most this many bytes between them are read at once: reading them costs less than another access.
MAX_GAP_BYTES = 128 * 1024
#: One read is at most about this long, so that reading a whole scan does not hold it twice.
MAX_READ_BYTES = 8 * 2**20
#: What Blosc adds to a block that it cannot make smaller.
BLOSC_OVERHEAD_BYTES = 16
CHECKSUM_BYTES = 4
#: Arrays of which each process remembers metadata and index: some 30 KB each.
_MAX_REMEMBERED = 128
_MAX_METADATA_BYTES = 2**20
_ABSENT = np.iinfo(np.uint64).max
_TYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "int16", "uint16", "int32", "uint32")}

#: First voxel along each axis, and the array that is to be filled from there on.
ArrayCrop = tuple[Sequence[int], npt.NDArray[Any]]

#: Offset and length of a stored block in the shard.
_Entry = tuple[int, int]


@dataclass(frozen=True)
class ArrayLayout:
    """Shape and type of an array, from which everything else about it follows.

    Attributes:
        shape: Voxels as ``(X, Y, Z)``, or as ``(C, X, Y, Z)`` with blocks of one channel each.
        type_name: Name of the integer type of its voxels.
        fill_value: Value of the voxels in blocks that are not stored.
    """

    shape: tuple[int, ...]
    type_name: str
    fill_value: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the voxels, lowest byte first."""
        return _TYPES[self.type_name]

    @property
    def block(self) -> tuple[int, ...]:
        """Shape of a block."""
        return (1,) * (len(self.shape) - 3) + (BLOCK,) * 3

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of blocks along each axis."""
        return tuple(-(-size // edge) for size, edge in zip(self.shape, self.block, strict=True))

    @property
    def shard_name(self) -> str:
        """Name of the only shard below the array's folder."""
        return "/".join(["c", *["0"] * len(self.shape)])

    def metadata(self, blosc: dict[str, Any]) -> dict[str, Any]:
        """The array's zarr metadata, with the configuration of its compressor.

        The metadata of an array that is read is compared with this, in everything that decides how a crop is read.
        """
        endian: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
        shard = [count * edge for count, edge in zip(self.grid, self.block, strict=True)]
        inner = [endian if self.dtype.itemsize > 1 else {"name": "bytes"}, {"name": "blosc", "configuration": blosc}]
        sharding = {
            "chunk_shape": list(self.block),
            "codecs": [*inner, {"name": "crc32c"}],
            "index_codecs": [endian, {"name": "crc32c"}],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.type_name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": self.fill_value,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }


def write_group(path: str, attributes: dict[str, Any]) -> None:
    """Make a folder a zarr group.

    Raises:
        OSError: The disk is full or not writable.
    """
    os.makedirs(path, exist_ok=True)
    _write_metadata(path, {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_array(path: str, array: npt.NDArray[Any], *, fast: bool = False) -> None:
    """Store integers as one array of one shard.

    Args:
        path: Folder of the array.
        array: Voxels as ``(X, Y, Z)`` or ``(C, X, Y, Z)``.
        fast: Compress with LZ4 after a shuffle of bits, which is the fastest to unpack and does well for noise in 8
            bits. Otherwise Zstandard after a shuffle of bytes, which makes anything else much smaller.

    Raises:
        OSError: The disk is full or not writable.
    """
    from numcodecs import Blosc

    itemsize = array.dtype.itemsize
    cname, clevel, shuffle = (
        ("lz4", 9, "bitshuffle") if fast else ("zstd", 3, "shuffle" if itemsize > 1 else "noshuffle")
    )
    layout = ArrayLayout(array.shape, array.dtype.name)
    shard = os.path.join(path, *layout.shard_name.split("/"))
    os.makedirs(os.path.dirname(shard))
    blosc = {"typesize": itemsize, "cname": cname, "clevel": clevel, "shuffle": shuffle, "blocksize": 0}
    _write_metadata(path, layout.metadata(blosc))
    codec = Blosc(cname, clevel, getattr(Blosc, shuffle.upper()), 0)
    index = np.full((*layout.grid, 2), _ABSENT, dtype="<u8")
    position = 0
    with open(shard, "wb") as file:
        for place in product(*(range(count) for count in layout.grid)):
            # Filled up with zeros where the block reaches over the edge.
            block = np.zeros(layout.block, dtype=layout.dtype)
            part = array[tuple(slice(n * edge, (n + 1) * edge) for n, edge in zip(place, layout.block, strict=True))]
            block[tuple(slice(length) for length in part.shape)] = part
            if not block.any():
                continue
            packed: bytes = codec.encode(block)
            packed += _checksum(packed)
            file.write(packed)
            index[place] = position, len(packed)
            position += len(packed)
        entries = index.tobytes()
        file.write(entries + _checksum(entries))


def _write_metadata(path: str, content: dict[str, Any]) -> None:
    with open(os.path.join(path, METADATA), "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)


def _checksum(data: bytes) -> bytes:
    import google_crc32c

    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


@dataclass(frozen=True)
class ShardedArray:
    """One array of a case to read from; opened at the first read, cheap to pickle.

    Attributes:
        source: Where the files of the case lie.
        name: Folder of the array inside the case.
    """

    source: ByteSource
    name: str

    @property
    def layout(self) -> ArrayLayout:
        """Shape and type.

        Raises:
            DamagedError: The metadata are missing, damaged, or not of the kind that the cache writes.
        """
        try:
            return _layout_of(open_bytes(self.source, f"{self.name}/{METADATA}"))
        except _OtherKind as error:
            raise DamagedError(
                f"{self._where(METADATA)}: {error}, which the cache does not write and mim3d does not read; open it "
                "with zarr."
            ) from error
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damage(METADATA, error) from error

    def read_crops(self, crops: Sequence[ArrayCrop]) -> None:
        """Fill crops; their voxels outside the array are left as they are. Blocks that several share are read once.

        Args:
            crops: First voxel along each axis of the array, and the array to fill. That has as many axes, is of the
                same type, and may be a view.

        Raises:
            DamagedError: The array is missing or damaged.
        """
        layout = self.layout
        try:
            shard = open_bytes(self.source, f"{self.name}/{layout.shard_name}")
            index = _index_of(shard, layout)
            places: dict[_Entry, list[tuple[npt.NDArray[Any], tuple[slice, ...]]]] = defaultdict(list)
            for start, out in crops:
                for entry, target, source in _touched(layout, index, start, out.shape):
                    if entry[1] < 0:
                        out[target] = layout.fill_value
                    else:
                        places[entry].append((out[target], source))
            scratch = np.empty(layout.block, dtype=layout.dtype)
            runs = list(_runs(places))
            for first, last, _ in runs:
                # A disk that is asked for all of them at once answers in little more than the time of one.
                shard.will_need(first, last - first)
            for first, last, entries in runs:
                data = shard.pread(first, last - first)
                for offset, length in entries:
                    packed = data[offset - first : offset - first + length]
                    wanted = places[offset, length]
                    place = wanted[0][0]
                    if len(wanted) == 1 and place.shape == scratch.shape and place.flags.c_contiguous:
                        _unpack(packed, place)
                        continue
                    _unpack(packed, scratch)
                    for place, source in wanted:
                        place[...] = scratch[source]
        except (OSError, ValueError, RuntimeError) as error:
            raise self._damage(layout.shard_name, error) from error

    def will_need(self, boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> None:
        """Let the disk begin with what is read soon, where the system can; nothing is waited for.

        An array that is missing or damaged raises an error only when it is read.

        Args:
            boxes: First voxel and number of voxels along each axis; may reach outside the array.
        """
        try:
            layout = self.layout
            shard = open_bytes(self.source, f"{self.name}/{layout.shard_name}")
            index = _index_of(shard, layout)
            entries = {entry for box in boxes for entry, _, _ in _touched(layout, index, *box)}
            for first, last, _ in _runs(entry for entry in entries if entry[1] >= 0):
                shard.will_need(first, last - first)
        except (OSError, ValueError, DamagedError):
            return

    def _where(self, name: str) -> str:
        try:
            return open_bytes(self.source, f"{self.name}/{name}").path
        except OSError:
            return self.source.path if isinstance(self.source, PackedCase) else f"{self.name}/{name}"

    def _damage(self, name: str, error: Exception) -> DamagedError:
        # Once the file has been replaced, this process must see the new one.
        for remembered in (_layout_of, _index_of):
            remembered.cache_clear()
        forget_open_files()
        reason = getattr(error, "strerror", None) or str(error)
        at_fault = self.source if isinstance(self.source, str) else self._where(name)
        return DamagedError(
            f"{self._where(name)}: missing or damaged ({reason}); delete {at_fault} and run `mim3d cache` again."
        )


class _OtherKind(Exception):
    """An array that is sound, but not of the kind that the cache writes."""


@lru_cache(maxsize=_MAX_REMEMBERED)
def _layout_of(metadata: FileRange) -> ArrayLayout:
    size = metadata.size
    if size > _MAX_METADATA_BYTES:
        raise ValueError(f"{size} bytes of metadata")
    found = json.loads(metadata.pread(0, size))
    shape, type_name, fill_value = tuple(found["shape"]), found["data_type"], found["fill_value"]
    if found["zarr_format"] != 3 or found["node_type"] != "array":
        raise _OtherKind(f"zarr_format {found['zarr_format']!r}, node_type {found['node_type']!r}")
    if type_name not in _TYPES:
        raise _OtherKind(f"voxels of type {type_name!r}")
    if len(shape) not in (3, 4) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"shape {list(shape)}")
    limits = np.iinfo(_TYPES[type_name])
    if type(fill_value) is not int or not limits.min <= fill_value <= limits.max:
        raise ValueError(f"fill_value {fill_value!r}")
    layout = ArrayLayout(shape, type_name, fill_value)
    wanted = layout.metadata(_blosc_of(found["codecs"]))
    for key in ("chunk_grid", "chunk_key_encoding", "codecs"):
        if found[key] != wanted[key]:
            raise _OtherKind(f"{key} {json.dumps(found[key])}")
    if found.get("storage_transformers"):
        raise _OtherKind("storage_transformers")
    return layout


def _blosc_of(codecs: Any) -> dict[str, Any]:
    """Configuration of the compressor. Any will do, as each block says itself how it is unpacked."""
    try:
        found = codecs[0]["configuration"]["codecs"][1]
        return dict(found["configuration"]) if found["name"] == "blosc" else {}
    except (LookupError, TypeError, ValueError):
        return {}


@lru_cache(maxsize=_MAX_REMEMBERED)
def _index_of(shard: FileRange, layout: ArrayLayout) -> npt.NDArray[np.int64]:
    """Offset and length of every block, ``(*grid, 2)``; a length of -1 for blocks that are not stored."""
    num_blocks = math.prod(layout.grid)
    index_bytes = 16 * num_blocks + CHECKSUM_BYTES
    end = shard.size - index_bytes
    if end < 0:
        raise ValueError(f"{shard.size} bytes, too few for the index of its {num_blocks} blocks")
    data = shard.pread(end, index_bytes)
    if _checksum(data[:-CHECKSUM_BYTES]) != data[-CHECKSUM_BYTES:]:
        raise ValueError("the checksum of its index is wrong")
    entries = np.frombuffer(data, dtype="<u8", count=2 * num_blocks).reshape(-1, 2)
    offsets, lengths = entries.T
    stored = (offsets != _ABSENT) | (lengths != _ABSENT)
    shortest = BLOSC_OVERHEAD_BYTES + CHECKSUM_BYTES
    longest = shortest + math.prod(layout.block) * layout.dtype.itemsize
    # Compared without a sum, which could wrap around.
    possible = (lengths >= shortest) & (lengths <= longest) & (offsets <= end) & (lengths <= end - offsets)
    if not possible[stored].all():
        raise ValueError("its index points at places that cannot be")
    index = np.where(stored[:, None], entries, _ABSENT).astype(np.int64)
    return index.reshape(*layout.grid, 2)


def _touched(
    layout: ArrayLayout, index: npt.NDArray[np.int64], start: Sequence[int], size: Sequence[int]
) -> Iterator[tuple[_Entry, tuple[slice, ...], tuple[slice, ...]]]:
    """Each block that a crop touches, where its voxels go in the crop, and which of the block they are."""
    blocks, targets, sources = [], [], []
    for first, length, limit, edge in zip(start, size, layout.shape, layout.block, strict=True):
        begin, end = max(first, 0), min(first + length, limit)
        numbers = range(begin // edge, -(-end // edge)) if begin < end else range(0)
        blocks.append(slice(numbers.start, numbers.stop))
        bounds = [(max(n * edge, begin), min((n + 1) * edge, end)) for n in numbers]
        targets.append([slice(low - first, high - first) for low, high in bounds])
        sources.append([slice(low - n * edge, high - n * edge) for n, (low, high) in zip(numbers, bounds, strict=True)])
    entries = [(offset, length) for offset, length in index[tuple(blocks)].reshape(-1, 2).tolist()]
    return zip(entries, product(*targets), product(*sources), strict=True)


def _runs(entries: Iterable[_Entry]) -> Iterator[tuple[int, int, list[_Entry]]]:
    """First byte of each read, the byte behind its last, and the blocks in it."""
    run: list[_Entry] = []
    first = last = 0
    for offset, length in sorted(entries):
        if run and (offset - last > MAX_GAP_BYTES or offset + length - first > MAX_READ_BYTES):
            yield first, last, run
            run = []
        if not run:
            first = last = offset
        run.append((offset, length))
        last = max(last, offset + length)
    if run:
        yield first, last, run


def _unpack(packed: bytes, place: npt.NDArray[Any]) -> None:
    """Unpack a block into a contiguous array of its size."""
    from numcodecs import blosc

    payload = packed[:-CHECKSUM_BYTES]
    if _checksum(payload) != packed[-CHECKSUM_BYTES:]:
        raise ValueError("the checksum of a block is wrong")
    unpacked_bytes, packed_bytes = (int.from_bytes(payload[at : at + 4], "little") for at in (4, 12))
    if unpacked_bytes != place.nbytes or packed_bytes != len(payload):
        raise ValueError("a block has another size than it should")
    blosc.decompress(payload, place)
