"""A build may be killed at any moment, or the disk may fill up: nothing is lost and nothing is half-written."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mim3d.data.cache import open_cache
from mim3d.errors import DataError
from tests.data.test_cache import built, make_set, tree

BUILD = """
import sys
from mim3d.data.cache import build_cache
from mim3d.data.cases import read_cases
from mim3d.data.preprocessing import Preprocessing
if __name__ == "__main__":
    data, out, num_workers = sys.argv[1:]
    preprocessing = Preprocessing(spacing_mm=(0.8, 0.8, 1.0))
    build_cache(read_cases(data), out, preprocessing, num_workers=int(num_workers))
"""

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))\n" + BUILD


def start(data, out, num_workers, source=BUILD):
    """A build in a process of its own."""
    script = out.parent / "build.py"
    script.write_text(source)
    command = [sys.executable, str(script), str(data), str(out), str(num_workers)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def until(condition, process, limit_s=20.0):
    """Wait for a condition while a process runs."""
    end = time.monotonic() + limit_s
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def num_finished(out):
    """Cases in place."""
    return len(os.listdir(out / "cases")) if (out / "cases").is_dir() else 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_build_run_again_equals_one_that_was_not_killed(tmp_path, num_workers):
    data = make_set(tmp_path / "data", num_cases=8)
    whole = built(data, tmp_path / "whole", spacing_mm=(0.8, 0.8, 1.0))
    out, rng = tmp_path / "killed", random.Random(num_workers)
    for num_wanted in (1, 3, 5):
        process = start(data, out, num_workers)
        until(lambda wanted=num_wanted: num_finished(out) >= wanted, process)
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not (out / "index.json").exists():
            with pytest.raises(DataError):
                open_cache(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "cases").iterdir()}
    resumed = built(data, out, spacing_mm=(0.8, 0.8, 1.0))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(out) == tree(tmp_path / "whole")
    assert resumed.digest == whole.digest


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


def test_a_full_disk_is_one_sentence_and_finished_cases_are_kept(tmp_path):
    data = make_set(tmp_path / "data", num_cases=2, shape=(12, 12, 12))
    built(data, tmp_path / "cache", spacing_mm=(0.8, 0.8, 1.0))
    make_set(tmp_path / "data", num_cases=4, shape=(60, 60, 30))
    for index in range(2):
        for kind in ("images", "labels"):
            os.remove(data / kind / f"c{index}.nii.gz")
    make_set(tmp_path / "data", num_cases=2, shape=(12, 12, 12))
    process = start(data, tmp_path / "cache", 0, LIMITED)
    _, message = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "DataError" in message
    assert "the cache cannot be written (File too large)" in message
    assert num_finished(tmp_path / "cache") >= 2
    assert os.listdir(tmp_path / "cache" / "unfinished") == []
    assert len(built(data, tmp_path / "cache", spacing_mm=(0.8, 0.8, 1.0))) == 4
