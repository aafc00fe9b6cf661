"""A cache that somebody else has written, or changed, is used or refused in one sentence; it never harms."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache, open_cache, read_columns
from mim3d.caching.fingerprints import Fingerprint
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import DamagedError, DataError
from mim3d.datasets.cases import CaseSet, read_cases
from tests.caching.test_cache import built, make_set
from tests.hostile_values import bounded, outcome, places, values_at, with_value, without

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A data set of one case, its cache, and its cache in a pack."""
    folder = tmp_path_factory.mktemp("sound")
    data = make_set(folder / "data", num_cases=1)
    built(data, folder / "cache")
    built(data, folder / "packed", pack_gb=1)
    return data, folder / "cache", folder / "packed"


@pytest.fixture(params=["cache", "packed"])
def cache(sound: tuple[Path, Path, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the cache, which may be spoiled."""
    return Path(shutil.copytree(sound[1 if request.param == "cache" else 2], tmp_path / request.param))


def rewritten(cache: Path, row: dict, **labels: object) -> bool:
    """Write a manifest of one row, whatever types its values have; False where Parquet cannot hold them."""
    path = cache / "manifest.parquet"
    metadata = {**pq.read_schema(path).metadata, **{name.encode(): json.dumps(value) for name, value in labels.items()}}
    try:
        table = pa.Table.from_pylist([row])
        pq.write_table(table.replace_schema_metadata(metadata), path)
    except (pa.ArrowException, OverflowError, TypeError, ValueError, UnicodeError):
        return False
    return True


def use(path: Path) -> None:
    """All that commands do with a cache, but for training."""
    cache: Cache = open_cache(path)
    assert len(cache.digest) == 64 and cache.size_bytes >= 0 and cache.source_bytes >= 0
    for scan in cache:
        assert os.path.dirname(os.path.join("out", f"{scan.case.id}.nii.gz")) == "out"
        for level in range(len(scan.level_shapes)):
            scan.to_values(scan.read((-1, 0, 0), (4, 4, 4), level))
        scan.foreground_ratio((0, 0, 0), (8, 8, 8))
        if scan.has_label:
            scan.read_label((0, 0, 0), (4, 4, 4))
        assert all(places.shape[1] == 3 for places in scan.class_locations.values())
        np.linalg.inv(scan.affine)
    for text in cache.fingerprints().values():
        Fingerprint.from_text(text)


@pytest.mark.parametrize("every", [19, pytest.param(1, marks=pytest.mark.slow)])
def test_every_value_of_a_manifest_may_be_anything(cache: Path, every: int) -> None:
    path = cache / "manifest.parquet"
    good = path.read_bytes()
    (row,) = pq.read_table(path).to_pylist()
    use(cache)
    wrong, num_tried = [], 0
    # The order of a scan's values in one list says nothing new.
    tried = [place for place in places(row) if not any(type(key) is int and key > 0 for key in place)]
    for number, place in enumerate(tried):
        several = [(value, with_value(row, place, value)) for value in values_at(number, every)]
        for value, hostile in [*several, ("nothing", without(row, place))]:
            if rewritten(cache, hostile):
                num_tried += 1
                found = outcome(lambda: use(cache), names=str(cache))
                if found is not None:
                    wrong.append(f"{'.'.join(map(str, place))} = {str(value)[:60]}: {found}")
            path.write_bytes(good)
    assert num_tried > 60
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", ["labels", "declared", "remarks"])
def test_what_a_manifest_says_of_its_set_may_be_anything(
    sound: tuple[Path, Path, Path], tmp_path: Path, name: str
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (row,) = pq.read_table(cache / "manifest.parquet").to_pylist()
    declared = {"ignore_label": 3, "regions": {"all": [1, 2]}, "region_values": [1], "channels": ["CT"], "notes": ["a"]}
    good = {"labels": {"1": "a", "2": "b"}, "declared": declared, "remarks": [{"text": "a", "refused": False}]}
    assert rewritten(cache, row, **good)
    use(cache)
    wrong = []
    for number, place in enumerate(places({name: good[name]})):
        for value in values_at(number, 6):
            assert rewritten(cache, row, **with_value(good, place, value))
            found = outcome(lambda: open_cache(cache), names="manifest.parquet")
            if found is not None:
                wrong.append(f"{'.'.join(map(str, place))} = {str(value)[:60]}: {found}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("name", ["cache.json", "card.json", "digests.json"])
@pytest.mark.parametrize("every", [38, pytest.param(1, marks=pytest.mark.slow)])
def test_every_value_of_the_other_files_may_be_anything(
    sound: tuple[Path, Path, Path], tmp_path: Path, name: str, every: int
) -> None:
    cases: CaseSet = read_cases(sound[0])
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (path,) = cache.rglob(name) if name != "card.json" else cache.glob("cases/*/card.json")
    content = json.loads(path.read_text())
    good = path.read_bytes()

    def act() -> None:
        use(cache)
        build_cache(cases, cache, Preprocessing(), num_workers=0)

    wrong = []
    tried = [place for place in places(content) if not any(type(key) is int and key > 0 for key in place)]
    for number, place in enumerate(tried):
        several = [with_value(content, place, value) for value in values_at(number, every)]
        for hostile in [*several, without(content, place)]:
            path.write_text(json.dumps(hostile))
            found = outcome(act, names=str(cache))
            if found is not None:
                wrong.append(f"{'.'.join(map(str, place))}: {found}")
            path.write_bytes(good)
            if not (cache / "manifest.parquet").exists():
                build_cache(cases, cache, Preprocessing(), num_workers=0)
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("num_levels", 10**9, "num_levels is 1000000000, but it must be from 1 to 8"),
        (
            "id",
            "../../outside",
            r"id is '\.\./\.\./outside', but it must be a name that can be that of a file, and no path",
        ),
        ("id", "/etc/passwd", "no path"),
        ("id", "..", "no path"),
        ("id", "a\\b", "no path"),
        ("images", [], "images is .*, but it must be the path of each image"),
        ("split", "everything", "split is 'everything', but it must be null, or one of train, val, test"),
        (
            "spacing_mm",
            [1.0, float("nan"), 1.0],
            "spacing_mm is .*nan.*, but it must be three numbers of millimetres above 0",
        ),
        ("affine", [0.0] * 16, "affine is .*, but it must be 16 numbers whose axes are as long as spacing_mm says"),
        ("affine", [float("inf")] * 16, "affine is "),
        (
            "shape",
            [2**31, 2**31, 2**31],
            "shape is .2147483648, 2147483648, 2147483648., but it must be three whole numbers",
        ),
        ("shape", [20, 36, 9], "body_box is "),
        ("num_channels", 2, "statistics is .*, but it must be the statistics of each channel"),
        ("dtype", "object", "dtype is 'object', but it must be one of uint8, int16"),
        ("scanner", "x" * 10_000, "scanner is .*, but it must be null or a short text"),
        ("digest", "abc", "digest is 'abc', but it must be a SHA-256 of 64 digits"),
        ("body_box", [0, 0, 0, 41, 36, 9], "body_box is .*, but it must be a box of one voxel or more inside the scan"),
        ("num_voxels", [{"value": 70000, "count": 1}], "num_voxels is .*, but it must be label values from 0 to 65535"),
        (
            "stored_intensities",
            [{"scale": 0.0, "offset": 0.0}],
            "stored_intensities is .*, but it must be a scale above 0",
        ),
        ("foreground", "eJw=", "the row of case 'c0' cannot be used"),
    ],
)
def test_a_refusal_names_the_manifest_the_case_and_the_value(
    sound: tuple[Path, Path, Path], tmp_path: Path, entry: str, value: object, said: str
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (row,) = pq.read_table(cache / "manifest.parquet").to_pylist()
    assert rewritten(cache, {**row, entry: value})
    with bounded(), pytest.raises(DataError, match=said) as refused:
        open_cache(cache)
    assert str(cache / "manifest.parquet: the row of case ") in str(refused.value)


def test_a_shape_that_is_not_that_of_the_stored_voxels_is_damage(cache: Path) -> None:
    (row,) = pq.read_table(cache / "manifest.parquet").to_pylist()
    assert rewritten(cache, {**row, "shape": [40, 36, 10]})
    (scan,) = open_cache(cache)
    with pytest.raises(DamagedError, match=r"holds \(1, 40, 36, 9\) voxels where its card says \(1, 40, 36, 10\)"):
        scan.read((0, 0, 0), (4, 4, 4))


def test_two_rows_of_one_id_and_a_million_equal_rows_are_refused(
    sound: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    table = pq.read_table(cache / "manifest.parquet")
    pq.write_table(pa.concat_tables([table, table]), cache / "manifest.parquet")
    with pytest.raises(DataError, match="two rows have one id"):
        open_cache(cache)
    many = pa.table({name: pa.repeat(table[name][0], 50_000) for name in ("id", "fingerprint")})
    with pq.ParquetWriter(cache / "manifest.parquet", many.schema) as writer:
        for _ in range(4):
            writer.write_table(many)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mim3d.caching.cache.available_memory_bytes", lambda: 2**28)
        with pytest.raises(DataError, match=r"unpacks to more than the memory available .* with its 200000 rows"):
            open_cache(cache).fingerprints()


@pytest.mark.parametrize(
    "rows",
    [
        np.full((4, 10), 50, dtype=np.int32),
        np.full((4, 10), -1, dtype=np.int32),
        np.zeros((4, 10), dtype=np.float32),
        np.zeros((3, 10), dtype=np.int32),
        np.zeros((), dtype=np.int32),
        np.zeros((4, 10**7), dtype=np.int32),
    ],
    ids=["beyond the scan", "negative", "no whole numbers", "three columns", "no axes", "too many"],
)
def test_places_of_labels_that_cannot_be_are_damage(
    sound: tuple[Path, Path, Path], tmp_path: Path, rows: np.ndarray
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (path,) = cache.glob("cases/*/locations.npz")
    np.savez_compressed(path, rows=rows)
    (scan,) = open_cache(cache)
    with bounded(), pytest.raises(DamagedError, match=r"its locations\.npz is missing or damaged"):
        _ = scan.class_locations


def test_places_whose_header_promises_more_than_there_is_are_damage(
    sound: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (path,) = cache.glob("cases/*/locations.npz")
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<i4", "fortran_order": False, "shape": (4, 10**12)})
    with zipfile.ZipFile(path, "w") as members:
        members.writestr("rows.npy", content.getvalue())
    (scan,) = open_cache(cache)
    with bounded(), pytest.raises(DamagedError, match=r"its locations\.npz is missing or damaged"):
        _ = scan.class_locations


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "\x00", '{"format": "mim3d-cache"'])
def test_settings_that_are_no_json_make_no_cache(sound: tuple[Path, Path, Path], tmp_path: Path, text: str) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (cache / "cache.json").write_text(text)
    with pytest.raises(DataError, match=r"cache\.json: missing or damaged .* run `mim3d cache` again"):
        open_cache(cache)
    # As the sentence says.
    assert len(build_cache(read_cases(sound[0]), cache, Preprocessing(), num_workers=0)) == len(open_cache(sound[1]))


@pytest.mark.parametrize("name", ["cache.json", "manifest.parquet", "failed.csv"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(cache: Path, name: str) -> None:
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(DataError, match=str(cache)):
        open_cache(cache)


def test_an_ignored_value_that_an_older_cache_counts_among_its_labels_is_ignored(
    sound: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(sound[1], tmp_path / "cache"))
    (row,) = pq.read_table(cache / "manifest.parquet").to_pylist()
    assert rewritten(cache, row, labels={"0": "background", "1": "a", "3": "Ignore"}, declared={})
    opened = open_cache(cache)
    assert (opened.labels, opened.ignore_label) == ({0: "background", 1: "a"}, 3)


@pytest.mark.parametrize("name", ["cases", "packs", "cases/other"])
def test_a_build_removes_nothing_behind_a_link(tmp_path: Path, name: str) -> None:
    data, out, theirs = tmp_path / "data", tmp_path / "cache", tmp_path / "theirs"
    make_set(data, num_cases=1)
    built(data, out)
    (theirs / "run").mkdir(parents=True)
    (theirs / "card.json").write_text("{}")
    (theirs / "run" / "card.json").write_text("{}")
    (out / "manifest.parquet").unlink()
    if name == "cases":
        shutil.rmtree(out / name)
    (out / name).symlink_to(theirs)
    if name == "cases/other":
        built(data, out)
        assert not (out / name).is_symlink()
    else:
        with pytest.raises(DataError, match=f"{name}: is a link"):
            built(data, out)
    assert (theirs / "card.json").exists() and (theirs / "run" / "card.json").exists()


def test_a_flipped_byte_among_the_values_of_a_manifest_is_found(cache: Path) -> None:
    path = cache / "manifest.parquet"
    sound, whole = read_columns(str(cache), ["id", "shape"]), path.read_bytes()
    chunks = pq.ParquetFile(path).metadata.row_group(0)
    for chunk in (chunks.column(index) for index in range(chunks.num_columns)):
        if chunk.path_in_schema.split(".")[0] not in ("id", "shape"):
            continue
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        for place in range(start, start + chunk.total_compressed_size, 3):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
            try:
                assert read_columns(str(cache), ["id", "shape"]) == sound
            except DataError:
                continue
