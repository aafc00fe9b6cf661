"""Pre-training as a command: what it refuses, what it leaves behind, which cases it never sees."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from mim3d.caching.cache import open_cache
from mim3d.commands.finetune import finetune
from mim3d.commands.pretrain import pretrain
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import read_yaml
from mim3d.datasets.cases import read_cases
from mim3d.datasets.splits import split_cases
from mim3d.methods.mim.hierarchy import Hierarchy, Level
from mim3d.methods.voco.objective import VoCoObjective
from mim3d.tracking import Tracking
from mim3d.training.schedule import Optimisation
from mim3d.weights import load_encoder, read_card
from mim3d.workflows.shared.inputs import open_scans
from mim3d.workflows.shared.leakage import read_seen
from tests.commands.conftest import BACKBONE, DECODER, TASK
from tests.labelled import ball_scan, write_scan

LEVELS = [
    {"name": "coarse", "footprint": [16, 16, 16], "size": [16, 16, 16], "mask_ratio": 0.5, "num_children": 2},
    {"name": "middle", "footprint": [8, 8, 8], "size": [16, 16, 16], "mask_ratio": 0.5},
]
pretrain_module = sys.modules["mim3d.workflows.pretrain"]

METHOD = {"name": "MiM", "levels": LEVELS, **DECODER}


def learn(data: Path, out: Path, **changes: object) -> Path:
    settings = {"method": METHOD, "backbone": BACKBONE, "max_steps": 2, "num_workers": 0, "log_every": 1}
    optim = Optimisation(learning_rate=1e-3)
    return Path(pretrain(str(data), str(out), **{"optim": optim, **settings, **changes}))


def test_the_run_holds_encoder_card_metrics_and_a_config_that_runs_again(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "run", pictures_every=2)
    card = read_card(run)
    assert card["intensity"]["kind"] == "zscore"
    assert card["data_digest"] == open_cache(run / "cache").digest
    assert load_encoder(run).recipe.widths == (8, 16)
    record = read_run(run)
    assert {"loss/coarse", "loss/middle", "loss/align_middle"} <= set(record.metrics[0])
    assert list(record.pictures) == [2]
    again = {key: value for key, value in read_yaml(run / "config.yaml").items() if key != "command"}
    again |= {"out": str(tmp_path / "again"), "optim": Optimisation(learning_rate=1e-3), "tracking": Tracking()}
    repeated = read_run(pretrain(**again)).metrics
    assert [line["loss"] for line in repeated] == [line["loss"] for line in record.metrics]
    # Counts for the report, which name nobody.
    cohort = record.manifest["derived"]["cohort"]
    assert cohort["train"]["num_scans"] == cohort["train"]["num_patients"] > 0
    assert record.manifest["derived"]["split"] == "none held out"
    fold = read_run(learn(ball_set, tmp_path / "fold", fold=1, max_steps=1))
    assert fold.manifest["derived"]["split"] == "fold 1 of 5, from 0"


def test_a_config_of_before_with_the_decoder_in_the_backbone_trains_the_same(ball_set, tmp_path):
    decoder = {"decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}
    today = read_run(learn(ball_set, tmp_path / "today", method={**METHOD, **decoder})).metrics
    before = {"method": {**METHOD, **dict.fromkeys(decoder)}, "backbone": {**BACKBONE, **decoder}}
    run = read_run(learn(ball_set, tmp_path / "before", **before))
    assert [line["loss"] for line in run.metrics] == [line["loss"] for line in today]
    assert run.config["method"]["decoder_dim"] == 24 and "decoder_dim" not in run.config["backbone"]


def test_labels_are_never_read(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "run")
    assert not any(scan.has_label for scan in open_cache(run / "cache"))


def test_a_fold_leaves_out_exactly_what_fine_tuning_holds_out(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "pre", fold=1, num_folds=3)
    tuned = finetune(
        str(ball_set),
        str(tmp_path / "tuned"),
        task=TASK,
        weights=str(run),
        fold=1,
        num_folds=3,
        max_steps=1,
        num_workers=0,
    )
    split = json.loads((Path(tuned) / "split.json").read_text())
    seen = {scan.digest for scan in read_seen(run).scans}
    ids = {scan.case.id for scan in open_cache(run / "cache") if scan.source_digest in seen}
    assert ids == {row["id"] for row in split["train"]}
    assert not ids & {row["id"] for row in split["val"]}


def test_a_fold_leaves_out_what_either_task_holds_out_where_only_some_cases_have_label_maps(tmp_path):
    rows = ["image,label,class,patient"]
    for number in range(8):
        write_scan(tmp_path / f"scan_{number}.nii.gz", ball_scan(number)[0])
        write_scan(tmp_path / f"label_{number}.nii.gz", ball_scan(number)[1])
        label = tmp_path / f"label_{number}.nii.gz" if number < 4 else ""
        rows.append(f"{tmp_path / f'scan_{number}.nii.gz'},{label},{'good' if number % 2 else 'bad'},patient_{number}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    cases = read_cases(tmp_path / "list.csv").cases
    kept = learn(tmp_path / "list.csv", tmp_path / "run", fold=0, num_folds=4)
    seen = {scan.digest for scan in read_seen(kept).scans}
    learned = {scan.case.id for scan in open_cache(kept / "cache") if scan.source_digest in seen}
    parts = ([case for case in cases if case.label], cases)
    segmentation, classification = ({c.id for c in split_cases(part, fold=0, num_folds=4).val} for part in parts)
    assert classification - segmentation
    assert learned == {case.id for case in cases} - segmentation - classification


def test_a_held_out_scan_that_is_learned_from_by_another_name_is_told_and_refused_under_strict(ball_set, tmp_path):
    data = tmp_path / "twice"
    shutil.copytree(ball_set, data)
    shutil.copy(data / "imagesTr" / "ball_0.nii.gz", data / "other.nii.gz")
    rows = [["imagesTr/ball_0.nii.gz", "val"], ["other.nii.gz", "train"], ["imagesTr/ball_4.nii.gz", "train"]]
    (data / "list.csv").write_text("image,split\n" + "".join(f"{image},{split}\n" for image, split in rows))
    with pytest.warns(
        UserWarning, match=r"1 of 1 held-out cases is among the training cases too: ball_0 \(identical as"
    ):
        run = learn(data / "list.csv", tmp_path / "run")
    assert len(read_seen(run).scans) == 2
    with pytest.raises(DataError, match=r"ball_0 .*strict: refused"):
        learn(data / "list.csv", tmp_path / "strict", strict=True)


def test_fine_tuning_says_when_a_held_out_scan_was_pre_trained_on(ball_set, tmp_path):
    (tmp_path / "unlabelled").mkdir()
    for index in range(6):
        shutil.copy(ball_set / "imagesTr" / f"ball_{index}.nii.gz", tmp_path / "unlabelled" / f"patient_{index}.nii.gz")
    run = learn(tmp_path / "unlabelled", tmp_path / "pre")
    settings = {"task": TASK, "weights": str(run), "num_folds": 3, "max_steps": 1, "num_workers": 0}
    with pytest.warns(
        UserWarning, match=r"2 of 2 held-out cases are in the pre-training data of .*ball_\d \(identical\)"
    ):
        tuned = finetune(str(ball_set), str(tmp_path / "tuned"), **settings)
    assert len(read_seen(Path(tuned) / "segmenter").scans) == 6
    with pytest.raises(DataError, match=r"in the pre-training data of .*strict: refused"):
        finetune(str(ball_set), str(tmp_path / "strict"), strict=True, **settings)


def test_a_published_list_is_pre_trained_on_as_far_as_it_is_there(ball_set, tmp_path, capsys):
    folder = tmp_path / "public" / "CT-COVID-19-August2020"
    folder.mkdir(parents=True)
    for index in range(2):
        name = f"volume-covid19-A-{index:04d}.nii.gz"
        shutil.copy(ball_set / "imagesTr" / f"ball_{index}.nii.gz", folder / name)
    run = learn(tmp_path / "public", tmp_path / "run", preset="1k")
    assert len(read_seen(run).scans) == 2
    assert "TCIA Covid19 (chest): 2 of 722 scans" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="has no folds"):
        learn(tmp_path / "public", tmp_path / "fold", preset="1k", fold=0)


def test_folds_follow_the_seed_of_fine_tuning(ball_set, tmp_path):
    runs = [learn(ball_set, tmp_path / f"{seed}", fold=0, num_folds=3, split_seed=seed, max_steps=1) for seed in (0, 1)]
    digests = [{scan.digest for scan in read_seen(run).scans} for run in runs]
    assert digests[0] != digests[1]


def test_going_on_from_an_encoder_and_resuming_it(ball_set, tmp_path, capsys):
    first = learn(ball_set, tmp_path / "first")
    learn(ball_set, tmp_path / "second", weights=str(first))
    assert "100.0% of the values" in capsys.readouterr().out
    learn(ball_set, tmp_path / "second", weights=str(first), resume=True)
    assert len(read_run(tmp_path / "second").metrics) == 2


def test_a_teacher_begins_as_the_weights_that_training_goes_on_from(ball_set, tmp_path, monkeypatch):
    first, seen = learn(ball_set, tmp_path / "first"), []
    monkeypatch.setattr(VoCoObjective, "after_step", lambda objective, _: seen.append(objective))
    method = {"name": "VoCo", "crop_size": [8, 8, 8], "cells": [2, 2, 1], "dim": 8}
    learn(ball_set, tmp_path / "second", method=method, weights=str(first), max_steps=1)
    teacher, weights = seen[0].teacher[0].state_dict(), load_encoder(first).state_dict()
    assert all(torch.equal(teacher[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": {"name": "MiM", "levels": [{**LEVELS[0], "num_children": 5}, LEVELS[1]]}}, "between 1 and its 4"),
        (
            {
                "method": {
                    "name": "MiM",
                    "levels": [{**LEVELS[0], "footprint": [64] * 3}, {**LEVELS[1], "footprint": [32] * 3}],
                }
            },
            "would be padding",
        ),
        ({"backbone": {**BACKBONE, "in_channels": 2}}, "1 image, but"),
        ({"max_steps": 2, "max_epochs": 2}, "both set"),
        ({"batch_size": 0}, "at least 1"),
        ({"accelerator": "cuda"}, "this machine shows no such device; use accelerator cpu"),
        ({"devices": 2, "strategy": "fsdp"}, "strategy is 'fsdp', which was removed; use ddp"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_folder_is_made(ball_set, tmp_path, changes, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=words):
        learn(ball_set, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_the_time_limit_counts_from_the_beginning_of_the_command(ball_set, tmp_path, monkeypatch, capsys):
    def slow(*args, **kwargs):
        time.sleep(1.1)
        return open_scans(*args, **kwargs)

    monkeypatch.setattr(pretrain_module, "open_scans", slow)
    learn(ball_set, tmp_path / "run", max_steps=100_000, max_time="00:00:01")
    shown = capsys.readouterr()
    assert "stopped after step 1 of 100000, because the time limit of 1 s was reached" in shown.err
    assert (shown.out + shown.err).count("stopped") == 1
    assert shown.err.count("--resume true") == 1


def test_levels_left_out_are_planned_and_written_into_the_config(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "run", method="MiM", max_steps=1)
    planned = read_yaml(run / "config.yaml")["method"]["levels"]
    levels = [Level(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()}) for row in planned]
    assert len(Hierarchy(levels, (4, 4, 4)).levels) == 2
