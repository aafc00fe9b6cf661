"""Bad cases of many kinds in one set: every command leaves them out, lists them with a reason, and exits with 2."""

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import yaml

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from tests.labelled import ball_scan, write_ball_set, write_scan

#: Number of good cases; the others follow.
NUM_GOOD = 9


@pytest.fixture(scope="module")
def bad_set(tmp_path_factory) -> Path:
    """A Decathlon folder of good cases and one bad one of each kind, whose names say what is wrong."""
    folder = write_ball_set(tmp_path_factory.mktemp("bad") / "set", num_cases=NUM_GOOD)
    description = json.loads((folder / "dataset.json").read_text())

    def add(name: str) -> tuple[Path, Path]:
        image, label = folder / "imagesTr" / f"{name}.nii.gz", folder / "labelsTr" / f"{name}.nii.gz"
        for path, array in zip((image, label), ball_scan(99), strict=True):
            write_scan(path, array)
        description["training"].append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
        return image, label

    image, _ = add("damaged")
    image.write_bytes(image.read_bytes()[:-300])
    add("empty")[0].write_bytes(b"")
    add("text")[0].write_text("no scan at all")
    image, _ = add("nan")
    write_scan(image, np.full((20, 20, 18), np.nan, np.float32))
    image, _ = add("rgb")
    colours = np.zeros((22, 20, 18), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    nibabel.save(nibabel.Nifti1Image(colours, np.diag([1.0, 1.0, 1.2, 1.0])), image)
    _, label = add("grid")
    write_scan(label, ball_scan(99)[1], np.diag([1.0, 1.0, 2.4, 1.0]))
    _, label = add("values")
    write_scan(label, np.full((22, 20, 18), 9, np.uint8))
    add("unlabelled")[1].unlink()
    image, _ = add("dangling")
    image.unlink()
    image.symlink_to("nowhere.nii.gz")
    image, _ = add("folder")
    image.unlink()
    image.mkdir()
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


BAD = {"damaged", "empty", "text", "nan", "rgb", "grid", "values", "unlabelled", "dangling", "folder"}


def listed(path: Path) -> dict[str, str]:
    """Id -> reason of a table of cases that were left out."""
    with open(path, encoding="utf-8", newline="") as file:
        return {row["id"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_the_cache_holds_every_good_case_and_lists_every_bad_one(bad_set, tmp_path, capsys, num_workers):
    arguments = [str(bad_set), "--out", str(tmp_path / "cache"), "--num_workers", str(num_workers)]
    assert main(["cache", *arguments]) == 2
    assert {scan.case.id for scan in open_cache(tmp_path / "cache")} == {f"ball_{n}" for n in range(NUM_GOOD)}
    reasons = listed(tmp_path / "cache" / "failed.csv")
    assert reasons.keys() == BAD
    assert not [reason for reason in reasons.values() if "unexpected" in reason or "\n" in reason]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{len(BAD)} of {NUM_GOOD + len(BAD)} cases were left out, the others are done; the reasons")


def test_strict_refuses_before_any_work(bad_set, tmp_path, capsys):
    assert main(["cache", str(bad_set), "--out", str(tmp_path / "cache"), "--strict", "true"]) == 2
    assert "cases cannot be used (strict: nothing is left out): " in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.filterwarnings("ignore")
def test_training_goes_on_without_them_and_lists_them(bad_set, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    task = {"name": "segmentation", "patch_size": [16, 16, 16]}
    settings = {"num_folds": 3, "max_steps": 1, "num_workers": 0, "batch_size": 1, "accelerator": "cpu"}
    config.write_text(yaml.safe_dump({"command": "finetune", "task": task, "backbone": "hybrid_nano", **settings}))
    run = tmp_path / "run"
    arguments = ["--config", str(config), "--data", str(bad_set), "--out", str(run)]
    assert main(["finetune", *arguments]) == 2
    split = json.loads((run / "split.json").read_text())
    used = {case["id"] for part in split.values() for case in part}
    assert not used & (BAD - {"nan", "values", "damaged"})
    assert listed(run / "left_out.csv").keys() == BAD
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"the reasons are in {run}/left_out.csv.")
    assert main(["finetune", *arguments[:-1], str(tmp_path / "strict"), "--strict", "true"]) == 2
    assert not (tmp_path / "strict").exists()


def test_a_good_set_ends_with_zero(tmp_path, capsys):
    data = write_ball_set(tmp_path / "set", num_cases=2)
    assert main(["cache", str(data), "--out", str(tmp_path / "cache"), "--num_workers", "0"]) == 0
    shutil.rmtree(data / "imagesTr")
    assert main(["cache", str(data), "--out", str(tmp_path / "cache"), "--num_workers", "0"]) == 2
    assert "none of 2 scans can be used" in capsys.readouterr().err
