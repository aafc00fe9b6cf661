"""Fine-tuning as a command: what it refuses, what it leaves behind, what it takes from an encoder."""

import csv
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch

from mim3d.backbones import Backbone, create_recipe
from mim3d.cli import main
from mim3d.commands.cache import cache
from mim3d.commands.finetune import finetune
from mim3d.commands.predict import predict
from mim3d.commands.pretrain import pretrain
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import to_named
from mim3d.datasets.cases import Case, read_cases
from mim3d.datasets.splits import Split, TrainPart
from mim3d.scans.intensity import Intensity
from mim3d.scans.modality import ChannelModality
from mim3d.training.schedule import Optimisation
from mim3d.weights import load_encoder, read_card, save_network
from mim3d.workflows.shared.held_out import choose_split, split_in_words
from mim3d.workflows.shared.initialisation import Initialisation
from tests.commands.conftest import BACKBONE, DECODER, TASK
from tests.labelled import ball_scan, write_ball_set, write_scan


def tune(data: Path, out: Path, **changes: object) -> Path:
    settings = {"task": TASK, "backbone": BACKBONE, "num_folds": 3, "max_steps": 2, "num_workers": 0, **changes}
    return Path(finetune(str(data), str(out), **settings))


def save_encoder(folder: Path, *, seed: int = 1, **card: object) -> torch.nn.Module:
    """An encoder export such as pre-training leaves."""
    from mim3d.backbones import BACKBONES

    torch.manual_seed(seed)
    recipe = create_recipe(BACKBONE)
    encoder = recipe.build()
    intensity = {"kind": "zscore", "window": None}
    fields = {"backbone": to_named(recipe, BACKBONES), "spacing_mm": None, "intensity": intensity, **card}
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_network(folder, encoder, fields)
    return encoder


def test_a_network_learns_the_set_and_the_run_holds_all_that_was_promised(segmenter_run):
    record = read_run(segmenter_run)
    validations = [line for line in record.metrics if "val/dice" in line]
    assert len(validations) == 10
    assert max(line["val/dice"] for line in validations) > 0.8
    assert {"val/dice/ball", "val/dice/core"} <= set(validations[-1])
    assert {"loss/dice", "loss/cross_entropy"} <= set(next(line for line in record.metrics if "loss" in line))
    assert record.config["task"]["patch_size"] == [16, 16, 16]
    assert set(np.load(record.pictures[40])) == {
        "segmentation/image",
        "segmentation/reference",
        "segmentation/prediction",
    }


def test_the_card_says_how_to_use_the_segmenter_and_the_best_weights_were_kept(segmenter_run):
    card = read_card(segmenter_run, ("segmenter",))
    assert card["labels"] == {"0": "background", "2": "ball", "5": "core"}
    assert card["intensity"]["kind"] == "zscore"
    assert card["task"]["name"] == "segmentation" and card["task"]["patch_size"] == [16, 16, 16]
    assert card["backbone"]["widths"] == [8, 16]
    best = max(line["val/dice"] for line in read_run(segmenter_run).metrics if "val/dice" in line)
    assert card["scores"]["dice"] == pytest.approx(best)
    assert load_encoder(segmenter_run).widths == (8, 16)


def test_held_out_cases_are_a_list_that_is_data_again(segmenter_run):
    split = json.loads((segmenter_run / "split.json").read_text())
    ids = {part: {case["id"] for case in split[part]} for part in ("train", "val")}
    assert len(ids["train"]) == 4 and len(ids["val"]) == 2 and not ids["train"] & ids["val"]
    listed = read_cases(segmenter_run / "held_out.csv")
    assert {case.id for case in listed.cases} == ids["val"]
    assert all(case.label for case in listed.cases)


