"""Classification from the command's side: a list with classes in, a table of probabilities out."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from mim3d.commands.evaluate import evaluate
from mim3d.commands.finetune import finetune
from mim3d.commands.predict import predict
from mim3d.commands.report import report
from mim3d.core.errors import CheckpointError, ConfigError, DataError
from mim3d.core.resources import choose_device
from mim3d.core.run_folder import read_run, recipe_differences
from mim3d.core.warned import UnchosenWarning
from mim3d.datasets.cases import Case
from mim3d.scans.intensity import Intensity
from mim3d.tasks.classification.prediction import box_of_scan, classes_of, prepare_scan
from mim3d.tasks.trained import load_trained
from mim3d.training.schedule import Optimisation
from mim3d.weights import load_encoder, read_card
from tests.commands.conftest import BACKBONE
from tests.labelled import write_scan
from tests.miniatures import write_cc_ccii

TASK = {"name": "classification", "cube_mm": 16, "size": 8, "augmentation": {"flip_axes": [0]}, "mirror_axes": [0]}


def write_set(folder: Path, num_cases: int = 12, noise: float = 5.0) -> Path:
    """Dark and bright balls in volumes of mixed voxel sizes, two for each patient, as a list."""
    rows = ["image,label,class,patient"]
    for index in range(num_cases):
        rng = np.random.default_rng(index)
        spacing_mm = (1.0, 1.0, 1.0) if index % 3 else (0.8, 0.8, 2.0)
        shape = tuple(round((20 + index % 2) / edge) for edge in spacing_mm)
        places = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1) * spacing_mm
        label = (np.linalg.norm(places - 9 - rng.uniform(-2, 2, 3), axis=-1) < 5).astype(np.uint8)
        name = "bright" if index // 2 % 2 else "dark"
        image = rng.normal(100, noise, shape) + label * (300.0 if name == "bright" else -60.0)
        affine = np.diag([*spacing_mm, 1.0])
        write_scan(folder / f"image_{index}.nii.gz", image.astype(np.float32), affine)
        write_scan(folder / f"label_{index}.nii.gz", label, affine)
        rows.append(f"image_{index}.nii.gz,label_{index}.nii.gz,{name},patient_{index // 2}")
    (folder / "list.csv").write_text("\n".join(rows) + "\n")
    return folder / "list.csv"


def tune(data: Path, out: Path, **changes: object) -> Path:
    settings = {
        "task": TASK,
        "backbone": BACKBONE,
        "intensity": Intensity(window=(0.0, 500.0)),
        "num_folds": 3,
        "max_steps": 40,
        "batch_size": 4,
        "validate_every": 20,
        "num_workers": 0,
        "optim": Optimisation(learning_rate=1e-2),
        "pictures_every": 20,
        **changes,
    }
    return Path(finetune(str(data), str(out), **settings))


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def classify(weights: list[Path], out: Path, inputs: Path | None = None, **changes: object) -> Path:
    settings = {"batch_size": 3, "accelerator": "cpu", **changes}
    names = [str(path) for path in weights]
    return Path(predict(names, str(out), None if inputs is None else str(inputs), **settings))


@pytest.fixture(scope="module")
def class_list(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of twelve scans of six patients."""
    return write_set(tmp_path_factory.mktemp("balls"))


