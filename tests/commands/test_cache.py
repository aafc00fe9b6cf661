"""The cache command says where the cache is, how large it is, and what was left out."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from mim3d.commands.cache import cache
from mim3d.core.errors import ConfigError, DataError
from tests.nifti import noise, write_nifti


def test_the_last_line_tells_place_size_and_ratio(tmp_path, capsys):
    write_nifti(tmp_path / "data" / "a.nii.gz", noise((30, 30, 30)))
    (tmp_path / "data" / "b.nii.gz").write_bytes(b"nonsense")
    path = cache(str(tmp_path / "data"), str(tmp_path / "out"), spacing_mm=(2.0, 2.0, 2.0), num_workers=1)
    lines = capsys.readouterr().out.strip().splitlines()
    assert path == str(tmp_path / "out")
    assert lines[0].startswith("1 of 2 scans left out")
    assert "b.nii.gz" in lines[1]
    assert lines[-1].startswith(f"{path}: 1 scan, ")
    assert lines[-1].endswith("of the size of the sources")
    assert open_cache(path)[0].shape == (15, 15, 15)


def test_scans_that_are_there_twice_are_told_with_the_number_of_further_pairs(tmp_path, capsys):
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):
        write_nifti(tmp_path / "data" / f"{name}.nii.gz", noise((30, 30, 30), seed=seed))
    cache(str(tmp_path / "data"), str(tmp_path / "out"), num_workers=1)
    assert capsys.readouterr().out.splitlines()[0] == "2 scans have the same content: a, c"
    for name, seed in (("d", 0), ("e", 1)):
        write_nifti(tmp_path / "data" / f"{name}.nii.gz", noise((30, 30, 30), seed=seed))
    cache(str(tmp_path / "data"), str(tmp_path / "out"), num_workers=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 scans have the same content: a, c (+ 2 more pairs)"


def test_the_closing_lines_and_a_file_say_what_was_understood(tmp_path, capsys):
    for number, shape in enumerate([(20, 20, 12), (24, 22, 14), (20, 24, 12)]):
        write_nifti(tmp_path / "data" / "images" / f"c{number}.nii.gz", noise(shape, seed=number))
        label = np.zeros(shape, np.uint8)
        label[:2, 0, 0] = 1
        label[0, 1, 0] = 2 if number else 0
        write_nifti(tmp_path / "data" / "labels" / f"c{number}.nii.gz", label)
    write_nifti(tmp_path / "data" / "images" / "bad.nii.gz", np.full((6, 6, 6), np.nan, np.float32))
    arguments = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--num_workers", "0"]
    assert main(["cache", *arguments]) == 2
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("understood: "))
    assert lines[start:-2] == [
        "understood: 3 scans of 3 patients, modality CT, 2 labels, 1 left out",
        "  voxels of 1 x 1 x 1 mm, 20 x 20 x 12 to 24 x 24 x 14 voxels",
        "  labels: 1 label_1 in 3, 2 label_2 in 2 of 3 scans",
    ]
    assert lines[-1] == (
        f"1 of 4 cases was left out, the others are done; the reasons are in {tmp_path}/out/failed.csv."
    )
    told = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert told["num_cases"] == 3 and told["num_left_out"] == 1
    assert told["labels"][1] == {"value": 2, "name": "label_2", "num_cases": 2, "num_voxels": 2}


def test_scans_can_be_cropped_to_the_body_and_packed(tmp_path, capsys):
    array = np.full((90, 90, 60), -1000, np.int16)
    array[30:60, 30:60] = noise((30, 30, 60)) + 1000
    write_nifti(tmp_path / "data" / "a.nii.gz", array)
    arguments = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--body_crop", "true", "--pack_gb", "0.1"]
    assert main(["cache", *arguments, "--num_workers", "1"]) == 0
    made = open_cache(tmp_path / "out")
    assert made.preprocessing.body_crop
    assert made[0].shape[0] < 60
    assert len(list((tmp_path / "out" / "packs").iterdir())) == 1


def test_a_scheduler_that_does_not_answer_is_one_line(tmp_path, capsys):
    pytest.importorskip("distributed")
    write_nifti(tmp_path / "data" / "a.nii.gz", noise((30, 30, 30)))
    arguments = [str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--scheduler", "tcp://127.0.0.1:1"]
    assert main(["cache", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("mim3d: tcp://127.0.0.1:1: no Dask scheduler answers there; start one with")


def test_how_voxels_are_stored_can_be_chosen(tmp_path, capsys):
    array = np.random.default_rng(0).normal(-100, 60, (64, 64, 64))
    array[0] = -1000
    write_nifti(tmp_path / "data" / "a.nii.gz", array.astype(np.int16))
    sizes = {}
    for intensities in ("lossless", "8-bit"):
        path = cache(
            str(tmp_path / "data"),
            str(tmp_path / intensities),
            intensities=intensities,
            window=(-500, 500),
            num_levels=2,
        )
        made = open_cache(path)
        sizes[intensities] = made.size_bytes
        assert (made.preprocessing.intensities, made.preprocessing.window) == (intensities, (-500.0, 500.0))
        assert made[0].level_shapes == ((64, 64, 64), (32, 32, 32))
    assert sizes["8-bit"] < 0.9 * sizes["lossless"]
    with pytest.raises(ConfigError, match="two rising numbers"):
        cache(str(tmp_path / "data"), str(tmp_path / "other"), window=(5, -5))


def test_an_empty_folder_leaves_nothing_behind(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no scan in here"):
        cache(str(tmp_path / "data"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_plain_script_may_use_many_processes(tmp_path):
    for name in "ab":
        write_nifti(tmp_path / "data" / f"{name}.nii.gz", noise((30, 30, 30)))
    script = tmp_path / "script.py"
    script.write_text("import mim3d\nmim3d.cache('data', 'out', num_workers=2)\nprint(__file__)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("script.py")
    assert len(open_cache(tmp_path / "out")) == 2
