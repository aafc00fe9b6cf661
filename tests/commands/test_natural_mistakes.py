"""What is given in the wrong place is named, with the flag or the layout that would work, before any work begins."""

import shutil

import numpy as np
import pytest

from mim3d.caching.cache import open_cache
from mim3d.cli import main
from mim3d.core.errors import DataError
from mim3d.workflows.probe.cases import read_source
from mim3d.workflows.shared.inputs import read_data
from tests.labelled import ball_scan, write_ball_set, write_scan


@pytest.fixture
def told(capsys):
    """Run a command that is refused, and give the sentence."""

    def run(*words):
        assert main([str(word) for word in words]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.fixture
def pretraining(tmp_path):
    """What pre-training leaves, as far as it is looked at."""
    run = tmp_path / "pre"
    (run / "encoder").mkdir(parents=True)
    (run / "encoder" / "model.safetensors").write_bytes(b"")
    (run / "manifest.json").write_text('{"command": "pretrain", "settings": {}, "inputs": {}}')
    return run


def test_a_folder_around_data_sets_is_refused_by_their_names(tmp_path, told):
    for name in ("Task04", "Task05"):
        write_ball_set(tmp_path / "sets" / name, 2)
    said = told("finetune", "--data", tmp_path / "sets", "--out", tmp_path / "run")
    assert "label maps of 2 data sets (Task04, Task05)" in said and f"--data {tmp_path / 'sets' / 'Task04'}" in said
    assert not (tmp_path / "run").exists()


def test_a_cache_of_several_data_sets_says_so_and_is_refused_where_labels_are_learned(tmp_path, told, capsys):
    for name in ("Task04", "deeper/Task05"):
        write_ball_set(tmp_path / "sets" / name, 2)
    place = str(tmp_path / "cache")
    assert main(["cache", str(tmp_path / "sets"), "--out", place, "--num_workers", "0"]) == 0
    assert "a cache of all is for pre-training" in " ".join(capsys.readouterr().err.split())
    assert any("label maps of 2 data sets" in note for note in open_cache(place).notes)
    said = told("finetune", "--data", place, "--out", tmp_path / "run")
    assert f"{place} holds label maps of 2 data sets (Task04, Task05)" in said
    assert f"--data {tmp_path / 'sets' / 'Task04'}" in said
    with pytest.raises(DataError, match=r"label maps of 2 data sets \(Task04, Task05\)"):
        read_source(place, tmp_path / "phantoms")
    assert not (tmp_path / "run").exists()
    assert len(read_data(place)) == 4  # As pre-training reads it.


def test_folders_of_patients_are_one_data_set(tmp_path):
    for patient in range(3):
        image, label = ball_scan(patient)
        write_scan(tmp_path / f"p{patient}" / "images" / "scan.nii.gz", image)
        write_scan(tmp_path / f"p{patient}" / "labels" / "scan.nii.gz", label)
    assert len(read_data(str(tmp_path), keep_labels=True).cases) == 3


def test_a_run_of_pretraining_cannot_predict(pretraining, ball_set, tmp_path, told):
    said = told("predict", "--weights", pretraining, "--input", ball_set, "--out", tmp_path / "out")
    assert f"mim3d finetune --data LABELLED --weights {pretraining} --out RUN" in said
    assert not (tmp_path / "out").exists()


def test_checkpoints_are_no_network_of_a_task_and_name_their_run(pretraining, ball_set, tmp_path, told):
    (pretraining / "checkpoints").mkdir()
    for step in (2, 4):
        (pretraining / "checkpoints" / f"step_{step}.pt").write_bytes(b"")
    rest = ("--input", ball_set, "--out", tmp_path / "out")
    for given in (pretraining / "checkpoints", pretraining / "checkpoints" / "step_4.pt"):
        assert f"finetune --data LABELLED --weights {pretraining}" in told("predict", "--weights", given, *rest)
    said = told("finetune", "--data", ball_set, "--weights", pretraining / "checkpoints", "--out", tmp_path / "run")
    assert f"give the run itself: {pretraining}." in said
    run = shutil.copytree(pretraining, tmp_path / "seg")
    (run / "manifest.json").write_text('{"command": "finetune", "settings": {}, "inputs": {}}')
    said = told("predict", "--weights", run / "checkpoints" / "step_4.pt", *rest)
    assert f"going on with a run of mim3d finetune; give the run itself: {run}." in said


def test_the_folder_of_all_folds_names_its_runs(pretraining, ball_set, tmp_path, told):
    for number in (0, 1):
        shutil.copytree(pretraining, tmp_path / "all" / f"fold_{number}")
    said = told("predict", "--weights", tmp_path / "all", "--input", ball_set, "--out", tmp_path / "out")
    assert "holds the runs of 2 folds" in said and f"all of them: {tmp_path / 'all'}/fold_*" in said


def test_a_data_set_is_no_network_and_predictions_are_none(ball_set, tmp_path, told):
    said = told("predict", "--weights", ball_set, "--input", ball_set, "--out", tmp_path / "out")
    assert "is a data set, no network; give it as --data or --input" in said
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "predictions.json").write_text('{"cases": []}')
    assert "holds predictions" in told("predict", "--weights", tmp_path / "p", "--out", tmp_path / "out")