def test_the_manifest_counts_the_cohort_and_names_nobody(segmenter_run):
    derived = read_run(segmenter_run).manifest["derived"]
    parts = derived["cohort"]
    assert {name: (part["num_scans"], part["num_patients"]) for name, part in parts.items()} == {
        "train": (4, 4),
        "held out": (2, 2),
    }
    assert parts["train"]["labels"] == {"ball": 4, "core": 4}
    assert len(parts["train"]["spacing_mm"]) == 3
    assert derived["split"].startswith("fold 0 of ")
    split = json.loads((segmenter_run / "split.json").read_text())
    assert not [case["id"] for part in split.values() for case in part if f'"{case["id"]}"' in json.dumps(parts)]


@pytest.mark.parametrize(
    ("declared", "words"),
    [({}, "fold 1 of 5, from 0"), ({"split": "val"}, "declared split"), ({"fold": 1}, "declared fold 1")],
)
def test_it_is_said_by_what_cases_are_held_out(declared, words):
    case = Case(id="a", images=("a.nii",), patient="a")
    split = Split(train=(case,), val=(replace(case, id="b", **declared),))
    assert split_in_words(split, 1, 5) == words
    assert split_in_words(Split(train=(case,), val=()), None, 5) == "none held out"


def test_a_saved_config_runs_again_with_a_new_folder(segmenter_run, tmp_path):
    from mim3d.cli import main

    words = ["finetune", "--config", str(segmenter_run / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main([*words, "--max_steps", "2"]) == 0
    assert (tmp_path / "again" / "segmenter" / "model.safetensors").is_file()


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_never_stopped(ball_set, tmp_path):
    whole = tune(ball_set, tmp_path / "whole", max_steps=6, checkpoint_every=3, log_every=1)
    tune(ball_set, tmp_path / "parts", max_steps=6, checkpoint_every=3, log_every=1)
    parts = tmp_path / "parts"
    (parts / "checkpoints" / "step_00000006.pt").unlink()
    tune(ball_set, parts, max_steps=6, checkpoint_every=3, log_every=1, resume=True)
    losses = [[line["loss"] for line in read_run(run).metrics if "loss" in line] for run in (whole, parts)]
    assert losses[0] == losses[1]


def test_a_run_goes_on_and_predicts_where_its_data_lie_now(ball_set, tmp_path, capsys):
    data, run = tmp_path / "job_1", tmp_path / "run"
    shutil.copytree(ball_set, data)
    tune(data, run, max_steps=6, checkpoint_every=3, log_every=1)
    (run / "checkpoints" / "step_00000006.pt").unlink()
    losses = [line["loss"] for line in read_run(run).metrics if "loss" in line]
    data.rename(tmp_path / "job_2")
    tune(tmp_path / "job_2", run, max_steps=6, checkpoint_every=3, log_every=1, resume=True)
    assert f"data: {tmp_path / 'job_2'}, with the content of {data} before" in capsys.readouterr().out
    assert [line["loss"] for line in read_run(run).metrics if "loss" in line] == losses
    predict(str(run), str(tmp_path / "predictions"), accelerator="cpu")
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == 2
    assert main(["finetune", "--out", str(run), "--resume", "true", "--memory_limit", "0"]) == 0


def test_an_encoder_is_taken_over_with_its_backbone_and_its_intensities(ball_set, tmp_path, capsys):
    encoder = save_encoder(tmp_path / "pre" / "encoder")
    run = tune(ball_set, tmp_path / "run", weights=str(tmp_path / "pre"), backbone=None, max_steps=1, accumulation=1)
    assert "100.0% of the values" in capsys.readouterr().out
    assert read_card(run, ("segmenter",))["backbone"]["widths"] == [8, 16]
    tuned = load_encoder(run).state_dict()
    assert all(torch.allclose(value, tuned[key], atol=5e-3) for key, value in encoder.state_dict().items())


def test_another_window_or_spacing_than_the_encoders_is_said_and_the_encoders_window_is_used(ball_set, tmp_path):
    window = {"kind": "window", "window": [0.0, 400.0]}
    save_encoder(tmp_path / "pre" / "encoder", intensity=window, spacing_mm=[2.0, 2.0, 2.0])
    weights = str(tmp_path / "pre")
    with pytest.warns(UserWarning, match=r"window 0 to 400.*z-score suits") as said:
        run = tune(ball_set, tmp_path / "run", weights=weights, max_steps=1)
    assert sum("spacing_mm" in str(warning.message) for warning in said) == 0
    card = read_card(run, ("segmenter",))
    assert card["intensity"] == window and card["spacing_mm"] == [2.0, 2.0, 2.0]
    with pytest.warns(UserWarning, match=r"spacing_mm 2 2 2, but the scans are prepared at 1 1 1"):
        tune(
            ball_set,
            tmp_path / "other",
            weights=weights,
            max_steps=1,
            spacing_mm=(1.0, 1.0, 1.0),
            intensity=Intensity(kind="window", window=(0.0, 400.0)),
        )


def test_an_encoder_of_ct_with_a_window_of_its_own_meets_ct_without_a_warning(recwarn):
    hounsfield = ChannelModality(name="CT", by="declared", in_hu=True)
    recipe, scans = create_recipe("hybrid_nano"), [SimpleNamespace(modalities=(hounsfield,))]
    initial = Initialisation.of_card(recipe, None, {"intensity": {"kind": "window", "window": [-200.0, 300.0]}})
    assert initial.intensity(None, scans) == Intensity(window=(-200.0, 300.0))
    assert not recwarn.list
    initial.intensity(Intensity(window=(-100.0, 100.0)), scans)
    assert "the window -100 to 100 was asked for" in str(recwarn.pop().message)


def two_channels(folder: Path) -> Path:
    """A list of scans with two channels each."""
    rows = ["image,label"]
    for index in range(4):
        image, label = ball_scan(index)
        for name, array in ((f"{index}_a", image), (f"{index}_b", -image), (f"{index}_label", label)):
            write_scan(folder / f"{name}.nii.gz", array)
        rows.append(f"{index}_a.nii.gz;{index}_b.nii.gz,{index}_label.nii.gz")
    path = folder / "two.csv"
    path.write_text("\n".join(rows))
    return path


def test_an_encoder_of_one_channel_is_adapted_to_two_and_that_is_said(tmp_path):
    data = two_channels(tmp_path)
    save_encoder(tmp_path / "pre" / "encoder")
    with pytest.warns(UserWarning, match="learned from 1 channel, but the data have 2"):
        run = tune(data, tmp_path / "run", weights=str(tmp_path / "pre"), backbone=None, num_folds=2)
    card = read_card(run, ("segmenter",))
    assert card["backbone"]["in_channels"] == 2
    assert "unlike weights" in [row["kind"] for row in card["warnings"]]
    with pytest.raises(ConfigError, match=r"backbone.in_channels 2"):
        tune(data, tmp_path / "other", num_folds=2)


def test_weights_of_another_backbone_are_refused_before_anything_is_written(ball_set, tmp_path):
    save_encoder(tmp_path / "pre" / "encoder")
    other = {**BACKBONE, "widths": [6, 24]}
    with pytest.raises(CheckpointError, match="another backbone"):
        tune(ball_set, tmp_path / "run", weights=str(tmp_path / "pre"), backbone=other)
    assert not (tmp_path / "run").exists()


def test_a_cache_can_be_the_data_and_can_be_shared_by_runs_of_any_share(ball_set, tmp_path):
    shared = str(tmp_path / "cache")
    tune(ball_set, tmp_path / "small", cache=shared, train_fraction=0.5)
    tune(ball_set, tmp_path / "full", cache=shared)
    tune(Path(shared), tmp_path / "from_cache")
    assert not (tmp_path / "small" / "cache").exists()
    splits = [json.loads((tmp_path / name / "split.json").read_text()) for name in ("small", "full", "from_cache")]
    trains = [{case["id"] for case in split["train"]} for split in splits]
    assert len(trains[0]) == 2 and trains[0] < trains[1] == trains[2]
    assert splits[0]["val"] == splits[1]["val"]


def test_the_cache_of_pretraining_is_refused_as_labelled_data_with_the_way_to_one(ball_set, tmp_path):
    levels = [{"name": "only", "footprint": [16] * 3, "size": [16] * 3, "mask_ratio": 0.5}]
    run = Path(
        pretrain(
            str(ball_set),
            str(tmp_path / "pre"),
            method={"name": "MiM", "levels": levels, **DECODER},
            backbone=BACKBONE,
            max_steps=1,
            num_workers=0,
            pictures_every=10,
        )
    )
    expected = (
        rf"^{run / 'cache'} is a cache of scans without labels, such as pre-training makes \(ball_0, .* and 1 more\); "
        r"make one from the labelled data set first \(mim3d cache DATA --out CACHE\), or give the data set itself\.$"
    )
    for fold in (0, "all"):
        with pytest.raises(DataError, match=expected):
            tune(run / "cache", tmp_path / "run", fold=fold, weights=str(run), backbone=None)
    assert not (tmp_path / "run").exists()
    labelled = cache(str(ball_set), str(tmp_path / "labelled"))
    tune(Path(labelled), tmp_path / "run", weights=str(run), backbone=None, max_steps=1, batch_size=1)


def test_without_a_fold_all_cases_train_and_the_last_weights_are_kept(ball_set, tmp_path):
    run = tune(ball_set, tmp_path / "run", fold=None)
    assert read_card(run, ("segmenter",))["step"] == 2
    assert not any("val/dice" in line for line in read_run(run).metrics)
    with open(run / "held_out.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": {**TASK, "patch_size": [18, 16, 16]}}, ConfigError, r"patch_size axis X \(18\).*use 16 or 20"),
        ({"task": "segmentatoin"}, ConfigError, "segmentation"),
        ({"task": {**TASK, "patch_sise": [8, 8, 8]}}, ConfigError, "patch_size"),
        ({"backbone": "hybrid_bace"}, ConfigError, "hybrid_base"),
        ({"fold": 3}, ConfigError, "fold 3 of 3"),
        ({"train_fraction": 0.0}, ConfigError, "train_fraction"),
        ({"batch_size": 0}, ConfigError, "batch_size"),
        ({"max_epochs": 3}, ConfigError, "max_epochs"),
        ({"precision": "8-bit"}, ConfigError, "precision"),
        ({"weights": "nowhere"}, CheckpointError, "nowhere"),
        ({"validate_every": -1}, ConfigError, "validate_every"),
        ({"accelerator": "mps", "devices": 1}, ConfigError, "this machine shows no such device"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_folder_is_made(
    ball_set, tmp_path, changes, error, message, monkeypatch
):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(error, match=message):
        tune(ball_set, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_left_alone_unless_it_is_to_be_resumed(ball_set, segmenter_run):
    before = (segmenter_run / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="resume true"):
        tune(ball_set, segmenter_run)
    assert (segmenter_run / "metrics.jsonl").read_text() == before


def test_a_label_on_another_grid_is_refused_with_both_files(tmp_path):
    data = write_ball_set(tmp_path / "balls", num_cases=3)
    path = data / "labelsTr" / "ball_1.nii.gz"
    label = np.asarray(nibabel.load(path).dataobj)
    write_scan(path, label, np.diag([1.0, 1.0, 3.0, 1.0]))
    with pytest.raises(DataError, match=r"labelsTr/ball_1.*does not lie on the grid of .*imagesTr/ball_1"):
        tune(data, tmp_path / "run", strict=True)
    assert not (tmp_path / "run").exists()


def test_label_values_that_are_not_declared_are_named(tmp_path):
    data = write_ball_set(tmp_path / "balls", num_cases=4)
    path = data / "labelsTr" / "ball_1.nii.gz"
    label = np.asarray(nibabel.load(path).dataobj).copy()
    label[0, 0, 0] = 9
    write_scan(path, label)
    with pytest.raises(DataError, match=r"ball_1.*9.*not declared"):
        tune(data, tmp_path / "run", strict=True)


def test_labels_without_any_structure_are_refused(tmp_path):
    for index in range(3):
        image, label = ball_scan(index)
        write_scan(tmp_path / "set" / "images" / f"{index}.nii.gz", image)
        write_scan(tmp_path / "set" / "labels" / f"{index}.nii.gz", 0 * label)
    with pytest.raises(DataError, match="no label but background"):
        tune(tmp_path / "set", tmp_path / "run")


def cases(number: int) -> list[Case]:
    return [
        Case(id=f"{patient}_{scan}", images=(f"{patient}_{scan}.nii",), patient=str(patient))
        for patient in range(number)
        for scan in range(2)
    ]


def test_shares_of_the_training_patients_are_nested_and_never_divide_a_patient():
    shares = [
        choose_split(cases(20), fold=0, num_folds=5, part=TrainPart(train_fraction=share))
        for share in (0.01, 0.1, 0.5, 1.0)
    ]
    patients = [{case.patient for case in split.train} for split in shares]
    assert [len(part) for part in patients] == [1, 2, 8, 16]
    assert patients[0] <= patients[1] <= patients[2] <= patients[3]
    assert all(len(split.train) == 2 * len(part) for split, part in zip(shares, patients, strict=True))
    assert len({split.val for split in shares}) == 1


def test_a_known_window_gives_no_warning(ball_set, tmp_path):
    save_encoder(tmp_path / "pre" / "encoder")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*encoder learned.*")
        tune(ball_set, tmp_path / "run", weights=str(tmp_path / "pre"), max_steps=1)


def test_a_run_is_not_resumed_from_other_weights(ball_set, tmp_path):
    save_encoder(tmp_path / "encoder", seed=1)
    out = tune(ball_set, tmp_path / "run", weights=str(tmp_path / "encoder"), max_steps=1)
    save_encoder(tmp_path / "encoder", seed=2)
    with pytest.raises(ConfigError, match="other weights"):
        tune(ball_set, out, weights=str(tmp_path / "encoder"), max_steps=1, resume=True)


REGIONS = {"ball and core": [2, 5], "core": [5]}


def test_overlapping_regions_are_learned_scored_and_predicted(ball_set, tmp_path):
    task = {**TASK, "regions": REGIONS, "deep_supervision": True}
    changes = {"max_steps": 40, "batch_size": 2, "optim": Optimisation(learning_rate=5e-3)}
    run = tune(ball_set, tmp_path / "run", task=task, **changes)
    best = read_card(run, ("segmenter",))["scores"]
    assert set(best) == {"dice", "dice/ball and core", "dice/core"} and best["dice"] > 0.6
    predict(str(run), str(tmp_path / "out"))
    predicted = {int(value) for path in (tmp_path / "out").glob("*.nii.gz") for value in np.unique(read(path))}
    assert predicted == {0, 2, 5}


def read(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_an_ignored_label_is_neither_learned_nor_scored(ball_set, tmp_path):
    run = tune(ball_set, tmp_path / "run", task={**TASK, "ignore_label": 5}, batch_size=1)
    assert set(read_card(run, ("segmenter",))["scores"]) <= {"dice", "dice/ball"}
    predict(str(run), str(tmp_path / "out"))
    assert all(set(np.unique(read(path))) <= {0, 2} for path in (tmp_path / "out").glob("*.nii.gz"))


def partial_list(data: Path, folder: Path, names: list[str]) -> Path:
    """A list of the ball set with a column of annotated labels."""
    rows = ["image,label,labels"]
    for index, labels in enumerate(names):
        rows.append(f"{data}/imagesTr/ball_{index}.nii.gz,{data}/labelsTr/ball_{index}.nii.gz,{labels}")
    path = folder / "part.csv"
    path.write_text("\n".join(rows))
    return path


def test_cases_annotated_in_part_are_trained_on_from_a_list_and_from_a_cache_of_it(ball_set, tmp_path, capsys):
    data = partial_list(ball_set, tmp_path, ["", "2", "2", "5", "", "2;5"])
    run = tune(data, tmp_path / "run", batch_size=2)
    assert "annotated in part" in capsys.readouterr().out
    again = tune(run / "cache", tmp_path / "again", batch_size=2)
    assert "annotated in part" in capsys.readouterr().out
    losses = [[line["loss"] for line in read_run(path).metrics if "loss" in line] for path in (run, again)]
    assert losses[0] == losses[1]


def test_an_annotated_label_that_there_is_not_is_refused(ball_set, tmp_path):
    data = partial_list(ball_set, tmp_path, ["", "2", "7", "5", "", "2;5"])
    with pytest.raises(DataError, match=r"annotations of '7'"):
        tune(data, tmp_path / "run", batch_size=2)


def test_a_frozen_encoder_is_exported_as_it_was(ball_set, tmp_path):
    encoder = save_encoder(tmp_path / "pre" / "encoder")
    task = {**TASK, "freeze_encoder": True}
    run = tune(ball_set, tmp_path / "run", weights=str(tmp_path / "pre"), task=task, batch_size=1)
    tuned = load_encoder(run).state_dict()
    assert all(torch.equal(value, tuned[key]) for key, value in encoder.state_dict().items())
    with pytest.warns(UserWarning, match="drawn at random"):
        tune(ball_set, tmp_path / "scratch", task=task, batch_size=1)


def test_few_patients_are_chosen_by_number_or_by_list(ball_set, tmp_path):
    (tmp_path / "few.txt").write_text("ball_0\nball_1\nball_2\nball_3\nball_4\nball_5\n")
    shared = {"cache": str(tmp_path / "cache"), "batch_size": 1}
    one = tune(ball_set, tmp_path / "one", train_cases=1, **shared)
    listed = tune(ball_set, tmp_path / "listed", train_list=str(tmp_path / "few.txt"), **shared)
    other = tune(ball_set, tmp_path / "other", split_seed=1, **shared)
    splits = [json.loads((run / "split.json").read_text()) for run in (one, listed, other)]
    assert [len(split["train"]) for split in splits] == [1, 4, 4]
    assert splits[0]["val"] == splits[1]["val"] != splits[2]["val"]


@pytest.mark.parametrize("how", ["mean", "repeat"])
def test_input_layers_are_adapted_as_asked_and_that_is_said(tmp_path, capsys, how):
    data = two_channels(tmp_path)
    save_encoder(tmp_path / "pre" / "encoder")
    changes = {"weights": str(tmp_path / "pre"), "backbone": None, "num_folds": 2, "batch_size": 1}
    with pytest.warns(UserWarning, match=rf"input_layers {how}"):
        tune(data, tmp_path / "run", input_layers=how, **changes)
    assert "1 of them adapted to the input's channels" in capsys.readouterr().out


def test_regions_of_labels_that_are_not_declared_are_refused_before_the_run_folder_is_made(ball_set, tmp_path):
    task = {**TASK, "regions": {"ball": [2, 3]}, "region_values": [2]}
    with pytest.raises(ConfigError, match=r"region 'ball' names label value 3, but it must be one of 2, 5"):
        tune(ball_set, tmp_path / "run", task=task)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_the_decoder_that_was_planned_when_it_began(
    ball_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(Backbone, "segmentation_decoder", "unet")
    tune(ball_set, out, checkpoint_every=1)
    (out / "checkpoints" / "step_00000002.pt").unlink()
    monkeypatch.setattr(Backbone, "segmentation_decoder", "additive")
    tune(ball_set, out, checkpoint_every=1, resume=True)
    assert read_card(out, ("segmenter",))["task"]["decoder"] == "unet"
    other = tune(ball_set, tmp_path / "other", max_steps=1)
    assert read_card(other, ("segmenter",))["task"]["decoder"] == "additive"
