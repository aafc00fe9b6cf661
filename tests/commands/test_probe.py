"""Probing as a command, and during pre-training: what it says, what it refuses, what it leaves as it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mim3d.caching.cache import open_cache
from mim3d.commands.pretrain import pretrain
from mim3d.commands.probe import probe
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.run_folder import read_run
from mim3d.core.settings import write_yaml
from mim3d.datasets.cases import Case, CaseSet
from mim3d.phantoms.dataset import PhantomSettings
from mim3d.probing.settings import Probing
from mim3d.reporting.charts import curve_names
from mim3d.reporting.sources import NamedRun
from mim3d.training.checkpoint import read_checkpoint
from mim3d.training.schedule import Optimisation
from mim3d.weights import load_encoder, read_card, weights_digest
from mim3d.workflows.probe import cases as probe_cases
from mim3d.workflows.probe.monitor import ProbePlan
from mim3d.workflows.shared.held_out import FoldChoice, choose_split
from tests.commands.conftest import BACKBONE
from tests.commands.test_pretrain import METHOD
from tests.labelled import ball_scan, write_scan
from tests.weights.test_weights import published_file

SMALL = {"num_folds": 3, "num_workers": 0, "num_bootstrap": 100, "probing": Probing(clear_ratio=0.5)}


def learn(data: Path, out: Path, **changes: object) -> Path:
    settings = {"method": METHOD, "backbone": BACKBONE, "max_steps": 4, "num_workers": 0, "log_every": 1}
    settings |= {"memory_limit": 0.0, **changes}
    return Path(pretrain(str(data), str(out), optim=Optimisation(learning_rate=1e-3), **settings))


@pytest.fixture(scope="module")
def watched(ball_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pre-training with a probe on the same scans."""
    out = tmp_path_factory.mktemp("watched") / "run"
    return learn(ball_set, out, probe=str(ball_set), probe_every=2, checkpoint_every=2, memory_limit=None)


def test_every_set_of_features_is_scored_with_intervals_and_held_against_random_and_raw(ball_set, watched, tmp_path):
    out = tmp_path / "probe.json"
    content = probe([str(watched), str(watched / "encoder_last")], str(ball_set), str(out), **SMALL)
    assert json.loads(out.read_text()) == content
    kinds = [row["kind"] for row in content["features"]]
    assert kinds == ["encoder", "encoder", "random", "intensities", "place"]
    first, second, random, raw, _ = content["features"]
    assert content["num_scans"] == {"training": 4, "held_out": 2}
    assert set(first["items"]) == {"background", "ball", "core"}
    assert set(first["linear"]["per_class_f1"]) == set(first["items"])
    low, high = first["linear"]["ci95"]["balanced_accuracy"]
    assert low <= first["linear"]["balanced_accuracy"] <= high
    less = first["linear"]["less"]["random"]["balanced_accuracy"]
    expected = first["linear"]["balanced_accuracy"] - random["linear"]["balanced_accuracy"]
    assert less["difference"] == pytest.approx(expected)
    assert first["name"] in second["linear"]["less"]
    assert raw["collapse"] is None and 1 <= random["collapse"]["effective_rank"] <= 16
    # Balls differ from their surroundings in brightness alone: intensities tell them.
    assert raw["linear"]["balanced_accuracy"] > 0.8


def test_scores_of_other_weights_and_other_files_are_not_replaced(ball_set, watched, tmp_path):
    out = tmp_path / "probe.json"
    for content, message in [
        ({"kind": "probe", "settings": {"weights": "other", "data": str(ball_set)}}, "holds scores of other on"),
        ({"kind": "segmentation", "settings": {}}, "holds no scores of a probe"),
        ([1], "holds no scores of a probe"),
    ]:
        out.write_text(json.dumps(content))
        with pytest.raises(ConfigError, match=message):
            probe(str(watched), str(ball_set), str(out), **SMALL)


def test_the_same_probe_gives_the_same_numbers(ball_set, watched):
    one, other = (probe(str(watched), str(ball_set), **SMALL) for _ in range(2))
    assert one == other


def test_layers_that_the_weights_do_not_fill_are_drawn_from_the_seed(ball_set, watched, tmp_path):
    rows = ["image,label"]
    for image in sorted((ball_set / "imagesTr").glob("*.nii.gz")):
        rows.append(f"{image};{image},{ball_set / 'labelsTr' / image.name}")
    (tmp_path / "two.csv").write_text("\n".join(rows))
    found = []
    for _ in range(2):
        torch.rand(1)
        with pytest.warns(UserWarning, match="the layers that read the input start anew"):
            found.append(probe(str(watched), str(tmp_path / "two.csv"), input_layers="new", **SMALL))
    assert found[0] == found[1]