def test_a_run_is_no_scan(pretraining, segmenter_run, tmp_path, told):
    said = told("predict", "--weights", segmenter_run, "--input", pretraining, "--out", tmp_path / "out")
    assert "It is a run of mim3d pretrain" in said and "leave --input out" in said
    assert "It is a run of mim3d pretrain" in told("finetune", "--data", pretraining, "--out", tmp_path / "run")


def test_a_cache_is_no_scan(segmenter_run, tmp_path, told):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text("{}")
    said = told("predict", "--weights", segmenter_run, "--input", tmp_path / "cache", "--out", tmp_path / "out")
    assert said.endswith("It is a cache, from which training reads (--data); give the scans that it was made of.")


def test_images_without_labels_are_told_the_layout_or_the_folder_beside_them(ball_set, tmp_path, told):
    said = told("finetune", "--data", ball_set / "imagesTr", "--out", tmp_path / "run")
    assert said.endswith(f"Their label maps lie beside it in labelsTr: give --data {ball_set}.")
    shutil.copytree(ball_set / "imagesTr", tmp_path / "images_alone")
    said = told("finetune", "--data", tmp_path / "images_alone", "--out", tmp_path / "run")
    assert "labelsTr beside imagesTr" in said and "columns image and label" in said


def test_a_list_of_classes_names_the_task_that_learns_them(ball_set, tmp_path, told):
    rows = [f"{ball_set}/imagesTr/ball_{i}.nii.gz,{'ab'[i % 2]}" for i in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["image,class", *rows]))
    said = told("finetune", "--data", tmp_path / "list.csv", "--out", tmp_path / "run")
    assert "--task classification" in said and "column label" in said
    said = told("finetune", "--data", ball_set, "--task", "classification", "--out", tmp_path / "run")
    assert "leave --task classification out" in said and "image and class" in said


def test_both_sides_of_an_evaluation_are_told_apart(ball_set, segmenter_run, tmp_path, told):
    labels, scores = ball_set / "labelsTr", tmp_path / "s.json"
    said = told("evaluate", "--predictions", labels, "--references", labels, "--out", scores)
    assert "both name" in said
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "predictions.json").write_text('{"cases": []}')
    said = told("evaluate", "--predictions", labels, "--references", tmp_path / "p", "--out", scores)
    assert f"--predictions {tmp_path / 'p'} --references {labels}" in said
    said = told("evaluate", "--predictions", segmenter_run, "--references", labels, "--out", scores)
    assert "a run of mim3d finetune" in said and f"mim3d predict --weights {segmenter_run}" in said


def test_words_without_a_flag_get_one(told):
    assert "such as --data scans, or see mim3d finetune --help" in told("finetune", "scans", "--out", "run")
    assert "such as --input scans" in told("predict", "scans", "--weights", "run")
    assert "such as --weights run" in told("export", "run", "--out", "folder")


@pytest.mark.parametrize(
    ("given", "both"),
    [
        (("--max_epochs", "3"), "max_steps (4) and max_epochs (3)"),
        (("--optim.warmup_ratio", "0.1"), "warmup_steps and warmup_ratio"),
    ],
)
def test_a_setting_that_excludes_one_of_the_run_is_refused_with_how_it_goes_on(tmp_path, told, given, both):
    run = tmp_path / "my run"
    run.mkdir()
    (run / "config.yaml").write_text("command: finetune\ndata: D\nmax_steps: 4\noptim: {warmup_steps: 3}\n")
    said = told("finetune", "--out", run, "--resume", "true", *given)
    assert f"{both} are both set" in said and "choose another --out" in said
    assert f"leave these out: mim3d finetune --out '{run}' --resume true." in said
    # Where no run is there, both were given now.
    started = ("--data", "D", "--out", tmp_path / "new", "--max_steps", "4", "--optim.warmup_steps", "3")
    new = told("finetune", *started, "--resume", "true", *given)
    assert new == f"mim3d: {both} are both set; give only one of them."


def test_a_report_of_what_is_no_run_says_what_it_is(tmp_path, told):
    for name, told_as in (("cache.json", "is a cache"), ("predictions.json", "holds predictions")):
        folder = tmp_path / name.removesuffix(".json")
        folder.mkdir()
        (folder / name).write_text("{}")
        assert f"{folder} {told_as}" in told("report", folder, "--out", tmp_path / "page.html")


def test_scoring_against_a_run_asks_for_label_maps(pretraining, ball_set, tmp_path, told):
    labels, out = ball_set / "labelsTr", ("--out", tmp_path / "scores.json")
    said = told("evaluate", "--predictions", labels, "--references", pretraining, *out)
    assert f"{pretraining} is a run of mim3d pretrain; give the folder of label maps" in said and "--input" not in said


def test_images_are_no_references(ball_set, tmp_path, told):
    grey = np.random.default_rng(0).integers(0, 100, (12, 12, 12)).astype(np.uint8)
    for name in ("a", "b"):
        write_scan(tmp_path / "grey" / f"{name}.nii.gz", grey)
        write_scan(tmp_path / "maps" / f"{name}.nii.gz", np.where(grey > 50, 20, grey // 25).astype(np.uint8))
    maps, out = tmp_path / "maps", tmp_path / "scores.json"
    said = told("evaluate", "--predictions", maps, "--references", tmp_path / "grey", "--out", out)
    assert "a.nii.gz: holds 99 values" in said and "an image" in said
