"""A user's own task in a package of its own: trained, predicted, scored and exported without an edit in mim3d."""

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from mim3d.backbones import create_recipe
from mim3d.commands.evaluate import evaluate
from mim3d.commands.export import export
from mim3d.commands.finetune import finetune
from mim3d.commands.predict import predict
from mim3d.core.errors import CheckpointError, ConfigError
from mim3d.methods import create_method
from mim3d.tasks import create_task, find_task
from mim3d.tasks.trained import load_trained
from mim3d.weights import read_card
from tests.commands.conftest import BACKBONE

SIZES = {"patch_size": [16, 16, 16], "feature_dim": 8}


def tuned(my_lab: Path, name: str, task: object) -> Path:
    out = my_lab / name
    finetune(
        *(str(my_lab / "balls"), str(out)),
        task=task,
        backbone=BACKBONE,
        num_folds=3,
        max_steps=4,
        validate_every=2,
        batch_size=2,
        num_workers=0,
        accelerator="cpu",
    )
    return out


@pytest.fixture(scope="module")
def my_segmenter(my_lab: Path) -> Path:
    """A run of a task that extends segmentation."""
    return tuned(my_lab, "my_seg", {"name": "my_lab.task.MySeg", "weight": 2.0, **SIZES})


@pytest.fixture(scope="module")
def my_measure(my_lab: Path) -> Path:
    """A run of a task that extends nothing but the contract."""
    return tuned(my_lab, "volume", "my_lab.task.Volume")


def test_a_task_that_extends_segmentation_goes_all_the_way(my_lab, my_segmenter, tmp_path):
    name = "my_lab.task.MySeg"
    assert read_card(my_segmenter / "my_segmenter")["task"]["name"] == name
    network = load_trained(my_segmenter, task=name)
    assert network.task.weight == 2.0 and network.task.patch_size == (16, 16, 16)
    out = Path(predict(str(my_segmenter), str(tmp_path / "out"), task=name, accelerator="cpu"))
    rows = json.loads((out / "predictions.json").read_text())["cases"]
    assert len(rows) == 2 and all((out / row["prediction"]).is_file() for row in rows)
    scores = evaluate(str(out), str(my_lab / "balls"), str(tmp_path / "scores.json"), num_bootstrap=0)
    assert json.loads(Path(scores).read_text())["num_cases"] == 2
    folder = Path(export(str(my_segmenter), str(tmp_path / "exported"), task=name))
    assert f"--task {name}" in (folder / "README.md").read_text()
    again = predict(str(folder), str(tmp_path / "again"), str(my_lab / "balls" / "imagesTr"), task=name)
    for row in rows:
        assert np.array_equal(
            *(np.asanyarray(nib.load(Path(each) / row["prediction"]).dataobj) for each in (out, again))
        )
    monai = Path(export(str(folder), str(tmp_path / "monai"), format="monai", task=name))
    assert json.loads((monai / "configs" / "metadata.json").read_text())["label_values"]["ball"] == 2


def test_a_task_of_a_new_kind_goes_all_the_way(my_measure, tmp_path):
    name = "my_lab.task.Volume"
    out = Path(predict(str(my_measure), str(tmp_path / "out"), task=name, accelerator="cpu"))
    rows = json.loads((out / "shares.json").read_text())["cases"]
    assert [row["share"] for row in rows] == [0.25, 0.25]
    scores = evaluate(str(out), str(tmp_path), str(tmp_path / "scores.json"), task=name)
    assert json.loads(Path(scores).read_text()) == {"kind": "shares", "predictions": str(out)}
    assert (tmp_path / "scores.csv").read_text().split() == ["id,error", "a,0.5"]
    folder = Path(export(str(my_measure), str(tmp_path / "pt2"), format="torch-export", task=name))
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["outputs"][0]["shape"] == ["batch", 1] and metadata["channels"] == ["share"]
    with pytest.raises(CheckpointError, match="a MONAI bundle is made of a segmenter"):
        export(str(my_measure), str(tmp_path / "monai"), format="monai", task=name)


def test_code_that_a_card_names_is_imported_only_when_the_user_names_it(
    my_measure, my_segmenter, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "my_lab.task", None)
    for act in (predict, export):
        with pytest.raises(ConfigError, match=r"task 'my_lab\.task\.Volume', which is none .* use --task my_lab"):
            act(str(my_measure), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"cannot be imported"):
        predict(str(my_measure), str(tmp_path / "out"), task="my_lab.task.Volume")
    # Its folder bears no name that mim3d knows: the task says which.
    with pytest.raises(CheckpointError, match="its own or in segmenter"):
        predict(str(my_segmenter), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_task_that_says_not_how_is_refused_in_a_sentence(my_measure, my_lab, tmp_path):
    task = "my_lab.task.OnlyTrains"
    with pytest.raises(ConfigError, match="OnlyTrains cannot predict"):
        predict(str(my_measure), str(tmp_path / "out"), task=task)
    with pytest.raises(ConfigError, match="cannot score predictions"):
        evaluate(str(tmp_path), str(my_measure), str(tmp_path / "scores.json"), task=task)
    with pytest.raises(ConfigError, match=r"OnlyTrains cannot be exported.*--network encoder"):
        export(str(my_measure), str(tmp_path / "out"), task=task)
    export(str(my_measure), str(tmp_path / "encoder"), task=task, network="encoder")


def test_another_task_than_that_of_the_card_is_refused(my_lab, tmp_path):
    plain = tuned(my_lab, "plain", {"name": "segmentation", **SIZES})
    with pytest.raises(CheckpointError, match=r"another task \(segmentation\) than my_lab\.task\.Volume"):
        predict(str(plain), str(tmp_path / "out"), task="my_lab.task.Volume")
    with pytest.raises(ConfigError, match=r"'my_lab\.task\.NoTask' does not extend"):
        create_task("my_lab.task.NoTask")
    with pytest.raises(ConfigError, match=r"backbone 'my_lab\.task\.NoTask' does not extend .*\.Backbone"):
        create_recipe("my_lab.task.NoTask")
    with pytest.raises(ConfigError, match=r"method 'my_lab\.task\.NoTask' does not extend .*\.Method"):
        create_method("my_lab.task.NoTask")
    with pytest.raises(ConfigError, match=r"There is no task 'segmentatio'.*segmentation"):
        find_task("segmentatio")
