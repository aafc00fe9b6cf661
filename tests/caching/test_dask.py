"""A Dask cluster builds the same cache, whatever happens to its workers."""

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from mim3d.caching.build import build_cache
from mim3d.caching.case import BuildSettings, CaseResult, build_case
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.workers import _checked_result, _Shared, _work_on_cluster
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import read_cases
from tests.caching.hooked_paths import hooked
from tests.caching.test_cache import built, make_set, tree
from tests.caching.test_packs import TWO_CASES

NUM_CASES = 8


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A data set, and its cache built in this process."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_set(folder / "data", num_cases=NUM_CASES)
    return data, built(data, folder / "cache")


def when_finished(num_cases, out, act):
    """Do something as soon as so many cases are in place; the list that comes back holds their number then."""
    seen = []

    def wait():
        while not (out / "cases").is_dir() or len(os.listdir(out / "cases")) < num_cases:
            time.sleep(0.01)
        seen.append(len(os.listdir(out / "cases")))
        act()

    threading.Thread(target=wait, daemon=True).start()
    return seen


def slow(cases, folder, seconds):
    """The cases of a set, each of which takes a while."""
    for index in range(len(cases.cases)):
        cases = hooked(cases, index, folder / "marks", seconds=seconds)
    return cases


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one thread, each a process of its own."""
    distributed = pytest.importorskip("distributed")
    import dask

    options = {"dashboard_address": ":0", "host": "127.0.0.1", "silence_logs": 50}
    # Workers drop the folder where they stand; the cases of these tests come from modules in it, so it is named.
    options["env"] = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with (
        # Seconds for which a worker that has ended is called again and again.
        dask.config.set({"distributed.comm.timeouts.connect": "3s"}),
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, **options) as cluster,
    ):
        yield cluster


@pytest.fixture
def on_cluster(cluster):
    """Build on the cluster."""

    def build(cases, out, **options):
        return build_cache(cases, out, Preprocessing(), scheduler=cluster.scheduler_address, **options)

    return build


def test_a_cluster_builds_the_same_bytes_in_folders_and_packs(whole, on_cluster, tmp_path):
    data, cache = whole
    made = on_cluster(read_cases(data), tmp_path / "cache")
    assert tree(made.path) == tree(cache.path)
    assert [scan.digest for scan in made] == [scan.digest for scan in cache]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cases").rglob("*")}
    assert tree(on_cluster(read_cases(data), tmp_path / "cache").path) == tree(cache.path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "cases").rglob("*")} == times
    packed = built(data, tmp_path / "packed", pack_gb=TWO_CASES)
    for _ in range(2):
        made = on_cluster(read_cases(data), tmp_path / "cache", pack_gb=TWO_CASES)
        assert tree(made.path) == tree(packed.path)


@pytest.mark.parametrize("num_killed", [1, 2])
def test_the_cases_of_workers_killed_half_way_are_made_all_the_same(whole, cluster, on_cluster, tmp_path, num_killed):
    data, cache = whole
    pids = [worker.pid for worker in cluster.workers.values()]

    def kill():
        for pid in pids[:num_killed]:
            os.kill(pid, signal.SIGKILL)

    num_at_kill = when_finished(2, tmp_path / "cache", kill)
    made = on_cluster(slow(read_cases(data), tmp_path, 0.1), tmp_path / "cache")
    assert 2 <= num_at_kill[0] < NUM_CASES
    assert tree(made.path) == tree(cache.path)


@pytest.mark.parametrize("allowed_failures", [0, 3])
def test_a_case_that_ends_its_worker_once_is_read_again(whole, cluster, on_cluster, tmp_path, allowed_failures):
    data, cache = whole
    cluster.scheduler.allowed_failures = allowed_failures
    made = on_cluster(hooked(read_cases(data), 2, tmp_path / "marks", num_ends=1), tmp_path / "cache")
    assert len(os.listdir(tmp_path / "marks")) == 1
    assert tree(made.path) == tree(cache.path)


def test_a_case_that_ends_every_worker_is_left_out_with_its_reason(whole, cluster, on_cluster, tmp_path):
    data, cache = whole
    cluster.scheduler.allowed_failures = 0
    made = on_cluster(hooked(read_cases(data), 2, tmp_path / "marks", num_ends=99), tmp_path / "cache")
    assert [row["id"] for row in made.failed] == ["c2"]
    assert "c2.nii.gz: the workers reading it ended without a word again and again" in made.failed[0]["reason"]
    assert len(made) == NUM_CASES - 1
    assert tree(on_cluster(read_cases(data), tmp_path / "cache").path) == tree(cache.path)


def settled_number(folder: Path) -> int:
    """Number of files in a folder once none has come for two seconds: what was begun ends, however slow the machine."""
    found, since = -1, time.monotonic()
    while time.monotonic() < since + 2:
        if (number := len(os.listdir(folder))) != found:
            found, since = number, time.monotonic()
        time.sleep(0.05)
    return found


def test_an_interrupt_cancels_what_is_waiting(whole, on_cluster, tmp_path):
    cases = slow(read_cases(whole[0]), tmp_path, 0.2)
    when_finished(1, tmp_path / "cache", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        on_cluster(cases, tmp_path / "cache")
    assert settled_number(tmp_path / "cache" / "cases") < NUM_CASES
    assert tree(built(whole[0], tmp_path / "cache").path) == tree(whole[1].path)


def test_workers_that_do_not_see_the_folder_are_told(whole, on_cluster, tmp_path, monkeypatch):
    # The path of a folder that differs from process to process: each sees its own working folder.
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^/proc/self/cwd/cache/cases: not seen by the Dask worker on \S+; workers"):
        on_cluster(read_cases(whole[0]), "/proc/self/cwd/cache")
    (tmp_path / "data").symlink_to(whole[0])
    with pytest.raises(DataError, match="/proc/self/cwd/data/images: not seen by the Dask worker"):
        on_cluster(read_cases("/proc/self/cwd/data"), tmp_path / "other")
    assert len(built(whole[0], tmp_path / "other")) == NUM_CASES


def test_a_worker_that_writes_into_another_folder_of_the_same_path_is_told(whole, tmp_path):
    case = read_cases(whole[0]).cases[0]
    settings = BuildSettings(out=str(tmp_path), preprocessing=Preprocessing(), labels={})
    with pytest.raises(DataError, match=r"a Dask worker says that c0 is there, and it is not; workers must share"):
        _checked_result(CaseResult(id="c0", folder="c0.1"), case, settings, "tcp://x:1")


def test_workers_of_another_version_are_told(whole, tmp_path):
    (tmp_path / "cases").mkdir()
    settings = BuildSettings(out=str(tmp_path), preprocessing=Preprocessing(), labels={})
    shared = _Shared(settings=settings, sources=str(whole[0]), version="0.0.1")
    with pytest.raises(DataError, match=r"on the Dask worker \S+, but 0\.0\.1 here; install one version everywhere"):
        _work_on_cluster(read_cases(whole[0]).cases[0], shared)


def test_a_case_is_built_the_same_in_a_thread(whole, tmp_path):
    (tmp_path / "cases").mkdir()
    settings = BuildSettings(out=str(tmp_path), preprocessing=whole[1].preprocessing, labels={})
    results = []
    cases = read_cases(whole[0]).cases[:4]
    threads = [threading.Thread(target=lambda c=c: results.append(build_case(c, settings))) for c in cases * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {result.write_error or result.failure for result in results} == {None}
    for result in results:
        assert tree(tmp_path / "cases" / result.folder) == tree(f"{whole[1].path}/cases/{result.folder}")
    assert os.listdir(tmp_path / "unfinished") == []


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "scheduler", "tcp://127.0.0.1", "/tmp/scheduler.json"])
def test_an_address_that_nobody_answers_is_one_sentence_within_seconds_and_changes_nothing(whole, address):
    pytest.importorskip("distributed")
    before = tree(whole[1].path)
    start = time.monotonic()
    with pytest.raises(DataError, match=f"{address}: no Dask scheduler answers there; start one with `dask scheduler`"):
        build_cache(read_cases(whole[0]), whole[1].path, Preprocessing(), scheduler=address)
    assert time.monotonic() - start < 6
    assert tree(whole[1].path) == before


def test_something_else_that_listens_there_is_no_scheduler(whole, tmp_path):
    pytest.importorskip("distributed")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(DataError, match="no Dask scheduler answers there"):
            build_cache(read_cases(whole[0]), tmp_path / "cache", Preprocessing(), scheduler=address)
    assert time.monotonic() - start < 8
    assert not (tmp_path / "cache").exists()


def test_without_dask_the_remedy_is_told(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ConfigError, match=r'install it with `pip install "mim3d\[dask\]"`'):
        build_cache(read_cases(whole[0]), tmp_path / "cache", Preprocessing(), scheduler="tcp://x:1")


def test_a_cluster_that_ends_half_way_is_one_sentence(whole, tmp_path):
    distributed = pytest.importorskip("distributed")
    cases = slow(read_cases(whole[0]), tmp_path, 0.2)
    options = {"dashboard_address": ":0", "host": "127.0.0.1", "silence_logs": 50}
    # Workers drop the folder where they stand; the cases of these tests come from modules in it, so it is named.
    options["env"] = {"PYTHONPATH": str(Path(__file__).parents[2])}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, **options) as cluster:
        when_finished(1, tmp_path / "cache", cluster.close)
        with pytest.raises(DataError, match=r"the Dask cluster cannot go on .* the cases that are finished are kept"):
            build_cache(cases, tmp_path / "cache", Preprocessing(), scheduler=cluster.scheduler_address)
    assert tree(built(whole[0], tmp_path / "cache").path) == tree(whole[1].path)
