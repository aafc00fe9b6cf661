"""A build may be killed at any moment: nothing is lost and nothing is half-written."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from mim3d.caching.cache import open_cache
from mim3d.core.errors import DataError
from tests.caching.test_cache import built, make_set, tree
from tests.caching.test_packs import TWO_CASES

BUILD = """
import sys
from mim3d.caching.build import build_cache
from mim3d.datasets.cases import read_cases
from mim3d.caching.preprocessing import Preprocessing
if __name__ == "__main__":
    data, out, num_workers, pack_gb = sys.argv[1:]
    preprocessing = Preprocessing(spacing_mm=(0.8, 0.8, 1.0))
    pack_gb = float(pack_gb) or None
    build_cache(read_cases(data), out, preprocessing, num_workers=int(num_workers), pack_gb=pack_gb)
"""

SPACING = (0.8, 0.8, 1.0)


def start(data, out, num_workers, pack_gb=None):
    """A build in a process group of its own."""
    script = out.parent / "build.py"
    script.write_text(BUILD)
    command = [sys.executable, str(script), str(data), str(out), str(num_workers), str(pack_gb or 0)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def kill_group(process):
    """End a build and its workers at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def until(condition, process, limit_s=20.0):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + limit_s
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def num_finished(out):
    """Cases in place."""
    return len(os.listdir(out / "cases")) if (out / "cases").is_dir() else 0


def duration_s(data, out, num_workers, pack_gb):
    """Seconds from the first folder of a build to its end."""
    process = start(data, out, num_workers, pack_gb=pack_gb)
    until(out.is_dir, process)
    begin = time.monotonic()
    assert process.wait(60) == 0
    shutil.rmtree(out)
    return time.monotonic() - begin


def require_refused_or_sound(out, *allowed):
    """A cache that can be opened is one of those allowed: every voxel of it can be read, and is the right one."""
    try:
        cache = open_cache(out)
    except DataError:
        return
    whole = next(one for one in allowed if one.digest == cache.digest)
    for scan, right in zip(cache, whole, strict=True):
        for level, shape in enumerate(scan.level_shapes):
            assert (scan.read((0, 0, 0), shape, level) == right.read((0, 0, 0), shape, level)).all()
        assert (scan.read_label((0, 0, 0), scan.shape) == right.read_label((0, 0, 0), scan.shape)).all()


def kill_and_resume(tmp_path, num_kills, num_workers, pack_gb, seed):
    """Kill a build at moments drawn over its duration, run it again to the end each time, and compare."""
    data = make_set(tmp_path / "data", num_cases=6, shape=(24, 20, 9))
    whole = built(data, tmp_path / "whole", spacing_mm=SPACING, pack_gb=pack_gb)
    bytes_of_whole = tree(whole.path)
    out, rng = tmp_path / "killed", random.Random(seed)
    lasts_s = duration_s(data, out, num_workers, pack_gb)
    for _ in range(num_kills):
        process = start(data, out, num_workers, pack_gb=pack_gb)
        until(out.is_dir, process)
        time.sleep(rng.uniform(0, lasts_s))
        kill_group(process)
        require_refused_or_sound(out, whole)
        resumed = built(data, out, spacing_mm=SPACING, pack_gb=pack_gb)
        assert tree(out) == bytes_of_whole
        assert resumed.digest == whole.digest
        shutil.rmtree(out)


@pytest.mark.parametrize(("num_workers", "pack_gb"), [(0, None), (2, TWO_CASES)])
def test_a_build_killed_again_and_again_keeps_what_is_finished(tmp_path, num_workers, pack_gb):
    data = make_set(tmp_path / "data", num_cases=8)
    whole = built(data, tmp_path / "whole", spacing_mm=SPACING, pack_gb=pack_gb)
    out, rng = tmp_path / "killed", random.Random(num_workers)
    for num_wanted in (1, 4):
        process = start(data, out, num_workers, pack_gb=pack_gb)
        until(lambda wanted=num_wanted: num_finished(out) >= wanted, process)
        time.sleep(rng.uniform(0, 0.03))
        kill_group(process)
        require_refused_or_sound(out, whole)
    kept = {path: path.stat().st_mtime_ns for path in (out / "cases").iterdir()}
    resumed = built(data, out, spacing_mm=SPACING)
    if pack_gb is None:
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(out) == tree(tmp_path / "whole")
    assert resumed.digest == whole.digest


