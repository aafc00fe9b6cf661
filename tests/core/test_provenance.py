"""What a run says of its code and machine."""

import json
import subprocess
from pathlib import Path

import pytest

import mim3d
from mim3d.core import provenance


def test_the_command_line_is_kept_as_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/somewhere/bin/mim3d", "/somewhere/mim3d/__main__.py"):
        monkeypatch.setattr("sys.argv", [program, "pretrain", "--data", "my scans"])
        assert provenance.command_line() == "mim3d pretrain --data 'my scans'"
    monkeypatch.setattr("sys.argv", ["/somewhere/train_all.py", "--token", "secret"])
    assert provenance.command_line() is None


def checkout(folder: Path) -> None:
    """A repository with a copy of the package's place in it."""
    (folder / "src" / "mim3d").mkdir(parents=True)
    (folder / "src" / "mim3d" / "file.py").write_text("1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True)


def code_of(package: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(provenance, "_PACKAGE", package)
    provenance.code_version.cache_clear()
    try:
        return provenance.code_version()
    finally:
        provenance.code_version.cache_clear()


def test_a_checkout_tells_its_commit_and_whether_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path)
    package = (tmp_path / "src" / "mim3d").resolve()
    clean = code_of(package, monkeypatch)
    assert len(str(clean["commit"])) == 40
    assert clean["dirty"] is False
    (package / "file.py").write_text("2\n")
    assert code_of(package, monkeypatch) == {**clean, "dirty": True}


def test_an_installation_inside_another_repository_does_not_tell_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path)
    installed = tmp_path / "env" / "mim3d"
    installed.mkdir(parents=True)
    assert code_of(installed.resolve(), monkeypatch) == {"mim3d": mim3d.__version__}


def test_without_git_there_is_the_version_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_of(provenance._PACKAGE, monkeypatch) == {"mim3d": mim3d.__version__}


def test_versions_are_those_of_what_is_needed_not_of_tools() -> None:
    versions = provenance.versions()
    assert {"mim3d", "python", "torch", "monai", "numpy", "safetensors"} <= versions.keys()
    assert not {"pytest", "mypy", "ruff"} & versions.keys()


def test_the_environment_names_neither_a_machine_nor_a_path_and_fits_into_json() -> None:
    text = json.dumps(provenance.environment() | {"command_line": None})
    assert str(Path.home()) not in text.replace('"/"', "") or str(Path.home()) == "/"
    assert str(provenance._PACKAGE) not in text
    hardware = provenance.hardware()
    assert hardware["cpu"]
    assert 1 <= hardware["usable_cores"] <= hardware["cpu_count"]
