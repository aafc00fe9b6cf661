"""Closed or full standard output and error do not end the work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mim3d import cli

PHANTOM = ["phantom", "--num_cases", "1", "--size", "24", "24", "24"]
FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")


def run(redirections: str, out: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-P", "-m", "mim3d", *PHANTOM, str(out)]
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *words], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("redirections", ["2>&-", ">&-", ">&- 2>&- <&-", "2> >(true)"])
def test_work_is_done_where_nobody_can_read_what_is_said(tmp_path: Path, redirections: str) -> None:
    done = run(redirections, tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "out" / "dataset.json").is_file()
    # No file took the number of a closed stream and was written over.
    assert run("", tmp_path / "again").returncode == 0
    for path in sorted((tmp_path / "again").rglob("*.nii.gz")):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "again")).read_bytes() == path.read_bytes()


@FULL
@pytest.mark.parametrize(("redirections", "stream"), [("2>/dev/full", "error"), (">/dev/full", "output")])
def test_a_full_disk_under_a_stream_is_one_sentence_where_one_can_be_read(
    tmp_path: Path, redirections: str, stream: str
) -> None:
    done = run(redirections, tmp_path / "out")
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out" / "dataset.json").is_file()
    assert ("standard output cannot be written to" in done.stderr) == (stream == "output")


def test_a_refusal_has_its_code_where_nobody_can_read_it(tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "mim3d", "cache", str(tmp_path / "none"), "--out", str(tmp_path / "c")]
    done = subprocess.run(
        ["bash", "-c", '"$@" 2>&-', "bash", *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (cli.REFUSED, "")