@pytest.mark.parametrize("pack_gb", [None, TWO_CASES])
def test_a_build_killed_at_a_random_moment_and_run_again_equals_one_that_was_not(tmp_path, pack_gb):
    kill_and_resume(tmp_path, 5, num_workers=0, pack_gb=pack_gb, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pack_gb", [None, TWO_CASES])
def test_builds_killed_at_fifty_random_moments_and_run_again_equal_one_that_was_not(tmp_path, num_workers, pack_gb):
    kill_and_resume(tmp_path, 50, num_workers=num_workers, pack_gb=pack_gb, seed=num_workers)


#: Kinds of events of the interpreter that come before a change on the disk.
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod")


def ends_before_change(number, data, out, pack_gb):
    """Build in a copy of this process that ends right before the given change to the cache; whether it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event, arguments):
            nonlocal seen
            if event in CHANGES and str(arguments[0]).startswith(str(out)):
                seen += 1
                if seen == number:
                    os._exit(9)

        sys.addaudithook(count)
        try:
            built(data, out, spacing_mm=SPACING, pack_gb=pack_gb)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def change_the_set(data, version):
    """Bring a data set of four to its first or second version: one scan leaves, one comes, one changes."""
    make_set(data, num_cases=4, shape=(12, 10, 9))
    if version:
        shutil.copy(data / "images" / "c3.nii.gz", data / "images" / "c1.nii.gz")
    for kind in ("images", "labels"):
        os.remove(data / kind / f"c{3 * version}.nii.gz")


@pytest.mark.parametrize("pack_gb", [None, 5e-6])
@pytest.mark.parametrize("first", ["anew", "over"])
@pytest.mark.parametrize("max_step", [60, pytest.param(2, marks=pytest.mark.slow)])
def test_a_build_that_ends_before_any_change_on_the_disk_can_go_on(tmp_path, pack_gb, first, max_step):
    data, out = tmp_path / "data", tmp_path / "cache"
    change_the_set(data, 0)
    earlier = built(data, tmp_path / "earlier", spacing_mm=SPACING, pack_gb=pack_gb)
    change_the_set(data, 1)
    whole = built(data, tmp_path / "whole", spacing_mm=SPACING, pack_gb=pack_gb)
    bytes_of_whole, rng = tree(whole.path), random.Random(0)
    number = rng.randint(1, max_step)
    while True:
        if first == "over":
            shutil.copytree(tmp_path / "earlier", out)
        if not ends_before_change(number, data, out, pack_gb):
            break
        require_refused_or_sound(out, earlier, whole)
        assert tree(built(data, out, spacing_mm=SPACING, pack_gb=pack_gb).path) == bytes_of_whole, number
        shutil.rmtree(out)
        number += rng.randint(1, max_step)
    assert number > 100
    assert tree(out) == bytes_of_whole


def test_workers_end_with_a_killed_build(tmp_path):
    data = make_set(tmp_path / "data", num_cases=30, shape=(60, 60, 30))
    out = tmp_path / "cache"
    process = start(data, out, 2)
    until(lambda: num_finished(out) > 2, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    time.sleep(0.5)
    before = num_finished(out)
    time.sleep(0.5)
    assert num_finished(out) == before


def test_what_a_power_cut_leaves_of_a_removed_case_does_not_pass_for_it(tmp_path, monkeypatch):
    data = make_set(tmp_path / "data", num_cases=2)
    whole = tree(built(data, tmp_path / "cache").path)
    for kind in ("images", "labels"):
        os.rename(data / kind / "c0.nii.gz", tmp_path / kind)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)
    built(data, tmp_path / "cache")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path / "cache" / "cases")) == 2
    for kind in ("images", "labels"):
        os.rename(tmp_path / kind, data / kind / "c0.nii.gz")
    assert len(built(data, tmp_path / "cache")) == 2
    assert {path for path in tree(tmp_path / "cache") if "c0" in path} == {path for path in whole if "c0" in path}
