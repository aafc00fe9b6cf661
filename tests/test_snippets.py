"""The code of the documents runs: every Python block, and commands of the README and of pages, on a tiny data set."""

import fcntl
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

import mim3d
from mim3d.cli import main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Python blocks with the line before them, where a reason may stand for which one is compiled, but not run.
PYTHON = re.compile(r"^([^\n]*)\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOT_RUN = "<!-- not run: "

#: What keeps a command small; the rest of its line is as printed.
SMALL = {
    "phantom": "--num_cases 5 --num_test 1",
    "pretrain": "--max_steps 1 --batch_size 1 --pictures_every 0",
    "finetune": "--max_steps 1 --batch_size 1 --validate_every 0 --pictures_every 0 --task.patch_size 32 32 32",
    "evaluate": "--num_workers 1",
    "probe": "--num_bootstrap 100",
}

#: The same for functions that pages call.
SMALL_CALLS: dict[str, dict[str, Any]] = {
    "pretrain": {"backbone": "hybrid_nano", "max_steps": 1, "batch_size": 1},
    "finetune": {"max_steps": 1, "batch_size": 1, "task": {"name": "segmentation", "patch_size": [32, 32, 32]}},
}

#: What the Python blocks above it print.
PRINTED = re.compile(r"^<!-- printed -->\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)

#: Commands of a page that are run before its Python blocks, by what their lines hold.
FIRST = {"export.md": "--out exported/seg_pt2 "}


def run_line(line: str) -> None:
    """Run a command of a document in this process, made small."""
    _, name, *words = shlex.split(line, comments=True)
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    code = main([name, *words, *SMALL.get(name, "").split()])
    assert code == 0, line


def made_by_the_readme(folder: Path) -> None:
    """Run the first block of the README."""
    block = re.search(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line for line in block[1].splitlines() if line.startswith(("mim3d", "python -c"))]
    for line in lines:
        if line.startswith("mim3d"):
            run_line(line)
        else:
            exec(shlex.split(line)[2], {})
    # What other pages call the same.
    shutil.copytree(folder / "data" / "imagesTr", folder / "scans")
    shutil.copytree(folder / "data", folder / "labelled")
    shutil.copyfile(folder / "data" / "imagesTs" / "phantom_test_000.nii.gz", folder / "scan.nii.gz")
    shutil.copytree(folder / "runs" / "seg" / "segmenter", folder / "OWNER" / "NAME")
    shutil.copytree(folder / "exported", folder / "exported" / "seg_onnx")
    nodules = folder / "lidc_nodules"
    nodules.mkdir()
    (nodules / "labels.csv").write_text("case,patient,diagnosis\nLIDC_1,P1,benign\nLIDC_2,P2,malign\n")


@pytest.fixture(scope="session")
def readers_folder(tmp_path_factory) -> Path:
    """Where a reader of the README stands after its first block; made once for all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "readers_folder"
    with (folder.parent / "readers_folder.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            making = folder.with_name("readers_folder_in_the_making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                patch.chdir(making)
                made_by_the_readme(making)
            making.rename(folder)
    return folder


def test_the_first_block_of_the_readme_runs(readers_folder):
    assert (readers_folder / "report.html").is_file()
    assert (readers_folder / "exported" / "model.onnx").is_file()
    assert (readers_folder / "runs" / "again" / "encoder").is_dir()


def small(name: str) -> Any:
    """A function of the package that does as it is told, but for little work."""
    function = getattr(mim3d, name)
    return lambda **arguments: function(**(arguments | SMALL_CALLS[name]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", [path for path in DOCUMENTS if PYTHON.search(path.read_text(encoding="utf-8"))], ids=lambda path: path.name
)
def test_the_python_of_a_page_runs_from_top_to_bottom(path, readers_folder, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "page"
    shutil.copytree(readers_folder, folder)
    monkeypatch.chdir(folder)
    text = path.read_text(encoding="utf-8")
    for out in re.findall(r'\bout="([^"]+)"', text):
        shutil.rmtree(folder / out, ignore_errors=True)
    for line in re.findall(r"^mim3d .*", text, re.MULTILINE):
        if path.name in FIRST and re.search(FIRST[path.name], line):
            run_line(line)
    for name in SMALL_CALLS:
        monkeypatch.setattr(mim3d, name, small(name))
    names: dict[str, Any] = {"__name__": "page"}
    for before, code in PYTHON.findall(text):
        block = compile(code, f"{path.name}: {code.splitlines()[0]}", "exec")
        if not before.startswith(NOT_RUN):
            exec(block, names)
    printed = capsys.readouterr().out
    assert all(block in printed for block in PRINTED.findall(text))
