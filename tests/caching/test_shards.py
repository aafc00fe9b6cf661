"""What is written is a standard zarr array, reads back the same crop by crop, and damage never reads as voxels."""

import json
import pickle
import struct
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mim3d.caching import shards
from mim3d.caching.layout import FileRange
from mim3d.caching.shards import ShardedArray, write_array
from mim3d.caching.stored_voxels import Shown, StoredIntensity, levels_of, write_image
from mim3d.core.errors import DataError

LINE = StoredIntensity(0.5, -3.0)
ALL = Shown(-(2**15), 2**15 - 1, 0)
SHARD = "c/0/0/0/0"


def noise(shape, dtype=np.uint8, seed=0):
    """Noise over a part of a type's range, with a block of zeros in the corner."""
    limits = np.iinfo(dtype)
    array = np.random.default_rng(seed).integers(limits.min, min(limits.max, 60000), shape).astype(dtype)
    array[..., :32, :32, :32] = 0
    return array


def image_at(path, image, num_levels=1):
    """The full resolution of an image written to a case folder."""
    write_image(str(path / "image"), image, [LINE] * len(image), num_levels, [ALL] * len(image))
    return ShardedArray(str(path), "image/0")


def crop_of(array, start, size):
    """A crop through the reader."""
    out = np.empty(size, dtype=array.layout.dtype)
    array.read_crops([(start, out)])
    return out


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32])
def test_zarr_opens_every_level_and_reads_the_same_voxels(tmp_path, dtype):
    image = noise((2, 70, 33, 40), dtype)
    image_at(tmp_path, image, num_levels=3)
    group = zarr.open_group(tmp_path / "image", mode="r")
    assert group.attrs["stored_intensities"] == [{"scale": 0.5, "offset": -3.0}] * 2
    for level, expected in enumerate(levels_of(image, 3, [ALL] * 2)):
        stored = group[str(level)]
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored[...], expected)
        np.testing.assert_array_equal(stored[1, 5:40, :20, 3:], expected[1, 5:40, :20, 3:])
        array = ShardedArray(str(tmp_path), f"image/{level}")
        np.testing.assert_array_equal(crop_of(array, (0, 0, 0, 0), expected.shape), expected)


def test_zarr_opens_a_label_map(tmp_path):
    label = noise((40, 35, 9), np.uint16)
    write_array(str(tmp_path / "label"), label)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "label", mode="r")[...], label)
    array = ShardedArray(str(tmp_path), "label")
    np.testing.assert_array_equal(crop_of(array, (3, 4, 5), (30, 30, 4)), label[3:33, 4:34, 5:9])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """An image and the array that holds it."""
    image = noise((2, 70, 65, 100))
    return image, image_at(tmp_path_factory.mktemp("written"), image)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), gap=st.sampled_from([0, 40_000, 10**9]))
def test_any_crop_is_the_arrays_own(written, data, gap):
    image, array = written
    start = [data.draw(st.integers(0, length - 1)) for length in image.shape]
    size = [data.draw(st.integers(1, length - first)) for first, length in zip(start, image.shape, strict=True)]
    expected = image[tuple(slice(first, first + length) for first, length in zip(start, size, strict=True))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "MAX_GAP_BYTES", gap)
        patch.setattr(shards, "MAX_READ_BYTES", max(gap, 1))
        np.testing.assert_array_equal(crop_of(array, start, size), expected)


def test_a_whole_block_and_a_view_of_a_larger_array_are_filled_alike(written):
    image, array = written
    np.testing.assert_array_equal(crop_of(array, (1, 32, 32, 64), (1, 32, 32, 32)), image[1:, 32:64, 32:64, 64:96])
    larger = np.full((2, 40, 40, 40), 7, np.uint8)
    array.read_crops([((0, 30, 20, 10), larger[:, 4:36, 4:36, 4:36])])
    np.testing.assert_array_equal(larger[:, 4:36, 4:36, 4:36], image[:, 30:62, 20:52, 10:42])
    larger[:, 4:36, 4:36, 4:36] = 7
    assert (larger == 7).all()


