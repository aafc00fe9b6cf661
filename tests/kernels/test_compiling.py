"""Compiling on first use: once, for this machine, and never fatally."""

from pathlib import Path

import pytest

from mim3d.kernels import machine
from mim3d.kernels.masked.cpp import compile_library

needs_compiler = pytest.mark.skipif(machine.find_compiler() is None, reason="no C++ compiler")
SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    source = folder / "source.cpp"
    source.write_text(text)
    return source


@needs_compiler
def test_a_library_is_built_once_and_again_when_its_source_changes(home: Path) -> None:
    first = compile_library(write(home, SOURCE))
    built = first.stat().st_mtime_ns
    assert compile_library(write(home, SOURCE)) == first
    assert first.stat().st_mtime_ns == built
    assert compile_library(write(home, SOURCE.replace("42", "43"))) != first
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".so", ".so"]


@needs_compiler
def test_a_source_that_does_not_compile_costs_a_warning_with_the_compilers_words(home: Path) -> None:
    with pytest.warns(UserWarning, match=r"source.cpp could not be compiled .*error.*; the slower PyTorch path"):
        assert compile_library(write(home, "int broken(")) is None


def test_without_a_compiler_there_is_no_library_and_no_noise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert compile_library(write(home, SOURCE)) is None


@needs_compiler
def test_a_home_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path, SOURCE)
    monkeypatch.setattr(Path, "home", lambda: source)
    with pytest.warns(UserWarning, match="could not be compiled"):
        assert compile_library(source) is None
