"""Nothing that lies where the user stands is run, but for code that the user names by its dotted path."""

import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

from mim3d.cli import main
from mim3d.core.own_code import OwnCode, found_in_working_folder, own_code, working_folder_left_out
from mim3d.core.settings import write_yaml
from tests.nifti import write_nifti

SOURCE = str(Path(main.__code__.co_filename).parents[2])

#: What a stranger's file does: it says that it was run.
TRAP = "import os; open(os.path.join(os.path.dirname(__file__), 'sprung'), 'a').write(__name__ + ' ')\n"

TASK = """
from dataclasses import dataclass
from mim3d.tasks.segmentation.task import Segmentation
import my_lab.losses

@dataclass(frozen=True, kw_only=True)
class Mine(Segmentation):
    weight: float = 1.0
"""


@pytest.fixture(scope="module")
def bare() -> frozenset[str]:
    """What ``python -m`` itself has imported before the first line of the module that it runs."""
    code = "import sys; print(*sys.modules)"
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy, importlib.util, pkgutil, typing; {code}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return frozenset(done.stdout.split())


@pytest.fixture
def trapped(bare: frozenset[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two scans and, beside them, a file named as every module that Python knows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ({*sys.stdlib_module_names, *packages_distributions()} - bare) | {"mim3d", "cmd", "pandas"}:
        if name.isidentifier():
            (folder / f"{name}.py").write_text(TRAP)
    for name in "ab":
        write_nifti(folder / "scans" / f"{name}.nii.gz", np.arange(4096, dtype=np.int16).reshape(16, 16, 16))
    monkeypatch.chdir(folder)
    return folder


def started(words: str, cwd: Path, *how: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *(how or ("-m", "mim3d")), *words.split()],
        cwd=cwd,
        env={**kept, "PYTHONPATH": SOURCE, **environment},
        capture_output=True,
        text=True,
    )


def test_no_file_of_the_working_folder_is_run_by_python_m_nor_in_the_processes_that_it_starts(trapped: Path) -> None:
    (trapped / "mim3d.py").unlink()
    done = started("cache scans --out cache --num_workers 2", trapped)
    assert done.returncode == 0, done.stderr
    assert not (trapped / "sprung").exists(), (trapped / "sprung").read_text()


def test_no_file_of_the_working_folder_is_run_by_the_console_script(trapped: Path, tmp_path: Path) -> None:
    script = tmp_path / "bin" / "mim3d"
    script.parent.mkdir()
    script.write_text("import sys\nfrom mim3d.cli import main\nsys.exit(main())\n")
    # An empty entry of PYTHONPATH is the working folder; Python itself would take its own modules from there.
    for path in trapped.glob("*.py"):
        if path.stem in sys.stdlib_module_names or path.stem == "mim3d":
            path.unlink()
    done = started("cache scans --out cache --num_workers 2", trapped, str(script), PYTHONPATH=f"{SOURCE}:")
    assert done.returncode == 0, done.stderr
    assert not (trapped / "sprung").exists(), (trapped / "sprung").read_text()


def test_the_search_path_and_that_of_new_processes_lack_the_working_folder_for_as_long_as_a_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    for folder in (elsewhere, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "link").symlink_to(here)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "../elsewhere", str(elsewhere), SOURCE]))
    before = ["", ".", str(here), str(tmp_path / "link"), "../elsewhere", str(elsewhere), *sys.path]
    monkeypatch.setattr(sys, "path", list(before))
    with working_folder_left_out():
        assert sys.path == [entry for entry in before[4:] if entry != str(here)]
        assert os.environ["PYTHONPATH"].split(os.pathsep) == ["../elsewhere", str(elsewhere), SOURCE]
        child = subprocess.run([sys.executable, "-c", "import sys; print(sys.path)"], capture_output=True, text=True)
        assert "''" not in child.stdout and repr(str(here)) not in child.stdout
    assert sys.path == before and "PYTHONSAFEPATH" not in os.environ


def test_a_folder_that_python_is_told_to_search_stays_where_the_user_stands_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, path in (
        (str(tmp_path), [str(tmp_path), *sys.path]),
        ("", [*sys.path, str(tmp_path)]),  # As an installed package does, behind the standard library.
    ):
        monkeypatch.setenv("PYTHONPATH", variable)
        monkeypatch.setattr(sys, "path", path)
        with working_folder_left_out():
            assert str(tmp_path) in sys.path