def test_neighbouring_blocks_are_read_at_once_and_distant_ones_are_not(written, monkeypatch):
    _, array = written
    reads = []
    monkeypatch.setattr(FileRange, "pread", _counted(FileRange.pread, reads))
    crop_of(array, (0, 32, 0, 0), (1, 32, 32, 100))
    assert len(reads) == 1
    reads.clear()
    monkeypatch.setattr(shards, "MAX_GAP_BYTES", 1000)
    crop_of(array, (0, 0, 0, 64), (2, 70, 10, 30))
    assert len(reads) == 6


def _counted(pread, reads):
    def counting(self, offset, length):
        reads.append((offset, length))
        return pread(self, offset, length)

    return counting


def test_threads_and_other_processes_read_the_same(written):
    image, array = written
    places = [(0, x, y, z) for x in range(0, 40, 8) for y in range(0, 32, 8) for z in range(0, 64, 16)]
    with ThreadPoolExecutor(8) as threads:
        crops = list(threads.map(lambda start: crop_of(array, start, (1, 30, 30, 30)), places * 2))
    for (_, x, y, z), crop in zip(places * 2, crops, strict=True):
        np.testing.assert_array_equal(crop[0], image[0, x : x + 30, y : y + 30, z : z + 30])
    again = pickle.loads(pickle.dumps(array))
    np.testing.assert_array_equal(crop_of(again, (0, 0, 0, 0), image.shape), image)


def test_arrays_are_read_from_ranges_of_a_larger_file(written, tmp_path):
    image, array = written
    parts, content = {}, b"before"
    for name in ("image/0/zarr.json", f"image/0/{SHARD}"):
        with open(f"{array.source}/{name}", "rb") as file:
            data = file.read()
        parts[name] = FileRange(str(tmp_path / "pack"), len(content), len(data))
        content += data + b"between"
    (tmp_path / "pack").write_bytes(content)
    packed = ShardedArray(parts, "image/0")
    np.testing.assert_array_equal(crop_of(packed, (0, 5, 6, 7), (2, 40, 40, 40)), image[:, 5:45, 6:46, 7:47])
    with pytest.raises(DataError, match="image/1"):
        crop_of(ShardedArray(parts, "image/1"), (0, 0, 0, 0), (1, 1, 1, 1))


def rewritten(path, position, change):
    """Replace the bytes of a file from ``position`` on (from its end where negative)."""
    data = bytearray(path.read_bytes())
    position %= len(data)
    new = change(bytes(data[position:]))
    path.write_bytes(bytes(data[:position]) + new)


def flipped(data):
    return bytes([data[0] ^ 1]) + data[1:]


DAMAGE = {
    "a byte of a block": (SHARD, lambda path: rewritten(path, 100, flipped), "checksum of a block"),
    "a byte of the index": (SHARD, lambda path: rewritten(path, -40, flipped), "checksum of its index"),
    "a truncated shard": (SHARD, lambda path: path.write_bytes(path.read_bytes()[:-500]), "checksum of its index"),
    "a shard of a few bytes": (SHARD, lambda path: path.write_bytes(b"x" * 20), "too few for the index"),
    "a missing shard": (SHARD, lambda path: path.unlink(), "No such file"),
    "missing metadata": ("zarr.json", lambda path: path.unlink(), "No such file"),
    "metadata cut off": ("zarr.json", lambda path: path.write_bytes(path.read_bytes()[:50]), "damaged"),
    "metadata of two megabytes": ("zarr.json", lambda path: path.write_bytes(b" " * 2**21), "bytes of metadata"),
    "metadata without end": ("zarr.json", lambda path: path.write_bytes(b"[" * 10**6), "damaged"),
    "a shape of strings": ("zarr.json", lambda path: with_shape(path, ["1", 40, 40, 40]), "shape"),
}


