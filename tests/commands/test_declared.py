"""What a data set declares of its labels and folds acts from the cache to the scores, below what the user sets."""

import json
from pathlib import Path

import numpy as np
import pytest

from mim3d.caching.cache import open_cache
from mim3d.commands.cache import cache
from mim3d.commands.evaluate import evaluate
from mim3d.commands.finetune import finetune
from mim3d.core.errors import ConfigError
from mim3d.core.settings import read_yaml
from mim3d.datasets.cases import read_cases
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.workflows.finetune.presets import with_declared
from mim3d.workflows.finetune.settings import FinetuneSettings
from tests.commands.conftest import BACKBONE, TASK
from tests.labelled import ball_scan, write_scan

REGIONS = {"ball and core": [2, 5], "core": [5]}
IGNORING = {"labels": {"background": 0, "ball": 2, "ignore": 5}}
NESTED = {"labels": {"background": 0, **REGIONS}, "regions_class_order": [7, 9]}


def write_set(folder: Path, content: dict, num_cases: int = 4) -> Path:
    """The ball set in the form of nnU-Net 2."""
    for index in range(num_cases):
        image, label = ball_scan(index)
        write_scan(folder / f"imagesTr/ball_{index}_0000.nii.gz", image)
        write_scan(folder / f"labelsTr/ball_{index}.nii.gz", label)
    description = {"channel_names": {"0": "MRI"}, "file_ending": ".nii.gz", **content}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def tune(data: Path, out: Path, **changes: object) -> Path:
    settings = {"task": TASK, "backbone": BACKBONE, "num_folds": 2, "max_steps": 2, "batch_size": 1, **changes}
    return Path(finetune(str(data), str(out), num_workers=0, **settings))


def test_an_ignored_value_is_a_setting_of_the_run_and_no_class(tmp_path, capsys):
    run = tune(write_set(tmp_path / "set", IGNORING), tmp_path / "run")
    assert "label value 5 is ignored, as the data set declares it" in capsys.readouterr().out
    assert read_yaml(run / "config.yaml")["task"]["ignore_label"] == 5
    scores = json.loads((run / "segmenter" / "card.json").read_text())["scores"]
    assert set(scores) <= {"dice", "dice/ball"}


def test_regions_and_their_values_are_settings_of_a_run_from_a_cache_too(tmp_path, capsys):
    made = Path(cache(str(write_set(tmp_path / "set", NESTED)), str(tmp_path / "cache"), num_workers=0))
    opened = open_cache(made)
    assert (opened.regions, opened.region_values) == ({"ball and core": (2, 5), "core": (5,)}, (7, 9))
    assert (opened.channels, opened.ignore_label) == (("MRI",), None)
    run = tune(made, tmp_path / "run")
    assert (
        "regions, as the data set declares them by label values: ball and core 2, 5; core 5" in capsys.readouterr().out
    )
    task = read_yaml(run / "config.yaml")["task"]
    assert (task["regions"], task["region_values"]) == (REGIONS, [7, 9])


def test_a_cache_keeps_the_ignored_value_and_its_digest_tells(tmp_path):
    data = write_set(tmp_path / "set", IGNORING)
    ignoring = open_cache(cache(str(data), str(tmp_path / "cache"), num_workers=0))
    assert (ignoring.ignore_label, ignoring.labels) == (5, {0: "background", 2: "ball"})
    write_set(tmp_path / "set", {"labels": {"background": 0, "ball": 2, "core": 5}})
    plain = open_cache(cache(str(data), str(tmp_path / "cache"), num_workers=0))
    assert (plain.ignore_label, plain.labels[5]) == (None, "core")
    assert plain.digest != ignoring.digest
    assert [scan.digest for scan in plain] == [scan.digest for scan in ignoring]


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("segmentation", (5, REGIONS, (7, 9))),
        ({"name": "segmentation", "ignore_label": 8}, (8, REGIONS, (7, 9))),
        ({"name": "segmentation", "regions": {"all": [2]}}, (5, {"all": [2]}, None)),
        ({"name": "segmentation", "regions": None, "ignore_label": None}, (None, None, None)),
        (Segmentation(ignore_label=8), (8, REGIONS, (7, 9))),
        ("classification", None),
    ],
)
def test_what_the_user_sets_wins(tmp_path, task, expected):
    source = read_cases(write_set(tmp_path, NESTED, num_cases=1))
    object.__setattr__(source, "ignore_label", 5)
    found = with_declared(FinetuneSettings("data", "out", task=task), source).task
    if expected is None:
        assert found == task
        return
    values = [
        found.get(n) if isinstance(found, dict) else getattr(found, n)
        for n in ("ignore_label", "regions", "region_values")
    ]
    regions = values[1] and {name: list(members) for name, members in values[1].items()}
    assert (values[0], regions, values[2] and tuple(values[2])) == expected


