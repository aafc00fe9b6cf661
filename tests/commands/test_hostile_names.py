"""Scans, patients and labels with hostile names go through cache, prediction, evaluation and report without harm."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from mim3d.core.names import is_file_name
from tests.labelled import ball_scan, write_scan

NAMES = [
    "=HYPERLINK(1)",
    "-2+3\x1b[31mred",
    '@a;b,c "d" \'e',
    "rtl\u202egnp",
    "line\nmim3d: all is well",
    "[/red]<script>alert(1)</script>".replace("/", "_"),
    "$a$_{b}%&#|",
]


def harmless(text: str) -> bool:
    return all(line.replace("\t", " ").isprintable() for line in text.split("\n"))


@pytest.fixture
def hostile_set(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        image, label = ball_scan(seed)
        write_scan(tmp_path / "data" / "images" / f"{name}.nii.gz", image)
        write_scan(tmp_path / "data" / "labels" / f"{name}.nii.gz", label)
    write_scan(tmp_path / "data" / "images" / "=bad\x1b]0;x\x07.nii.gz", ball_scan(20)[0])
    bad = tmp_path / "data" / "images" / "=bad\x1b]0;x\x07.nii.gz"
    bad.write_bytes(bad.read_bytes()[:200])
    return tmp_path / "data"


def test_hostile_names_go_from_the_cache_to_the_report(hostile_set, segmenter_run, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "path", list(sys.path))
    data, out = str(hostile_set), tmp_path / "made"
    assert main(["cache", data, "--out", str(out / "cache"), "--num_workers", "0"]) in (0, 2)
    cache = open_cache(out / "cache")
    assert len(cache) == len(NAMES) and len(cache.failed) == 1
    assert {Path(scan.case.images[0]).name for scan in cache} == {f"{name}.nii.gz" for name in NAMES}
    images = str(hostile_set / "images")
    assert main(["predict", "--weights", str(segmenter_run), "--input", images, "--out", str(out / "pred")]) == 2
    listing = json.loads((out / "pred" / "predictions.json").read_text())
    assert {Path(case["images"][0]).name for case in listing["cases"]} == {f"{name}.nii.gz" for name in NAMES}
    assert all(is_file_name(case["id"]) for case in listing["cases"])
    listing["labels"] = {"0": "background", "2": "=ball\x1b[2J\u202e|$\\frac{$", "5": "[core]</td><script>"}
    (out / "pred" / "predictions.json").write_text(json.dumps(listing))
    scores = ["evaluate", "--predictions", str(out / "pred"), "--references", str(hostile_set / "labels")]
    assert main([*scores, "--out", str(out / "s.json"), "--num_bootstrap", "100", "--num_workers", "0"]) in (0, 2)
    assert len(json.loads((out / "s.json").read_text())["cases"]) == len(NAMES)
    assert main(["report", str(segmenter_run), "--scores", str(out / "s.json"), "--out", str(out / "r.html")]) == 0
    shown = capfd.readouterr()
    assert harmless(shown.out) and harmless(shown.err), shown
    texts = [path for path in out.rglob("*") if path.suffix in (".csv", ".json", ".md", ".tex", ".html")]
    assert len(texts) >= 6
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert harmless(text.replace("\r", "")), path
        # The report has one of its own.
        assert text.count("<script>") <= (path.suffix == ".html") or path.suffix in (".json", ".csv"), path
        if path.suffix == ".csv":
            with open(path, encoding="utf-8", newline="") as file:
                cells = [cell for row in csv.reader(file) for cell in row]
            assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@")) and not is_number(cell)], path


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["../../outside", "/outside", "..", ""])
def test_no_list_of_a_run_or_of_predictions_leads_out_of_the_folder(segmenter_run, ball_set, tmp_path, capfd, name):
    """Ids become names of files: a run or a folder of predictions from elsewhere chooses them."""
    run, out = tmp_path / "run", tmp_path / "a" / "b" / "predictions"
    shutil.copytree(segmenter_run, run, ignore=shutil.ignore_patterns("cache", "checkpoints"))
    split = json.loads((run / "split.json").read_text())
    words = ["predict", "--weights", str(run), "--out", str(out)]
    for change in ({"id": name}, {"label": 5}, {"images": []}, {"images": [7]}):
        changed = {**split, "val": [{**split["val"][0], **change}]}
        (run / "split.json").write_text(json.dumps(changed))
        assert main(words) == 2
        assert "split.json is no split that mim3d wrote" in capfd.readouterr().err
    (run / "split.json").write_text(json.dumps(split))
    assert main(words) == 0
    listing = json.loads((out / "predictions.json").read_text())
    listing["begun"] = [{**listing["cases"].pop(), "id": name}]
    (out / "predictions.json").write_text(json.dumps(listing))
    capfd.readouterr()
    assert main(words) == 2
    assert "an id that leads out of the folder" in capfd.readouterr().err
    assert not list(tmp_path.glob("*outside*")) and not list((tmp_path / "a").glob("*outside*"))