def with_shape(path, shape):
    """Write another shape into metadata, all that follows from it included."""
    content = json.loads(path.read_text())
    content["shape"] = shape
    blocks = [1, 32, 32, 32]
    if all(isinstance(size, int) for size in shape):
        padded = [-(-size // edge) * edge for size, edge in zip(shape, blocks, strict=True)]
        content["chunk_grid"]["configuration"]["chunk_shape"] = padded
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_one_sentence_with_file_and_remedy_and_heals_in_the_same_process(tmp_path, kind):
    image = noise((1, 40, 40, 40), seed=1) | 1
    array = image_at(tmp_path, image)
    name, damage, reason = DAMAGE[kind]
    sound = (tmp_path / "image" / "0" / name).read_bytes()
    damage(tmp_path / "image" / "0" / name)
    with pytest.raises(DataError, match=reason) as caught:
        crop_of(array, (0, 0, 0, 0), image.shape)
    assert str(tmp_path / "image" / "0" / name) in str(caught.value)
    assert f"delete {tmp_path} and run `mim3d cache` again" in str(caught.value)
    (tmp_path / "image" / "0" / name).write_bytes(sound)
    np.testing.assert_array_equal(crop_of(array, (0, 0, 0, 0), image.shape), image)


def test_damage_after_the_first_read_is_noticed(tmp_path):
    image = noise((1, 40, 40, 40), seed=1) | 1
    array = image_at(tmp_path, image)
    crop_of(array, (0, 0, 0, 0), image.shape)
    rewritten(tmp_path / "image" / "0" / SHARD, 100, flipped)
    with pytest.raises(DataError, match="checksum of a block"):
        crop_of(array, (0, 0, 0, 0), image.shape)


def test_sizes_that_cannot_be_are_refused_before_memory_is_taken(tmp_path):
    array = image_at(tmp_path, noise((1, 40, 40, 40)))
    with_shape(tmp_path / "image" / "0" / "zarr.json", [1, 2**40, 2**40, 2**40])
    with pytest.raises(DataError, match="too few for the index"):
        array.read_crops([((0, 0, 0, 0), np.empty((1, 1, 1, 1), np.uint8))])


@pytest.mark.parametrize("entry", [(2**63, 100), (0, 2**62), (10**6, 100), (0, 5), (2**64 - 1, 100)])
def test_an_index_with_a_right_checksum_and_wrong_places_is_refused(tmp_path, entry):
    array = image_at(tmp_path, noise((1, 20, 20, 20), seed=2) | 1)
    path = tmp_path / "image" / "0" / SHARD
    index = struct.pack("<QQ", *entry)
    rewritten(path, -20, lambda _: index + struct.pack("<I", google_crc32c.value(index)))
    with pytest.raises(DataError, match="places that cannot be"):
        crop_of(array, (0, 0, 0, 0), (1, 20, 20, 20))


def test_a_block_that_unpacks_to_another_size_is_refused(tmp_path):
    array = image_at(tmp_path, noise((1, 20, 20, 20), seed=2) | 1)
    path = tmp_path / "image" / "0" / SHARD
    data = path.read_bytes()
    block = data[:4] + struct.pack("<I", 2**30) + data[8:-24]
    path.write_bytes(block + struct.pack("<I", google_crc32c.value(block)) + data[-20:])
    with pytest.raises(DataError, match="another size"):
        crop_of(array, (0, 0, 0, 0), (1, 20, 20, 20))


@pytest.mark.parametrize(
    "options",
    [
        {"compressors": zarr.codecs.GzipCodec(), "shards": (1, 32, 32, 32)},
        {"compressors": zarr.codecs.BloscCodec(), "shards": (1, 32, 32, 32)},
        {"shards": None},
        {"dtype": "float32", "shards": (1, 32, 32, 32)},
    ],
)
def test_an_array_of_another_kind_is_one_clear_sentence(tmp_path, options):
    options = {"dtype": "uint8", **options}
    zarr.create_array(tmp_path / "image" / "0", shape=(1, 20, 20, 20), chunks=(1, 32, 32, 32), fill_value=0, **options)
    with pytest.raises(DataError, match="does not write and mim3d does not read; open it with zarr"):
        crop_of(ShardedArray(str(tmp_path), "image/0"), (0, 0, 0, 0), (1, 1, 1, 1))


def test_what_zarr_writes_in_the_same_layout_is_read_too(tmp_path):
    image = noise((2, 40, 33, 20))
    stored = zarr.create_array(
        tmp_path / "image" / "0",
        shape=image.shape,
        dtype=image.dtype,
        chunks=(1, 32, 32, 32),
        shards=(2, 64, 64, 32),
        compressors=[zarr.codecs.BloscCodec(cname="zstd"), zarr.codecs.Crc32cCodec()],
        fill_value=9,
    )
    stored[:, :, 2:] = image[:, :, 2:]
    np.testing.assert_array_equal(
        crop_of(ShardedArray(str(tmp_path), "image/0"), (0, 0, 0, 0), image.shape), stored[...]
    )
