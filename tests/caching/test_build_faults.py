"""Whatever is wrong with a scan, a name, a process or the disk: one sentence, and the other scans go on."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.cache import open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core import worker_processes
from mim3d.core.errors import DataError
from mim3d.datasets.cases import read_cases
from tests.caching.hooked_paths import hooked
from tests.caching.test_cache import built, make_set, tree
from tests.caching.test_packs import TWO_CASES
from tests.nifti import affine_of, noise, write_nifti

BUILD = """
import sys
from mim3d.caching.build import build_cache
from mim3d.datasets.cases import read_cases
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.errors import DataError
if __name__ == "__main__":
    data, out, num_workers, pack_gb = sys.argv[1:]
    pack_gb = float(pack_gb) if pack_gb != "None" else None
    try:
        made = build_cache(read_cases(data), out, Preprocessing(), num_workers=int(num_workers), pack_gb=pack_gb)
        print(len(made))
    except DataError as error:
        print(error)
"""

NOBODY = 65534


def started(data, out, *, num_workers=0, pack_gb=None, before=""):
    """A build in a process of its own, which prints how many scans it holds or the sentence of its failure."""
    script = Path(out).parent / "build.py"
    script.write_text(before + BUILD)
    command = [sys.executable, str(script), str(data), str(out), str(num_workers), str(pack_gb)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def told(process):
    """What a build printed; anything unexpected on the way is a failure."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output.strip()


def built_of(cases, out, **options):
    """Cache of a set of cases."""
    return build_cache(cases, out, Preprocessing(), **options)


@contextlib.contextmanager
def bound_by_permissions():
    """Root reads and writes everything; the body runs as somebody else then."""
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set of six and its cache."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_set(folder / "data", num_cases=6)
    return data, built(data, folder / "cache")


def test_a_case_that_ends_its_process_once_is_read_again(whole, tmp_path):
    data, cache = whole
    with pytest.warns(UserWarning, match="a process was killed; going on with 2"):
        made = built_of(hooked(read_cases(data), 1, tmp_path / "marks", num_ends=1), tmp_path / "cache", num_workers=3)
    assert len(os.listdir(tmp_path / "marks")) == 1
    assert tree(made.path) == tree(cache.path)


def test_cases_that_end_their_process_every_time_are_left_out_and_the_rest_goes_on(whole, tmp_path):
    data, cache = whole
    cases = hooked(hooked(read_cases(data), 4, tmp_path / "marks", num_ends=99), 0, tmp_path / "marks", num_ends=99)
    made = built_of(cases, tmp_path / "cache", num_workers=2)
    assert sorted(row["id"] for row in made.failed) == ["c0", "c4"]
    for row in made.failed:
        assert f"{row['id']}.nii.gz: the process reading it was killed" in row["reason"]
        assert row["images"].endswith(f"images/{row['id']}.nii.gz")
        assert row["label"].endswith(f"labels/{row['id']}.nii.gz")
    assert [scan.case.id for scan in made] == ["c1", "c2", "c3", "c5"]
    assert len(os.listdir(tmp_path / "marks")) <= 6
    assert tree(built(data, tmp_path / "cache").path) == tree(cache.path)


def test_processes_that_end_at_every_case_end_the_build(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_processes, "MAX_LOST_AT_FIRST", 2)
    cases = read_cases(whole[0])
    for index in range(6):
        cases = hooked(cases, index, tmp_path / "marks", num_ends=99)
    with pytest.raises(DataError, match="2 times out of 2 the process that works was killed"):
        built_of(cases, tmp_path / "cache", num_workers=2)


def test_processes_that_cannot_be_started_are_one_sentence(whole, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(worker_processes.Workers, "give", refuse)
    with pytest.raises(DataError, match=r"no process can be started \(Cannot allocate memory\); run again with fewer"):
        built_of(read_cases(whole[0]), tmp_path / "cache", num_workers=2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "larger than the memory left for it."),
        (ZeroDivisionError("odd voxels"), "unexpected ZeroDivisionError: odd voxels; please report it."),
    ],
)
def test_a_scan_that_fails_while_it_is_stored_is_left_out(whole, tmp_path, monkeypatch, error, reason):
    def fail(*args):
        raise error

    monkeypatch.setattr("mim3d.caching.case.write_array", fail)
    with pytest.raises(DataError, match=r"none of 6 .*c0\.nii\.gz: " + re.escape(reason)):
        built(whole[0], tmp_path / "cache")
    assert os.listdir(tmp_path / "cache" / "cases") == []