@pytest.fixture(scope="module")
def run(class_list: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned to tell dark from bright balls."""
    return tune(class_list, tmp_path_factory.mktemp("runs") / "classes")


def test_fine_tuning_keeps_the_classifier_that_ranks_best_with_its_card(run):
    record = read_run(run)
    scores = [line for line in record.metrics if "val/auc" in line]
    assert max(line["val/auc"] for line in scores) == 1.0
    assert "val/auc_patient" in scores[-1]
    assert {"loss/cross_entropy", "accuracy"} <= set(next(line for line in record.metrics if "loss" in line))
    card = read_card(run / "classifier")
    assert card["labels"] == {"0": "bright", "1": "dark"}
    assert card["task"]["centre"] == "label" and card["task"]["cube_mm"] == [16, 16, 16]
    assert set(np.load(record.pictures[40])) == {"classification/image"}
    assert load_encoder(run).recipe.widths == (8, 16)


def test_validation_and_evaluation_of_the_kept_weights_find_the_same_scores(tmp_path):
    # Noise and hardly trained, so that mirrored boxes and the seventh digit of a probability change the order of scans.
    scans = write_set(tmp_path / "noise", num_cases=24, noise=400.0)
    run = tune(scans, tmp_path / "run", max_steps=2, validate_every=1, optim=Optimisation(learning_rate=1e-4))
    out = classify([run], tmp_path / "out")
    scores = tmp_path / "scores.json"
    evaluate(predictions=str(out), references=str(run / "held_out.csv"), out=str(scores), num_bootstrap=0)
    mean = json.loads(scores.read_text())["mean"]
    kept = read_card(run)["scores"]
    shared = mean.keys() & kept.keys()
    assert {"auc", "accuracy"} <= shared
    assert {name: mean[name] for name in shared} == pytest.approx({name: kept[name] for name in shared}, abs=1e-12)


def test_held_out_cases_of_one_class_have_no_auc_so_the_last_weights_are_kept(tmp_path):
    scans = write_set(tmp_path / "set")
    (tmp_path / "held.txt").write_text("patient_0\npatient_2\n")
    with pytest.warns(UnchosenWarning, match="all held-out cases are of class dark"):
        run = tune(scans, tmp_path / "run", max_steps=4, validate_every=1, held_out_list=str(tmp_path / "held.txt"))
    record = read_run(run)
    assert [line["val/auc"] for line in record.metrics if "val/accuracy" in line] == [None] * 4
    card = read_card(run)
    assert card["step"] == 4 and card["scores"] == {}
    report([str(run)], str(tmp_path / "report.html"))
    assert "of class dark" in (tmp_path / "report.html").read_text()


def test_the_held_out_scans_of_the_run_are_classified_with_their_patients_in_a_table(run, tmp_path):
    rows = rows_of(classify([run], tmp_path / "out") / "predictions.csv")
    held_out = rows_of(run / "held_out.csv")
    assert list(rows[0]) == ["id", "patient", "predicted", "probability_bright", "probability_dark"]
    assert [row["patient"] for row in rows] == [row["patient"] for row in held_out]
    bright = {row["class"]: [] for row in held_out}
    for row, case in zip(rows, held_out, strict=True):
        bright[case["class"]].append(float(row["probability_bright"]))
        likelier = "bright" if float(row["probability_bright"]) > 0.5 else "dark"
        assert row["predicted"] == likelier
    assert min(bright["bright"]) > max(bright["dark"])
    assert all(float(row["probability_bright"]) + float(row["probability_dark"]) == pytest.approx(1) for row in rows)
    assert rows_of(tmp_path / "out" / "failed.csv") == []


def test_a_scan_that_cannot_be_used_is_listed_and_does_not_stop_the_others(run, class_list, tmp_path):
    lines = class_list.read_text().splitlines()[:4]
    folder = class_list.parent
    absolute = [",".join(str(folder / cell) if ".nii" in cell else cell for cell in row.split(",")) for row in lines]
    (tmp_path / "list.csv").write_text("\n".join([*absolute, f"{tmp_path / 'gone.nii.gz'},,bright,other"]))
    with pytest.raises(DataError, match="1 of 4 scans could not be classified"):
        classify([run], tmp_path / "out", tmp_path / "list.csv")
    assert [row["id"] for row in rows_of(tmp_path / "out" / "predictions.csv")] == ["image_0", "image_1", "image_2"]
    (failed,) = rows_of(tmp_path / "out" / "failed.csv")
    assert failed["id"] == "gone" and "no label" in failed["reason"]


def test_what_is_finished_is_kept_and_predictions_of_other_weights_are_not_mixed_in(run, class_list, tmp_path):
    out = classify([run], tmp_path / "out", class_list)
    path = out / "classification.json"
    content = json.loads(path.read_text())
    content["cases"][0]["probabilities"] = [0.25, 0.75]
    path.write_text(json.dumps(content))
    classify([run], out, class_list)
    assert rows_of(out / "predictions.csv")[0]["probability_dark"] == "0.75"
    path.write_text(path.read_text().replace(content["weights_digests"][0], "0" * 64))
    with pytest.raises(ConfigError, match="predictions of other networks"):
        classify([run], out, class_list)
    classify([run], out, class_list, overwrite=True)
    assert rows_of(out / "predictions.csv")[0]["probability_dark"] != "0.750000"


def test_several_classifiers_are_averaged(run, class_list, tmp_path):
    other = tune(class_list, tmp_path / "other", max_steps=4, validate_every=4, seed=1)
    tables = [
        rows_of(classify(weights, tmp_path / f"out_{index}") / "predictions.csv")
        for index, weights in enumerate([[run], [other], [run, other]])
    ]
    for one, two, both in zip(*tables, strict=True):
        mean = (float(one["probability_dark"]) + float(two["probability_dark"])) / 2
        assert float(both["probability_dark"]) == pytest.approx(mean, abs=2e-6)


def test_classifiers_that_held_out_other_cases_or_know_other_classes_are_not_averaged(run, class_list, tmp_path):
    other = tune(class_list, tmp_path / "other", max_steps=2, validate_every=2, fold=1)
    with pytest.raises(ConfigError, match="held out different cases"):
        classify([run, other], tmp_path / "out")
    renamed = class_list.parent / "renamed.csv"
    renamed.write_text(class_list.read_text().replace(",dark,", ",black,"))
    third = tune(renamed, tmp_path / "third", max_steps=2, validate_every=2)
    with pytest.raises(ConfigError, match=r"has other classes \(black, bright\) than"):
        classify([run, third], tmp_path / "out", class_list)


def test_lists_without_classes_are_refused_before_anything_is_made(class_list, tmp_path):
    plain = class_list.parent / "plain.csv"
    plain.write_text("\n".join(",".join(row.split(",")[:2]) for row in class_list.read_text().splitlines()))
    with pytest.raises(DataError, match=r"none of .* can be used: .*no class for"):
        tune(plain, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masks_are_not_needed_then_boxes_lie_in_the_middle_of_scans(class_list, tmp_path):
    rows = [row.split(",") for row in class_list.read_text().splitlines()]
    plain = class_list.parent / "no_masks.csv"
    plain.write_text("\n".join(",".join([row[0], *row[2:]]) for row in rows))
    run = tune(plain, tmp_path / "run", max_steps=2, validate_every=2)
    assert read_card(run / "classifier")["task"]["centre"] == "scan"
    assert len(rows_of(classify([run], tmp_path / "out") / "predictions.csv")) == 4


def test_the_box_of_a_file_is_the_box_of_the_cache(run, class_list):
    from mim3d.caching.cache import open_cache
    from mim3d.loading.samples import SampleDataset
    from mim3d.tasks.classification.cubes import CubeFinisher

    classifier = load_trained(run)
    for scan in list(open_cache(run / "cache"))[:3]:
        sampler = classifier.task.exact_sampler(classes_of(classifier))
        cached = SampleDataset([scan], sampler, classifier.intensity, 0, CubeFinisher())[0]["image"][0]
        read = box_of_scan(classifier, prepare_scan(classifier, scan.case))
        np.testing.assert_allclose(read, cached.numpy(), atol=1e-4)


def test_a_scan_of_other_channels_or_without_its_label_is_refused_in_a_sentence(run, class_list):
    classifier = load_trained(run)
    image = str(class_list.parent / "image_0.nii.gz")
    with pytest.raises(DataError, match="2 images"):
        prepare_scan(classifier, Case(id="a", images=(image, image), patient="a"))
    with pytest.raises(DataError, match="boxes around labelled structures"):
        prepare_scan(classifier, Case(id="a", images=(image,), patient="a"))


def test_other_networks_are_no_classifiers(segmenter_run):
    with pytest.raises(CheckpointError, match="classifier"):
        load_trained(segmenter_run, task="classification")
    with pytest.raises(CheckpointError, match="another task"):
        load_trained(segmenter_run / "segmenter", task="classification")


def test_devices_are_chosen_by_name():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="use one of auto, cpu"):
        choose_device("tpu")


def files_of_one_name(folder: Path) -> dict[str, object]:
    """Scans that only their folders tell apart."""
    rows = [f"{index}/ct.nii.gz,{'ab'[index % 2]},p{index}" for index in range(6)]
    for index in range(6):
        write_scan(folder / str(index) / "ct.nii.gz", np.random.default_rng(index).normal(size=(8, 8, 8)))
    (folder / "list.csv").write_text("\n".join(["image,class,patient", *rows]))
    return {"data": folder / "list.csv"}


def channels(folder: Path) -> dict[str, object]:
    """Scans of two channels, in files of one name as well."""
    rows = [f"{index}/t1.nii.gz;{index}/t2.nii.gz,{'ab'[index % 2]},p{index}" for index in range(6)]
    for index in range(6):
        for name in ("t1", "t2"):
            write_scan(folder / str(index) / f"{name}.nii.gz", np.random.default_rng(index).normal(size=(8, 8, 8)))
    (folder / "list.csv").write_text("\n".join(["image,class,patient", *rows]))
    return {"data": folder / "list.csv", "backbone": {**BACKBONE, "in_channels": 2}}


def slice_folders(folder: Path) -> dict[str, object]:
    """CC-CCII in miniature."""
    write_cc_ccii(folder)
    return {"data": folder, "preset": "CC-CCII", "num_folds": 5, "intensity": None}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("write", [files_of_one_name, channels, slice_folders])
def test_the_list_of_held_out_cases_serves_prediction_and_scoring_alike(write, tmp_path):
    quick = {"max_steps": 2, "validate_every": 2, "pictures_every": None}
    run = tune(
        **{"out": tmp_path / "run", "task": {"name": "classification", "size": 8}, **quick, **write(tmp_path / "data")}
    )
    listed = rows_of(run / "held_out.csv")
    assert [row["id"] for row in listed] == [case["id"] for case in json.loads((run / "split.json").read_text())["val"]]
    for name, inputs in (("held_out", None), ("list", str(run / "held_out.csv"))):
        folder = predict(str(run), str(tmp_path / name), input=inputs, accelerator="cpu")
        assert [row["id"] for row in rows_of(Path(folder) / "predictions.csv")] == [row["id"] for row in listed]
        path = evaluate(folder, str(run / "held_out.csv"), str(tmp_path / f"{name}.json"), num_bootstrap=0)
        scores = json.loads(Path(path).read_text())
        assert scores["num_cases"] == len(listed) > 0
        assert scores["not_scored"] == {"without_reference": [], "without_prediction": []}


def test_the_list_that_was_trained_on_names_its_scans_as_prediction_does(run, class_list, tmp_path):
    for index in (0, 2):
        for kind in ("image", "label"):
            write = tmp_path / str(index) / f"{kind}.nii.gz"
            write.parent.mkdir(exist_ok=True)
            write.write_bytes((class_list.parent / f"{kind}_{index}.nii.gz").read_bytes())
    rows = [f"{index}/image.nii.gz,{index}/label.nii.gz,{name}" for index, name in ((0, "dark"), (2, "bright"))]
    (tmp_path / "list.csv").write_text("\n".join(["image,label,class", *rows]))
    out = classify([run], tmp_path / "out", tmp_path / "list.csv")
    path = evaluate(str(out), str(tmp_path / "list.csv"), str(tmp_path / "scores.json"), num_bootstrap=0)
    assert json.loads(Path(path).read_text())["num_cases"] == 2


def test_a_backbone_of_ones_own_reaches_the_loading_of_classifiers(run, class_list, tmp_path):
    card = json.loads((run / "classifier" / "card.json").read_text())
    foreign = tmp_path / "run" / "classifier"
    shutil.copytree(run / "classifier", foreign)
    (foreign / "card.json").write_text(json.dumps({**card, "backbone": {"name": "my_lab.Own"}}))
    with pytest.raises(ConfigError, match="my_lab"):
        predict(str(foreign), str(tmp_path / "refused"), input=str(class_list), accelerator="cpu")
    out = predict(
        str(foreign), str(tmp_path / "out"), input=str(class_list), backbone=card["backbone"], accelerator="cpu"
    )
    assert len(rows_of(Path(out) / "predictions.csv")) == 12


def test_schedules_and_recipes_of_other_runs_serve_classification_too(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data")
    first = tune(data, tmp_path / "first", max_steps=2, validate_every=0)
    tuned = tune(data, tmp_path / "tuned", weights=str(first), backbone=None, max_steps=20, validate_every=0)
    derived = json.loads((tuned / "manifest.json").read_text())["derived"]
    assert (derived["frozen_steps"], derived["warmup_steps"]) == (2, 2)
    frozen = tune(data, tmp_path / "frozen", weights=str(first), max_steps=2, schedule="frozen", validate_every=0)
    before, after = (load_encoder(str(run)).state_dict() for run in (first, frozen))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    scratch = Path(finetune(str(data), str(tmp_path / "scratch"), like=str(frozen), memory_limit=0))
    one, other = (json.loads((run / "manifest.json").read_text()) for run in (frozen, scratch))
    assert recipe_differences(one, other) == {}
    assert other["settings"]["task"]["freeze_encoder"] is False
    assert one["derived"]["task"] == {**other["derived"]["task"], "freeze_encoder": True}


def test_a_list_without_labels_that_are_asked_for_is_not_said_to_have_classes_to_learn(tmp_path):
    scans = write_set(tmp_path / "set", num_cases=4)
    rows = [line.split(",") for line in scans.read_text().splitlines()]
    scans.write_text("\n".join(",".join([row[0], *row[2:]]) for row in rows) + "\n")
    with pytest.raises(DataError, match="though centre is label; add its label map, or use centre scan") as refused:
        tune(scans, tmp_path / "run", task={**TASK, "centre": "label"})
    assert "learn those with" not in str(refused.value)
