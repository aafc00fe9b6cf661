"""Memory and cores as the system and its control groups count them, read from sample files."""

import os
from pathlib import Path

import pytest
import torch

from mim3d.core import resources
from mim3d.core.resources import (
    available_memory_bytes,
    choose_device,
    in_words,
    num_cores,
    peak_memory_bytes,
    resident_memory_bytes,
)

GIB = 2**30


def write(root: Path, files: dict[str, str]) -> Path:
    """A file system with these files, and 8 GiB available as a whole."""
    meminfo = (
        f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable:  {8 * GIB // 1024} kB\nHugePages_Total: 0\n"
    )
    for name, text in {"proc/meminfo": meminfo, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, limit: object, used: int, cached: int = 0) -> dict[str, str]:
    """A control group of version 2."""
    files = {"memory.max": f"{limit}\n", "memory.current": f"{used}\n"}
    statistics = f"anon 5\nfile {cached}\ninactive_file {cached // 2}\nactive_file {cached - cached // 2}\n"
    return {f"{folder}/{name}": text for name, text in {**files, "memory.stat": statistics}.items()}


def test_without_control_groups_what_the_system_can_give_is_available(tmp_path):
    assert available_memory_bytes(write(tmp_path, {})) == 8 * GIB


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ("max", "max", 8 * GIB),
        (4 * GIB, "max", 3 * GIB),
        (4 * GIB, 2 * GIB, 1 * GIB),
        (40 * GIB, 20 * GIB, 8 * GIB),
        (GIB // 2, "max", 0),
    ],
)
def test_every_group_around_the_process_sets_a_limit(tmp_path, inner, outer, expected):
    files = {"proc/self/cgroup": "0::/job/step\n"}
    files |= group("sys/fs/cgroup/job/step", inner, GIB) | group("sys/fs/cgroup/job", outer, GIB)
    assert available_memory_bytes(write(tmp_path, files)) == expected


def test_cached_files_of_a_group_can_be_given_back(tmp_path):
    files = {"proc/self/cgroup": "0::/job\n", **group("sys/fs/cgroup/job", 4 * GIB, 4 * GIB, cached=3 * GIB)}
    assert available_memory_bytes(write(tmp_path, files)) == 3 * GIB


@pytest.mark.parametrize("path", ["/docker/abc", "/", "/../../other"])
def test_a_container_that_sees_only_its_own_group_finds_it_at_the_top(tmp_path, path):
    files = {"proc/self/cgroup": f"0::{path}\n", **group("sys/fs/cgroup", 2 * GIB, GIB)}
    assert available_memory_bytes(write(tmp_path, files)) == GIB


def test_groups_of_the_first_version_count_too(tmp_path):
    folder = "sys/fs/cgroup/memory/slurm/job"
    files = {
        "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/slurm/job\n1:cpu:/\n0::/\n",
        f"{folder}/memory.limit_in_bytes": f"{3 * GIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{2 * GIB}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{5 * GIB}\n",
    }
    assert available_memory_bytes(write(tmp_path, files)) == 2 * GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"sys/fs/cgroup/job/cpu.max": "max 100000\n"}, 64),
        ({"sys/fs/cgroup/job/cpu.max": "400000 100000\n"}, 4),
        ({"sys/fs/cgroup/job/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/job/cpu.max": "250000 100000\n", "sys/fs/cgroup/cpu.max": "800000 100000\n"}, 3),
        ({"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "200000", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"}, 2),
        ({"sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000"}, 64),
    ],
)
def test_cores_are_those_that_every_group_grants(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _process: set(range(64)), raising=False)
    assert num_cores(write(tmp_path, {"proc/self/cgroup": "4:cpu,cpuacct:/job\n0::/job\n", **files})) == expected


@pytest.mark.parametrize(("asked", "expected"), [(None, 1), ("3", 3)])
def test_threads_are_no_more_than_the_granted_cores_unless_told(monkeypatch, asked, expected):
    monkeypatch.setattr(resources, "num_cores", lambda: 1)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        choose_device("cpu")
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_what_the_process_holds_and_has_held(tmp_path):
    root = write(tmp_path, {"proc/self/status": "Name:\tpython\nVmHWM:\t  2048 kB\nVmRSS:\t  1024 kB\n"})
    assert (resident_memory_bytes(root), peak_memory_bytes(root)) == (2**20, 2**21)
    assert resident_memory_bytes(tmp_path / "nowhere") is None
    assert peak_memory_bytes(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [(0, "0 B"), (2048, "2 KiB"), (3 * 2**20, "3 MiB"), (7 * 2**30, "7.0 GiB"), (5 * 2**40, "5.0 TiB")],
)
def test_sizes_are_put_into_words(num_bytes, words):
    assert in_words(num_bytes) == words