def test_a_table_cuts_no_number_short_on_80_columns(ball_set, watched, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    shutil.copytree(watched, tmp_path / "a_run_with_a_name_that_is_longer_than_what_fits_into_a_column")
    paths = [str(watched), *map(str, tmp_path.iterdir())]
    content = probe(paths, str(ball_set), **SMALL)
    shown = capsys.readouterr().out
    assert "\u2026" not in shown and max(map(len, shown.splitlines()[-40:])) <= 80
    for row in content["features"]:
        low, high = row["neighbours"]["ci95"]["balanced_accuracy"]
        assert f"{low:.3f} to {high:.3f}" in shown
        assert f"{row['linear']['balanced_accuracy']:.3f}" in shown


def test_all_maps_make_wider_features(ball_set, watched):
    content = probe(str(watched), str(ball_set), **{**SMALL, "probing": Probing(features="all", clear_ratio=0.5)})
    assert content["features"][0]["num_features"] == 8 + 16


def test_classes_of_scans_are_probed_with_auc(watched, tmp_path):
    rows = ["image,class,patient"]
    for index in range(8):
        image, _ = ball_scan(index)
        write_scan(tmp_path / f"{index}.nii.gz", image * (1 + index % 2))
        rows.append(f"{index}.nii.gz,{('dim', 'bright')[index % 2]},p{index}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    content = probe(str(watched), str(tmp_path / "list.csv"), **{**SMALL, "num_folds": 2})
    assert content["target"] == "classes"
    assert set(content["features"][0]["items"]) == {"dim", "bright"}
    assert all(0 <= row[kind]["auc"] <= 1 for row in content["features"] for kind in ("linear", "neighbours"))


def test_held_out_scans_that_were_learned_from_are_told_and_refused_under_strict(ball_set, watched, capsys):
    with pytest.warns(UserWarning, match="2 of 2 held-out cases are in the pre-training data"):
        content = probe(str(watched), str(ball_set), **SMALL)
    assert [row["kind"] for row in content["warnings"]] == ["leak", "leak"]
    marked = [row["kind"] for row in content["features"] if row["name"].endswith(" *")]
    assert marked == ["encoder"] and "\n* learned from held-out scans" in capsys.readouterr().out
    with pytest.raises(DataError, match="strict: refused"):
        probe(str(watched), str(ball_set), strict=True, **SMALL)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"out": "scores.txt"}, "ends in .json"),
        ({"out": "/nowhere/scores.json"}, "no folder that can be written to"),
        ({"weights": []}, "weights is empty"),
        ({"fold": 7}, "fold 7 of 3 does not exist"),
        ({"probing": Probing(crop_size=6)}, "is not a multiple of stride 4"),
        ({"num_bootstrap": 5}, "makes no interval"),
    ],
)
def test_settings_that_cannot_work_are_refused(ball_set, watched, changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        probe(**{"weights": str(watched), "data": str(ball_set), **SMALL, **changes})


def test_scans_without_labels_and_labels_finer_than_tokens_are_refused(ball_set, watched, tmp_path):
    with pytest.raises(DataError, match="no scan has a label map or a class"):
        probe(str(watched), str(ball_set / "imagesTr"), **SMALL)
    shutil.copytree(ball_set, tmp_path / "data")
    for path in (tmp_path / "data" / "labelsTr").iterdir():
        _, label = ball_scan(0, (22 + int(path.name[5]), 20, 18))
        sparse = label * 0
        sparse[10, 10, 9] = 2
        write_scan(path, sparse)
    with pytest.raises(DataError, match=r"Fewer than two labels fill 60% of a token.*none does for ball, core"):
        probe(str(watched), str(tmp_path / "data"), **{**SMALL, "probing": Probing()})


def test_the_curve_lies_beside_the_loss_and_the_references_in_the_manifest(watched):
    record = read_run(watched)
    lines = [line for line in record.metrics if "val/probe_linear" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert {"val/probe_knn", "val/feature_std", "val/effective_rank"} <= set(lines[0])
    drawn, _ = curve_names([NamedRun("run", "#000000", record)])
    assert {"val/probe_linear", "val/probe_knn", "val/feature_std", "val/effective_rank"} <= set(drawn)
    noted = record.manifest["derived"]["probe"]
    assert set(noted["random"]) > {"probe_linear", "probe_knn"} == set(noted["intensities"]) == set(noted["place"])


def test_the_encoder_is_the_best_one_and_says_its_step_and_scores(watched):
    lines = {line["step"]: line for line in read_run(watched).metrics if "val/probe_linear" in line}
    best = max(sorted(lines), key=lambda step: lines[step]["val/probe_linear"])
    card, last = read_card(watched), read_card(watched / "encoder_last")
    assert (card["step"], last["step"]) == (best, 4)
    assert card["probe"]["probe_linear"] == lines[best]["val/probe_linear"]
    trained = read_checkpoint(watched / "checkpoints" / "step_00000004.pt")["objective"]
    for name, value in load_encoder(watched / "encoder_last").state_dict().items():
        assert torch.equal(value, trained[f"encoder.{name}"])


def test_a_probe_changes_nothing_of_what_is_learned(ball_set, watched, tmp_path):
    alone = learn(ball_set, tmp_path / "alone")
    one, other = (load_encoder(path).state_dict() for path in (alone, watched / "encoder_last"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    losses = [[line["loss"] for line in read_run(path).metrics if "loss" in line] for path in (alone, watched)]
    assert losses[0] == losses[1]


def test_a_resumed_run_has_the_curve_and_the_encoders_of_one_that_was_never_stopped(ball_set, watched, tmp_path):
    settings = {"probe": str(ball_set), "probe_every": 2, "checkpoint_every": 2}
    run = learn(ball_set, tmp_path / "run", **settings)
    # As if it had been killed after step 2.
    for path in (run / "checkpoints").glob("*_00000004.pt"):
        path.unlink()
    again = learn(ball_set, run, resume=True, **settings)
    curves = [[line for line in read_run(path).metrics if "val/probe_linear" in line] for path in (again, watched)]
    assert [line["val/effective_rank"] for line in curves[0]] == [line["val/effective_rank"] for line in curves[1]]
    assert read_card(again)["step"] == read_card(watched)["step"]
    one, other = (load_encoder(path).state_dict() for path in (again, watched))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_fold_that_fine_tuning_holds_out_takes_no_part_in_the_choice(ball_set, tmp_path):
    run = learn(ball_set, tmp_path / "run", probe=str(ball_set), fold=0, num_folds=3, max_steps=1)
    cases = {scan.case.id for scan in open_cache(run / "probe" / "cache")}
    assert len(cases) == 4


def test_neither_fold_of_label_maps_nor_fold_of_classes_takes_part_in_the_choice():
    cases = [
        Case(id=f"{n}", images=("a",), patient=f"{n}", label="l" if n % 3 else None, class_name="xy"[n % 2])
        for n in range(18)
    ]
    source = CaseSet(root="", form="csv", cases=tuple(cases), labels={})
    plan = ProbePlan("data", None, None, FoldChoice(0, 3, 0), (8, 8, 8), seed=0)
    chosen = {case.patient for case in plan.choose(source).cases}
    for dealt in (cases, [case for case in cases if case.label is not None]):
        held_out = {case.patient for case in choose_split(dealt, fold=0, num_folds=3).val}
        assert held_out and not held_out & chosen


def test_phantoms_stand_in_for_labelled_scans(ball_set, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_cases, "PHANTOMS", PhantomSettings(num_cases=3, size=(32, 32, 32), seed=0))
    run = learn(ball_set, tmp_path / "run", probe="phantom", max_steps=1)
    assert "lungs" in read_run(run).manifest["derived"]["probe"]["names"]


def test_a_probe_that_cannot_work_is_refused_before_anything_is_made(ball_set, tmp_path):
    with pytest.raises(ConfigError, match="probe_every is 5, but there is no probe"):
        learn(tmp_path / "no data are read for this", tmp_path / "run", probe_every=5)
    with pytest.raises(DataError, match="no scan has a label map or a class"):
        learn(ball_set, tmp_path / "run", probe=str(ball_set / "imagesTr"))
    scan = ball_set / "imagesTr" / "ball_0.nii.gz"
    (tmp_path / "two.csv").write_text(f"image\n{scan};{scan}\n")
    with pytest.raises(ConfigError, match="phantom, which has one channel"):
        learn(tmp_path / "two.csv", tmp_path / "run", probe="phantom", backbone={**BACKBONE, "in_channels": 2})
    assert not (tmp_path / "run").exists()


def test_published_weights_of_others_are_probed_as_they_come(tmp_path):
    published_file(tmp_path / "mim.pth")
    # Its tokens are 16 voxels wide, wider than the balls.
    halves = np.zeros((48, 32, 32), np.uint8)
    halves[:16] = 1
    for case in range(4):
        noise = np.random.default_rng(case).normal(0, 10, halves.shape)
        write_scan(tmp_path / f"data/imagesTr/half_{case}.nii.gz", (noise + 100 * halves).astype(np.float32))
        write_scan(tmp_path / f"data/labelsTr/half_{case}.nii.gz", halves)
    changes = {"num_folds": 2, "num_workers": 0, "num_bootstrap": 100, "backbone": {"num_heads": 3}}
    content = probe(str(tmp_path / "mim.pth"), str(tmp_path / "data"), **changes)
    encoder = content["features"][0]
    assert encoder["backbone"]["widths"] == [12, 24, 48, 96]
    assert encoder["weights_sha256"] == weights_digest(tmp_path / "mim.pth")


def test_weights_that_are_not_there_are_named(ball_set, tmp_path):
    with pytest.raises(CheckpointError, match="nothing does not exist"):
        probe(str(tmp_path / "nothing"), str(ball_set), **SMALL)


@pytest.mark.slow
def test_of_two_processes_the_first_probes(ball_set, tmp_path):
    write_yaml(tmp_path / "two.yaml", {"method": METHOD, "backbone": BACKBONE})
    command = f"{sys.executable} -m mim3d pretrain --config {tmp_path}/two.yaml --data {ball_set} --out {tmp_path}/run"
    flags = f"--probe {ball_set} --max_steps 2 --probe_every 1 --devices 2 --accelerator cpu --num_workers 0"
    done = subprocess.run([*command.split(), *flags.split()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line["step"] for line in read_run(tmp_path / "run").metrics if "val/probe_linear" in line]
    assert lines == [1, 2]
    assert "the best by the probe" in done.stdout