@pytest.mark.parametrize(("pack_gb", "num_workers"), [(None, 0), (None, 2), (TWO_CASES, 0)])
def test_a_disk_that_fills_up_half_way_loses_nothing(tmp_path, pack_gb, num_workers):
    data = make_set(tmp_path / "data", num_cases=4)
    if pack_gb is None:
        # The shard of the last image alone is beyond what the disk takes.
        write_nifti(data / "images" / "c3.nii.gz", noise((120, 120, 60), seed=3))
        (data / "labels" / "c3.nii.gz").unlink()
    limit = 80_000 if pack_gb is None else 25_000
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    whole = built(data, tmp_path / "whole", pack_gb=pack_gb)
    out = tmp_path / "cache"
    sentence = told(started(data, out, num_workers=num_workers, pack_gb=pack_gb, before=limited))
    assert sentence == (
        f"{out}: the cache cannot be written (File too large); make room or choose another folder, then run again: "
        "the cases that are finished are kept."
    )
    assert not (out / "packs").exists() or os.listdir(out / "packs") == []
    kept = {path: path.stat().st_mtime_ns for path in (out / "cases").iterdir()}
    assert len(kept) == 3 + (pack_gb is not None)
    with pytest.raises(DataError, match="not finished"):
        open_cache(out)
    if pack_gb is None:
        built(data, out)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    made = built(data, out, pack_gb=pack_gb)
    assert tree(made.path) == tree(whole.path)


def test_of_two_processes_on_one_folder_one_is_refused(tmp_path):
    data = make_set(tmp_path / "data", num_cases=12)
    builds = [started(data, tmp_path / "cache") for _ in range(2)]
    said = sorted((told(build) for build in builds), key=len)
    if said != ["12", "12"]:
        assert said[0] == "12"
        assert said[1] == f"{tmp_path}/cache: another process is building this cache; wait for it to end."
    assert tree(tmp_path / "cache") == tree(built(data, tmp_path / "whole").path)