def test_what_was_said_of_the_data_stays_with_the_cache_and_the_run(tmp_path):
    data = write_set(tmp_path / "set", {"labels": {"ball": 2, "core": 5}, "clip": 3})
    with pytest.warns(UserWarning, match="clip is not used"):
        made = Path(cache(str(data), str(tmp_path / "cache"), num_workers=0))
    run = tune(made, tmp_path / "run")
    (note,) = json.loads((run / "manifest.json").read_text())["derived"]["data_notes"]
    assert "clip is not used" in note


def test_a_label_to_ignore_that_the_set_lacks_is_refused(tmp_path):
    data = write_set(tmp_path / "set", IGNORING, num_cases=2)
    with pytest.raises(ConfigError, match="ignore_label is 9, which is none of the label values 0, 2, 5"):
        tune(data, tmp_path / "run", task={**TASK, "ignore_label": 9})


def test_all_declared_folds_are_trained_by_one_command(tmp_path, capsys):
    data = write_set(tmp_path / "set", {"labels": {"ball": 2, "core": 5}})
    splits = [{"train": ["ball_2", "ball_3"], "val": ["ball_0", "ball_1"]}]
    splits += [{"train": ["ball_0", "ball_1"], "val": ["ball_2", "ball_3"]}]
    (data / "splits_final.json").write_text(json.dumps(splits))
    out = tune(data, tmp_path / "all", fold="all", num_folds=5)
    assert "declares 2 folds: 0, 1" in capsys.readouterr().out
    for fold, ids in enumerate((["ball_0", "ball_1"], ["ball_2", "ball_3"])):
        held_out = json.loads((out / f"fold_{fold}" / "split.json").read_text())["val"]
        assert [case["id"] for case in held_out] == ids
    with pytest.raises(ConfigError, match="declares the folds 0, 1, so fold cannot be 3"):
        tune(data, tmp_path / "one", fold=3)


def test_ignored_voxels_of_references_count_in_no_score(tmp_path):
    data = write_set(tmp_path / "set", IGNORING, num_cases=2)
    for index in range(2):
        label = ball_scan(index)[1]
        # Right where something is known, anything where nothing is.
        write_scan(
            tmp_path / "pred" / f"ball_{index}.nii.gz", np.where(label == 5, 2 * (index == 0), label).astype(np.uint8)
        )
    for references in (data, data / "labelsTr"):
        found = json.loads(
            Path(evaluate(str(tmp_path / "pred"), str(references), str(tmp_path / "s.json"))).read_text()
        )
        assert found["ignore_label"] == 5
        assert list(found["per_label"]) == ["ball"]
        assert found["per_label"]["ball"]["dice"] == 1.0


def test_regions_of_references_are_scored_where_predictions_declare_none(tmp_path):
    data = write_set(tmp_path / "set", NESTED, num_cases=1)
    write_scan(tmp_path / "pred" / "ball_0.nii.gz", ball_scan(0)[1])
    path = evaluate(str(tmp_path / "pred"), str(data / "labelsTr"), str(tmp_path / "s.json"))
    assert list(json.loads(Path(path).read_text())["per_label"]) == ["ball and core", "core"]


def test_a_label_that_no_case_to_train_on_holds_is_said_and_stays_with_the_run(tmp_path):
    data = write_set(tmp_path / "set", {"labels": {**IGNORING["labels"], "spleen": 9}})
    with pytest.warns(UserWarning, match="in none of the . cases to train on: spleen; nothing is learned of them"):
        run = tune(data, tmp_path / "run")
    assert json.loads((run / "manifest.json").read_text())["derived"]["labels_not_seen"] == ["spleen"]
