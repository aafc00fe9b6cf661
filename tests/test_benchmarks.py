"""The benchmarks start: mypy checks what they call, and these tests that they can be called at all."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(FOLDER.glob("*.py"))

#: What is tried besides each script as it is.
PARTS = [("data_loading.py", "--parts", "hand_over"), ("scaling.py", "--paper")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_imports_and_says_what_it_measures(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"benchmarks/{script.name}" in shown
    assert "--quick" in shown


@pytest.mark.slow
@pytest.mark.parametrize("words", [*((script.name,) for script in SCRIPTS), *PARTS], ids=" ".join)
def test_a_benchmark_measures_a_small_case_and_writes_no_results(words):
    before = {path.name: path.read_bytes() for path in (FOLDER / "results").iterdir()}
    command = [sys.executable, str(FOLDER / words[0]), "--quick", *words[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.name: path.read_bytes() for path in (FOLDER / "results").iterdir()} == before