def test_a_cache_of_another_version_is_refused_by_both_with_the_way_out(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    built(data, tmp_path / "cache")
    path = tmp_path / "cache" / "cache.json"
    path.write_text(re.sub(r'"version": \d+', '"version": 2', path.read_text()))
    before = tree(tmp_path / "cache")
    with pytest.raises(DataError, match=r"a cache of version 2, but this mim3d reads version \d+; build it again"):
        open_cache(tmp_path / "cache")
    with pytest.raises(DataError, match=r"a cache of version 2, but this mim3d makes version \d+; delete it and run"):
        built(data, tmp_path / "cache")
    assert tree(tmp_path / "cache") == before


def reasons(cache):
    """Name of a failed scan's file -> reason."""
    return {os.path.basename(row["images"]): row["reason"] for row in cache.failed}


def test_links_are_followed_and_those_that_lead_nowhere_are_left_out(tmp_path):
    real = write_nifti(tmp_path / "real" / "deep" / "x.nii.gz", noise(seed=1))
    data = tmp_path / "data"
    write_nifti(data / "a.nii.gz", noise(seed=0))
    (data / "link.nii.gz").symlink_to(real)
    (data / "folder").symlink_to(real.parent)
    (data / "circle").symlink_to(data)
    (data / "dangling.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    (data / "self.nii.gz").symlink_to(data / "self.nii.gz")
    cache = built(data, tmp_path / "cache")
    assert sorted(scan.case.id for scan in cache) == ["a", "link", "x"]
    told = reasons(cache)
    assert set(told) == {"dangling.nii.gz", "self.nii.gz"}
    for name, target in (("dangling.nii.gz", tmp_path / "nowhere.nii.gz"), ("self.nii.gz", data / "self.nii.gz")):
        assert f"no such file: this is a link to {target}, which is not there" in told[name]


def test_a_cache_folder_may_be_a_link_unless_it_leads_nowhere(tmp_path):
    data = make_set(tmp_path / "data", num_cases=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "elsewhere")
    assert len(built(data, tmp_path / "cache")) == 1
    assert (tmp_path / "elsewhere" / "manifest.parquet").exists()
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"the cache cannot be written \(No such file or directory\)"):
        built(data, tmp_path / "lost")


def test_a_scan_that_may_not_be_read_is_left_out(open_folder):
    data = make_set(open_folder / "data", num_cases=2)
    built(data, open_folder / "first")
    (open_folder / "out").mkdir()
    os.chmod(open_folder / "out", 0o777)
    os.chmod(data / "images" / "c1.nii.gz", 0)
    with bound_by_permissions():
        cache = built(data, open_folder / "out" / "cache")
    assert [scan.case.id for scan in cache] == ["c0"]
    assert re.search(r"may not be read by you|Permission denied", cache.failed[0]["reason"])
    assert cache.failed[0]["reason"].startswith(f"{data}/images/c1.nii.gz: ")


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_folder_that_may_not_be_written_is_one_sentence_and_stays_as_it_is(open_folder, is_finished):
    data, out = make_set(open_folder / "data", num_cases=1), open_folder / "cache"
    built(data, out if is_finished else open_folder / "other")
    out.mkdir(exist_ok=True)
    for path in [out, *out.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(out)
    with bound_by_permissions(), pytest.raises(DataError) as refused:
        built(data, out)
    assert re.match(
        f"{out}(/lock)?:? (the cache cannot|could not) be written .Permission denied.; ", str(refused.value)
    )
    assert tree(out) == before
    if is_finished:
        assert len(open_cache(out)) == 1
    for path in [out, *(path for path in out.rglob("*") if path.is_dir())]:
        path.chmod(0o755)


NAMES = (
    unicodedata.normalize("NFC", "é nfc"),
    unicodedata.normalize("NFD", "é nfd"),
    "a 肝脏",
    "b 🫁",
    'it\'s "quoted", here',
    "two;parts",
    "c$(x) & `y`",
)


def test_names_of_any_script_are_kept_to_the_letter(tmp_path):
    for seed, name in enumerate(NAMES):
        write_nifti(tmp_path / "ünter 数据" / f"{name}.nii.gz", noise(seed=seed))
    (tmp_path / "ünter 数据" / "d 坏.nii.gz").touch()
    for pack_gb in (None, TWO_CASES):
        cache = built(tmp_path / "ünter 数据", tmp_path / "out 缓存" / f"{pack_gb}", pack_gb=pack_gb)
        assert {os.path.basename(scan.case.images[0]) for scan in cache} == {f"{name}.nii.gz" for name in NAMES}
        for scan in cache:
            seed = NAMES.index(os.path.basename(scan.case.images[0]).removesuffix(".nii.gz"))
            assert scan.source_digest == built_digest(tmp_path / "ünter 数据" / f"{NAMES[seed]}.nii.gz")
            assert scan.read((0, 0, 0), scan.shape).shape == (1, 6, 7, 8)
        assert reasons(cache)["d 坏.nii.gz"].endswith("d 坏.nii.gz: the file is empty; copy it again from its source.")


def built_digest(path):
    """Digest of the source of a scan, by the rule for several files of one scan."""
    from mim3d.caching.case import digest_files

    return digest_files([str(path)], {})[0]


@pytest.mark.parametrize("content", ["same", "different"])
def test_names_as_long_as_names_can_be_are_kept_apart(tmp_path, content):
    stem = "p" * (255 - len("0.nii.gz"))
    for index in range(2):
        name = f"{stem}{index}.nii.gz"
        write_nifti(tmp_path / "data" / "images" / name, noise(seed=index * (content == "different")))
        write_nifti(tmp_path / "data" / "labels" / name, np.ones((6, 7, 8), np.uint8))
    for num_workers, pack_gb in ((0, None), (2, None), (0, TWO_CASES)):
        cache = built(tmp_path / "data", tmp_path / f"{num_workers}{pack_gb}", num_workers=num_workers, pack_gb=pack_gb)
        assert [os.path.basename(scan.case.images[0]) for scan in cache] == [
            f"{stem}{index}.nii.gz" for index in (0, 1)
        ]
        assert len({scan.case.id for scan in cache}) == 2
        assert len({scan.digest for scan in cache}) == 1 + (content == "different")
        for index, scan in enumerate(cache):
            expected = noise(seed=index * (content == "different"))
            np.testing.assert_array_equal(scan.read((0, 0, 0), scan.shape)[0], expected)


def test_a_name_of_an_older_encoding_is_left_out_and_told_in_ascii(tmp_path):
    write_nifti(tmp_path / "data" / "a.nii.gz", noise(seed=0))
    write_nifti(tmp_path / "data" / "b.nii.gz", noise(seed=1))
    folder = os.fsencode(tmp_path / "data")
    os.rename(folder + b"/b.nii.gz", folder + b"/caf\xe9.nii.gz")
    for pack_gb in (None, TWO_CASES):
        cache = built(tmp_path / "data", tmp_path / f"{pack_gb}", pack_gb=pack_gb)
        assert [scan.case.id for scan in cache] == ["a"]
        reason = f"{tmp_path}/data/caf\\udce9.nii.gz: its name is not valid UTF-8; rename the file or folder."
        assert [row["reason"] for row in cache.failed] == [reason]


def test_what_is_no_scan_under_the_name_of_one_is_left_out(tmp_path):
    write_nifti(tmp_path / "data" / "good.nii.gz", noise())
    (tmp_path / "data" / "empty.nii.gz").touch()
    (tmp_path / "data" / "folder.nii.gz").mkdir()
    (tmp_path / "list.csv").write_text("image\ndata/good.nii.gz\ndata/empty.nii.gz\ndata/folder.nii.gz\n")
    cache = built(tmp_path / "list.csv", tmp_path / "listed")
    assert [scan.case.id for scan in cache] == ["good"]
    assert "the file is empty" in reasons(cache)["empty.nii.gz"]
    assert reasons(cache)["folder.nii.gz"].startswith(f"{tmp_path}/data/folder.nii.gz: ")
    assert "\n" not in "".join(reasons(cache).values())
    assert list(reasons(built(tmp_path / "data", tmp_path / "found"))) == ["empty.nii.gz"]


@pytest.mark.parametrize("moment", ["before", "between"])
def test_a_file_that_vanishes_is_left_out(tmp_path, monkeypatch, moment):
    from mim3d.caching import case as cache_case

    data = make_set(tmp_path / "data", num_cases=2)
    cases, prepare, victim = read_cases(data), cache_case.prepare, data / "images" / "c0.nii.gz"

    def vanish_first(case, *args, **options):
        victim.unlink(missing_ok=True)
        return prepare(case, *args, **options)

    if moment == "before":
        victim.unlink()
    else:
        monkeypatch.setattr(cache_case, "prepare", vanish_first)
    cache = built_of(cases, tmp_path / "cache")
    assert [scan.case.id for scan in cache] == ["c1"]
    assert "c0.nii.gz: no such file" in cache.failed[0]["reason"]


def test_the_quarantine_table_is_read_back_as_it_was_written(tmp_path):
    data = make_set(tmp_path / "data", num_cases=3)
    cases = read_cases(data)
    names = (str(tmp_path / "a, b.nii.gz"), str(tmp_path / 'c "d".nii.gz'))
    several = replace(cases.cases[1], images=names, label=None)
    cache = built_of(replace(cases, cases=(cases.cases[0], several)), tmp_path / "cache")
    assert cache.failed == open_cache(cache.path).failed
    assert cache.failed == (
        {
            "id": "c1",
            "images": f'{tmp_path}/a, b.nii.gz;{tmp_path}/c "d".nii.gz',
            "label": "",
            "reason": f"{tmp_path}/a, b.nii.gz: no such file; check the path and that the disk is mounted.",
        },
    )


def test_a_scan_that_no_cache_can_hold_is_left_out(tmp_path):
    for name, origin in (("good", 0.0), ("far", 1e17)):
        write_nifti(tmp_path / "set" / f"{name}.nii.gz", noise(), affine_of(origin_mm=(origin, 0, 0)))
    made = built_of(read_cases(tmp_path / "set"), tmp_path / "cache")
    assert [scan.case.id for scan in made] == ["good"]
    (row,) = made.failed
    assert re.search(r"far\.nii\.gz: a cache cannot hold it \(affine is \[1\.0, ", row["reason"])
