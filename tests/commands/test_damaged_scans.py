"""Scans of a cache that prove damaged: every command goes on without them, lists them, and exits with 2."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from mim3d.core.left_out import COLUMNS, LeftOutList, read_left_out
from mim3d.datasets.cases import read_cases
from mim3d.datasets.splits import split_cases
from tests.labelled import write_ball_set, write_scan

pytestmark = pytest.mark.filterwarnings("ignore")

SETTINGS = {"num_folds": 3, "max_steps": 2, "num_workers": 0, "batch_size": 1, "accelerator": "cpu"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_ball_set(folder / "set", num_cases=6)
    assert main(["cache", str(folder / "set"), "--out", str(folder / "cache"), "--num_workers", "0"]) == 0
    return folder / "cache"


def damaged(cache: Path, out: Path, *names: str) -> Path:
    """A copy of a cache in which no block of some cases can be unpacked."""
    shutil.copytree(cache, out)
    for name in names:
        (shard,) = out.glob(f"cases/{name}.*/image/0/c/0/0/0/0")
        content = bytearray(shard.read_bytes())
        content[len(content) // 3] ^= 0xFF
        shard.write_bytes(content)
    return out


def finetune(data: Path, out: Path, *flags: str) -> int:
    config = out.with_suffix(".yaml")
    task = {"name": "segmentation", "patch_size": [16, 16, 16]}
    config.write_text(yaml.safe_dump({"command": "finetune", "task": task, "backbone": "hybrid_nano", **SETTINGS}))
    return main(["finetune", "--config", str(config), "--data", str(data), "--out", str(out), *flags])


def listed(path: Path) -> dict[str, str]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


def test_validation_goes_on_without_a_damaged_scan(cache, tmp_path, capsys):
    split = split_cases(open_cache(cache).cases, num_folds=3)
    bad = split.val[0].id
    data = damaged(cache, tmp_path / "cache", bad)
    assert finetune(data, tmp_path / "run", "--fold", "0") == 2
    assert (tmp_path / "run" / "segmenter").is_dir()
    assert listed(tmp_path / "run" / "left_out.csv").keys() == {bad}
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"1 of 6 cases was left out, the others are done; the reasons are in {tmp_path}/run/left_out.csv."
    written = json.loads((tmp_path / "run" / "split.json").read_text())
    assert {case["id"] for case in written["train"]} == {case.id for case in split.train}
    # With strict before the first step.
    assert finetune(data, tmp_path / "strict", "--fold", "0", "--strict", "true") == 2
    assert not (tmp_path / "strict" / "metrics.jsonl").read_text()


def test_a_scan_that_others_stand_in_for_is_listed_and_stays_so_when_the_run_is_resumed(cache, tmp_path):
    train = [case.id for case in split_cases(open_cache(cache).cases, num_folds=3).train]
    data = damaged(cache, tmp_path / "cache", *train[:3])
    assert finetune(data, tmp_path / "run", "--max_steps", "4") == 2
    before = listed(tmp_path / "run" / "left_out.csv")
    assert before.keys() == set(train[:3])
    assert all(reason.startswith("damaged, other scans stood in for it: ") for reason in before.values())
    assert finetune(data, tmp_path / "run", "--max_steps", "4", "--resume", "true") == 2
    assert listed(tmp_path / "run" / "left_out.csv") == before
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"run, cases left out: {len(before)}" in page and all(name in page for name in before)


def test_a_probe_goes_on_without_a_damaged_scan(cache, tmp_path, capsys):
    assert finetune(cache, tmp_path / "run") == 0
    data, scores = damaged(cache, tmp_path / "cache", "ball_1"), tmp_path / "p.json"
    assert main(["probe", "--weights", str(tmp_path / "run"), "--data", str(data), "--out", str(scores)]) == 2
    assert [row["id"] for row in json.loads(scores.read_text())["cases_left_out"]] == ["ball_1"]
    assert main(["probe", "--weights", str(tmp_path / "run"), "--data", str(data)]) == 2
    assert capsys.readouterr().out.splitlines()[-1].endswith("the reasons are in the lines above.")
    strict = ["--strict", "true"]
    assert main(["probe", "--weights", str(tmp_path / "run"), "--data", str(data), *strict]) == 2
    assert "nothing is left out" in capsys.readouterr().err


def test_what_a_scan_stores_is_read_to_find_damage(cache, tmp_path):
    data = damaged(cache, tmp_path / "cache", "ball_2")
    (place,) = data.glob("cases/ball_3.*/locations.npz")
    place.write_bytes(b"no archive")
    found = {scan.case.id: scan.damage for scan in open_cache(data)}
    assert {name for name, damage in found.items() if damage} == {"ball_2", "ball_3"}
    assert "checksum" in found["ball_2"]


def test_a_fold_whose_only_held_out_case_is_bad_is_left_out_of_all_folds(tmp_path, capsys):
    data = write_ball_set(tmp_path / "set", num_cases=3)
    ((bad,),) = [[case.id for case in split_cases(read_cases(str(data)).cases, fold=1, num_folds=3).val]]
    write_scan(data / "imagesTr" / f"{bad}.nii.gz", np.full((22 + int(bad[-1]), 20, 18), np.nan, np.float32))
    capsys.readouterr()
    # Alone it is refused by its true reason.
    assert finetune(data, tmp_path / "alone", "--fold", "1") == 2
    assert f"None of the 1 cases to validate on can be used ({bad})" in capsys.readouterr().err
    assert finetune(data, tmp_path / "all", "--fold", "all") == 2
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert [(fold["fold"], fold["path"]) for fold in summary["folds"]] == [(0, "fold_0"), (2, "fold_2")]
    out = capsys.readouterr().out
    assert f"mim3d predict --weights {tmp_path}/all/fold_0 {tmp_path}/all/fold_2 --input" in out
    # Headers tell before any fold is trained; with strict nothing begins.
    (data / "imagesTr" / f"{bad}.nii.gz").write_text("no scan")
    assert finetune(data, tmp_path / "strict", "--fold", "all", "--strict", "true") == 2
    assert not (tmp_path / "strict").exists()


def test_a_list_keeps_what_was_added_while_the_run_worked(tmp_path):
    left_out = LeftOutList(tmp_path / "left_out.csv", 5)
    left_out.begin([], {"a", "b"})
    assert not left_out.path.exists() and read_left_out(left_out.path) == []
    row = dict(zip(COLUMNS, ("a", "a.nii", "", "=damaged"), strict=True))
    for _ in range(2):
        left_out.add(row)
    assert read_left_out(left_out.path) == [row] and "'=damaged" in left_out.path.read_text()
    other = {**row, "id": "c"}
    left_out.begin([other], {"a", "b"})
    assert read_left_out(left_out.path) == [other, row]
    # A scan that is no longer part of the run goes; so does a row that was cut short.
    left_out.begin([other], {"b"})
    assert read_left_out(left_out.path) == [other]
    left_out.path.write_text("id,images,label,reason\na,b")
    assert read_left_out(left_out.path) == []


def test_a_list_that_grows_is_not_read_for_every_case_and_two_processes_add_each_case_once(tmp_path, monkeypatch):
    ours, theirs = (LeftOutList(tmp_path / "left_out.csv", 9) for _ in range(2))
    read = []
    monkeypatch.setattr("mim3d.core.left_out.read_left_out", lambda path: read.append(path) or read_left_out(path))
    rows = [dict(zip(COLUMNS, (name, "x", "", "why"), strict=True)) for name in "abcde"]
    for row in rows[:3]:
        ours.add(row)
    assert len(read) == 1
    for row in rows[2:4]:
        theirs.add(row)
    ours.add(rows[3])
    ours.add(rows[4])
    assert [row["id"] for row in read_left_out(tmp_path / "left_out.csv")] == list("abcde")