def test_a_command_refuses_or_works_where_its_folder_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["--version"]) == 0
    assert main(["cache", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.fixture
def lab(trapped: Path) -> Iterator[Path]:
    """The trapped folder with a package of the user's own."""
    (trapped / "my_lab").mkdir()
    for name, text in (("__init__", ""), ("losses", "import optional_thing_of_theirs" * 0), ("task", TASK)):
        (trapped / "my_lab" / f"{name}.py").write_text(text)
    (trapped / "optional_thing.py").write_text(TRAP)
    yield trapped
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


WORDS = "finetune --data none --out runs/a --max_steps 1"


def test_code_that_is_named_by_dotted_path_is_found_in_the_working_folder_and_nothing_else_is(
    lab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (lab / "my_lab" / "losses.py").write_text("try:\n    import optional_thing\nexcept ImportError:\n    pass\n")
    assert main([*WORDS.split(), "--task", "my_lab.task.Mine", "--task.wieght", "2"]) == 2
    assert "task has no setting 'wieght'. Did you mean 'weight'?" in capsys.readouterr().err
    assert not (lab / "sprung").exists()
    assert not own_code()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "import my_other",
            "my_other lies in {0}, where only my_one is searched for; put both into one package, or set",
        ),
        ("import nowhere_at_all", "No module named 'nowhere_at_all'."),
        ("def", "SyntaxError: invalid syntax"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_code_of_ones_own_that_cannot_be_imported_is_a_sentence_with_the_remedy(
    lab: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    (lab / "my_one.py").write_text(text + "\n")
    (lab / "my_other.py").write_text(TRAP)
    assert main([*WORDS.split(), "--task", "my_one.Mine"]) == 2
    stated = capsys.readouterr().err
    assert "task 'my_one.Mine' cannot be imported: " in stated and said.format(os.getcwd()) in stated
    assert ("PYTHONPATH=" in stated) == ("my_other" in text)
    assert not (lab / "sprung").exists()


@pytest.mark.parametrize("form", ["{0}: my_lab.trap.Mine", "{0}: {{name: my_lab.trap.Mine}}"])
@pytest.mark.parametrize(
    ("kind", "command"),
    [("task", "finetune"), ("preset", "finetune"), ("backbone", "pretrain"), ("method", "pretrain")],
)
def test_code_that_a_file_of_settings_names_is_not_imported_unasked(
    lab: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str, form: str
) -> None:
    (lab / "my_lab" / "trap.py").write_text(TRAP)
    if kind == "preset":
        form = form.partition("{{name")[0].rstrip() + " my_lab.trap.Mine" * ("{{name" in form)
    write_yaml("other.yaml", {"max_steps": 2})
    (lab / "own.yaml").write_text(form.format(kind))
    words = [command, "--data", "none", "--out", "run", "--config", "own.yaml", "other.yaml"]
    assert main(words) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"own.yaml names the {kind} 'my_lab.trap.Mine', whose code is imported only when you name it" in said
    assert f"--{kind} my_lab.trap.Mine, or --allow_code true" in said
    # A setting that is typed, or another name, says nothing of this one.
    other = ["--preset", "my_lab.other.Mine"] if kind == "task" else ["--max_steps", "3"]
    assert main([*words, *other]) == 2
    assert main([*words, "--allow_code", "false"]) == 2
    assert not (lab / "my_lab" / "sprung").exists()
    for asked in (["--allow_code"], ["--allow_code", "true"], [f"--{kind}", "my_lab.trap.Mine"]):
        (lab / "my_lab" / "sprung").unlink(missing_ok=True)
        sys.modules.pop("my_lab.trap", None)
        assert main([*words, *asked]) == 2
        assert (lab / "my_lab" / "sprung").exists(), asked


def test_a_file_of_settings_cannot_allow_its_own_code(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yaml("own.yaml", {"allow_code": True, "task": "my_lab.task.Mine"})
    assert main([*WORDS.split(), "--config", "own.yaml"]) == 2
    assert "has no setting 'allow_code'" in capsys.readouterr().err


def test_another_process_finds_code_of_the_users_own_once_it_is_told_where(lab: Path) -> None:
    with found_in_working_folder(["my_lab.task.Mine"]):
        sent = pickle.dumps((own_code(), "what may be of my_lab"))
    code = f"""
        import pickle, sys
        pickle.loads({sent!r})
        import my_lab.losses
        try:
            import pandas_of_theirs
        except ImportError:
            print(len(sys.meta_path))
    """
    done = started("", lab, "-P", "-c", textwrap.dedent(code))
    assert done.returncode == 0, done.stderr
    assert not (lab / "sprung").exists()


def test_a_package_without_init_and_a_single_file_are_found_too(lab: Path) -> None:
    (lab / "my_lab" / "__init__.py").unlink()
    (lab / "my_one.py").write_text("VALUE = 3\n")
    with found_in_working_folder(["my_lab.losses.Thing", "my_one.Thing"]):
        import my_lab.losses
        import my_one

        assert my_one.VALUE == 3 and my_lab.losses.__file__ == str(lab / "my_lab" / "losses.py")
    assert OwnCode(str(lab), frozenset({"my_lab"})).find_spec("my_one") is None
