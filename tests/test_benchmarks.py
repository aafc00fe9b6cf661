"""The benchmarks start: mypy checks what they call, and these tests that they can be called at all."""

import argparse
import importlib
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize("part", ["kernels", "pretraining", "finetuning", "prediction", "memory", "loading"])
def test_each_part_for_a_gpu_runs_small_on_a_cpu(part, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    gpu = importlib.import_module("gpu")
    assert gpu.PARTS.keys() == gpu.SECONDS.keys()
    assert sum(gpu.SECONDS.values()) < 600
    rows = list(gpu.PARTS[part](torch.device("cpu"), True))
    assert rows
    assert all(row.get("agrees", True) for row in rows)
    assert json.loads(json.dumps(rows)) == rows


def test_parts_of_a_benchmark_that_fail_or_take_too_long_say_why_in_one_line(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    apart, log = importlib.import_module("yardstick.apart"), tmp_path / "log"
    python = [sys.executable, "-S", "-c"]
    assert apart.run_apart([*python, "print(1)"], 60, log) == ""
    assert apart.run_apart([*python, "raise ValueError('bad\\n')"], 60, log) == "ValueError: bad"
    assert apart.run_apart([*python, "import time; time.sleep(60)"], 0.2, log) == (
        "stopped after 0.2 s, its share of the time"
    )


def test_what_a_gpu_benchmark_measured_is_kept_when_a_part_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    gpu = importlib.import_module("gpu")

    def one_fails(command: list[str], seconds: float, log: Path) -> str:
        part, rows = command[command.index("--part") + 1], Path(command[command.index("--rows") + 1])
        rows.write_text('{"ms": 1.5}\n{"ms": ')
        log.write_text("Traceback\nRuntimeError: broken\n")
        return "RuntimeError: broken" if part == "memory" else ""

    monkeypatch.setattr(gpu, "run_apart", one_fails)
    monkeypatch.setattr("yardstick.machine.RESULTS", tmp_path)
    arguments = argparse.Namespace(device="cpu", quick=False, parts=["memory", "loading"])
    assert gpu.run(arguments, tmp_path) == 1
    assert "memory failed: RuntimeError: broken" in capsys.readouterr().out
    memory, failed, loading = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert (memory, loading) == ({"part": "memory", "ms": 1.5}, {"part": "loading", "ms": 1.5})
    assert failed["failed"] == "RuntimeError: broken"
