"""The page on data: each tree that it shows is made from small files, and `mim3d cache` prints what stands there."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest

from mim3d.cli import main
from tests.nifti import affine_of, noise, write_nifti
from tests.scans.test_dicom import heights, positions, write_series

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "data.md"

#: A tree, the text files in it, and a command with what it prints.
LAYOUT = re.compile(
    r"^```text\n(?P<tree>.*?)^```\n(?P<between>.*?)^```console\n\$ (?P<command>.*?)\n(?P<printed>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
TEXT_FILE = re.compile(r"^```(csv|tsv|json)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHAPE = (24, 24, 20)


def layouts() -> dict[str, re.Match[str]]:
    """What the page shows, by the name of the folder."""
    return {match["tree"].split("/")[0]: match for match in LAYOUT.finditer(PAGE.read_text(encoding="utf-8"))}


def files_of(tree: str) -> list[str]:
    """Paths of the files of a tree, whose folders end in a stroke and hold what is indented below them."""
    folders: list[str] = []
    found = []
    for line in tree.splitlines():
        name, depth = line.strip(), (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name.rstrip("/")]
        if not name.endswith("/"):
            found.append("/".join(folders))
    return found


def make(path: Path, texts: dict[str, str]) -> None:
    """One file of a tree (or the slices of ``1.dcm ... 8.dcm``), with what its name says."""
    seed = zlib.crc32(path.as_posix().encode()) if path.suffix != ".dcm" else 0
    if path.suffix in texts:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts[path.suffix], encoding="utf-8")
    elif path.suffix == ".dcm":
        series = str(zlib.crc32(str(path.parent).encode()))
        patient = next(part for part in path.parts if part.startswith("export"))
        num = int(path.stem.split()[-1])
        array = noise((24, 24, num), int(series) % 1000)
        write_series(path.parent, positions(heights(num)), series=series, array=array, PatientID=patient)
    elif re.search(r"(/labels|/segmentations|segmentation|[-_]seg|_labels|_organs)", path.as_posix()):
        label = np.zeros(SHAPE, np.uint8)
        label[8:11, 8:14, 6:14], label[12:15, 8:14, 6:14] = 1, 2
        write_nifti(path, label, affine_of((1.0, 1.0, 2.0)))
    else:
        is_mr = re.search(r"T1w|t1c|t2f", path.name)
        rng = np.random.default_rng(seed)
        mr = rng.normal(80, 8, SHAPE).clip(0)
        mr[6:18, 6:18, 5:15] += 300
        write_nifti(path, mr.astype(np.int16) if is_mr else noise(SHAPE, seed), affine_of((1.0, 1.0, 2.0)))


def plain(text: str, folder: Path) -> list[str]:
    """Printed lines without the folder where the test runs, and without what varies: sizes on disk."""
    text = text.replace(f"{folder}/", "")
    text = re.sub(r"\d[\d.,]* (B|KiB|MiB), [\d.]+ of the size", "SIZE of the size", text)
    return text.splitlines()


def printed_for(match: re.Match[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    texts = {f".{suffix}": text for suffix, text in TEXT_FILE.findall(match["between"])}
    for name in files_of(match["tree"]):
        make(folder / name, texts)
    capfd.readouterr()
    code = main([*match["command"].split()[1:], "--num_workers", "1"])
    said = capfd.readouterr()
    assert code == 0, said.err
    return said.err + said.out


@pytest.mark.parametrize("name", layouts())
def test_cache_prints_what_the_page_says(name, tmp_path, monkeypatch, capfd):
    match = layouts()[name]
    monkeypatch.chdir(tmp_path)
    assert plain(match["printed"], tmp_path) == plain(printed_for(match, tmp_path, capfd), tmp_path)


def test_the_page_shows_every_kind_of_layout():
    assert len(layouts()) == len(re.findall(r"^```console", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) == 13
