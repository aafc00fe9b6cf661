"""Packs hold the same cases in a few large files, and the manifest says where."""

import os
import pickle
import zipfile

import numpy as np
import pyarrow.parquet as pq
import pytest

from mim3d.caching.cache import open_cache
from mim3d.caching.layout import pack_plan
from mim3d.core.errors import ConfigError, DamagedError, DataError
from tests.caching.test_cache import built, make_set, tree

#: About two cases of ``make_set``, in GB.
TWO_CASES = 2.5e-5


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A data set of five, cached in folders and in packs."""
    folder = tmp_path_factory.mktemp("packed")
    data = make_set(folder / "data", num_cases=5)
    return data, built(data, folder / "folders"), built(data, folder / "packs", pack_gb=TWO_CASES)


def packs_of(cache):
    """Paths of the packs of a cache."""
    folder = os.path.join(cache.path, "packs")
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def test_packed_cases_are_read_like_those_in_folders(packed):
    _, folders, packs = packed
    assert len(packs_of(packs)) == 3
    assert os.listdir(os.path.join(packs.path, "cases")) == []
    assert packs.digest == folders.digest
    for one, other in zip(folders, packs, strict=True):
        other = pickle.loads(pickle.dumps(other))
        assert (one.case, one.shape, one.statistics) == (other.case, other.shape, other.statistics)
        for level in range(3):
            shape = one.level_shapes[level]
            np.testing.assert_array_equal(one.read((-1, 2, 0), shape, level), other.read((-1, 2, 0), shape, level))
        np.testing.assert_array_equal(one.read_label((0, 0, 0), one.shape), other.read_label((0, 0, 0), one.shape))
        assert one.class_locations.keys() == other.class_locations.keys()
        np.testing.assert_array_equal(one.class_locations[1], other.class_locations[1])


def test_a_pack_is_a_stored_zip_that_zarr_opens(packed):
    zarr = pytest.importorskip("zarr")
    packs = packed[2]
    found = 0
    for path in packs_of(packs):
        with zipfile.ZipFile(path) as pack:
            members = pack.infolist()
            assert {(m.compress_type, m.date_time) for m in members} == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))}
            assert pack.testzip() is None
        store = zarr.storage.ZipStore(path, mode="r")
        group = zarr.open_group(store, mode="r")
        for folder in {member.filename.split("/")[0] for member in members} - {"zarr.json"}:
            scan = next(scan for scan in packs if folder in f"{scan.case.id}.{scan.digest[:16]}")
            np.testing.assert_array_equal(group[f"{folder}/image/1"][:], scan.read((0, 0, 0), scan.level_shapes[1], 1))
            found += 1
        store.close()
    assert found == 5


def test_cases_are_packed_in_the_order_of_their_digests_until_a_pack_is_full(packed):
    rows = pq.read_table(os.path.join(packed[2].path, "manifest.parquet")).to_pylist()
    in_order = sorted(rows, key=lambda row: row["digest"])
    assert [len({row["pack"] for row in in_order[:2]}), in_order[1]["pack"] == in_order[2]["pack"]] == [1, False]
    plan = pack_plan({"a": 5, "b": 5, "c": 1, "d": 30, "e": 1}, 10)
    assert list(plan.values()) == [("a", "b"), ("c", "d"), ("e",)]


def test_the_same_scans_make_the_same_packs_whatever_way_they_came(packed, tmp_path):
    data, _, packs = packed
    later = built(data, tmp_path / "cache")
    assert not os.path.exists(tmp_path / "cache" / "packs")
    later = built(data, tmp_path / "cache", pack_gb=TWO_CASES, num_workers=2)
    assert tree(later.path) == tree(packs.path)
    times = {path: os.stat(path).st_mtime_ns for path in packs_of(later)}
    again = built(data, tmp_path / "cache")
    assert {path: os.stat(path).st_mtime_ns for path in packs_of(again)} == times
    assert tree(again.path) == tree(packs.path)


def test_scans_that_come_and_go_leave_only_the_packs_of_a_new_build(packed, tmp_path):
    data = make_set(tmp_path / "data", num_cases=5)
    first = min(packed[1], key=lambda scan: scan.digest).case.id
    for kind in ("images", "labels"):
        (data / kind / f"{first}.nii.gz").unlink()
    before = packs_of(built(data, tmp_path / "cache", pack_gb=TWO_CASES))
    make_set(data, num_cases=5)
    grown = built(data, tmp_path / "cache")
    assert [os.path.basename(path) for path in packs_of(grown)] == list(map(os.path.basename, packs_of(packed[2])))
    assert not set(before) & set(packs_of(grown))
    for kind in ("images", "labels"):
        (data / kind / f"{first}.nii.gz").unlink()
    assert packs_of(built(data, tmp_path / "cache")) == before


def test_a_flipped_byte_in_a_pack_is_found_and_named_and_the_pack_can_be_made_again(packed, tmp_path):
    data = packed[0]
    cache = built(data, tmp_path / "cache", pack_gb=TWO_CASES)
    whole = tree(cache.path)
    scan = cache[0]
    shard = scan.source["image/0/c/0/0/0/0"]
    with open(shard.path, "r+b") as file:
        file.seek(shard.offset + 100)
        byte = file.read(1)[0]
        file.seek(shard.offset + 100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedError, match=f"{os.path.basename(shard.path)}: .*checksum"):
        scan.read((0, 0, 0), scan.shape)
    os.remove(shard.path)
    with pytest.raises(DamagedError, match="No such file"):
        open_cache(cache.path)[0].read((0, 0, 0), scan.shape)
    built(data, tmp_path / "cache")
    assert tree(cache.path) == whole


def test_a_truncated_pack_is_found_and_named_and_made_again(packed, tmp_path):
    data = packed[0]
    cache = built(data, tmp_path / "cache", pack_gb=TWO_CASES)
    whole = tree(cache.path)
    path = packs_of(cache)[1]
    os.truncate(path, os.path.getsize(path) // 2)
    reads = []
    for scan in open_cache(cache.path):
        try:
            scan.read((0, 0, 0), scan.shape)
            reads.append("sound")
        except DamagedError as error:
            assert path in str(error)
            reads.append("damaged")
    assert sorted(set(reads)) == ["damaged", "sound"]
    with pytest.warns(UserWarning, match="damaged .* its cases are made again"):
        built(data, tmp_path / "cache")
    assert tree(cache.path) == whole


@pytest.mark.parametrize(("column", "value"), [("pack", "../packs/x.zip"), ("pack", "/etc/x.zip"), ("folder", "..")])
def test_a_manifest_that_points_outside_its_folder_is_refused(packed, tmp_path, column, value):
    import pyarrow as pa

    cache = built(packed[0], tmp_path / "cache", pack_gb=TWO_CASES if column == "pack" else None)
    path = os.path.join(cache.path, "manifest.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1][column] = value
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(DataError, match=f"points at '{value}', outside the cache's folder"):
        open_cache(cache.path)


def test_ranges_that_reach_beyond_a_pack_are_damage(packed, tmp_path):
    import pyarrow as pa

    cache = built(packed[0], tmp_path / "cache", pack_gb=TWO_CASES)
    path = os.path.join(cache.path, "manifest.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    for member in rows[0]["members"]:
        member["offset"] += 10**9
    rows[1]["members"] = []
    rows[2]["members"][0]["offset"] = -1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(DataError, match=r"manifest\.parquet: the row of case .*negative or too large places"):
        open_cache(cache.path)
    rows[2]["members"][0]["offset"] = 0
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    for scan in list(open_cache(cache.path))[:2]:
        with pytest.raises(DamagedError):
            scan.read((0, 0, 0), scan.shape)


def test_the_manifest_is_a_table_that_other_programs_read(packed):
    cache = packed[2]
    table = pq.read_table(os.path.join(cache.path, "manifest.parquet"))
    columns = "id patient source_digest shape spacing_mm statistics stored_intensities pack members"
    assert set(columns.split()) <= set(table.column_names)
    row = table.to_pylist()[0]
    assert row["shape"] == [40, 36, 9]
    assert row["size_bytes"] == cache[0].size_bytes == sum(member["length"] for member in row["members"])
    assert cache.fingerprints() == dict(zip(table["id"].to_pylist(), table["fingerprint"].to_pylist(), strict=True))


def test_a_pack_of_no_size_is_refused(packed, tmp_path):
    with pytest.raises(ConfigError, match="pack_gb 0 must be above 0"):
        built(packed[0], tmp_path / "cache", pack_gb=0)
