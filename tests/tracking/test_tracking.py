"""Trackers: what they receive, what a resume makes of it, and that none of them can end a run."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mim3d.commands.pretrain import pretrain
from mim3d.core.errors import ConfigError
from mim3d.core.run_folder import Run, read_run
from mim3d.tracking import TrackedRun, Tracking
from mim3d.tracking.trackers import allowed_name, store_uris
from tests.tracking.fakes import FakeMLflow, FakeWandb

SETTINGS = {"data": "scans", "seed": 3, "optim": {"learning_rate": 1e-3}}
VOLUMES = {"coarse/original": np.random.default_rng(0).normal(size=(6, 4, 2)), "coarse/masked": np.zeros((6, 4, 2))}


def tracked(out: Path, *, resume: bool = False, **tracking: Any) -> TrackedRun:
    run = Run.create(out, command="pretrain", settings=SETTINGS, inputs={}, resume=resume)
    return TrackedRun.of(run, Tracking(**tracking))


def train(run: TrackedRun, first: int, last: int, loss: float = 1.0) -> None:
    """What the loop does of a session."""
    with run:
        run.cut_metrics(first)
        for step in range(first + 1, last + 1):
            run.log(step, {"loss": loss / step, "val/dice": float("nan") if step == 2 else 0.5})
        run.save_pictures(last, VOLUMES)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake.module)
    return fake


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMLflow:
    fake = FakeMLflow()
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    return fake


def events(out: Path) -> Any:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(out / "tensorboard")).Reload()


def losses(held: Any) -> dict[int, float]:
    found = {event.step: event.value for event in held.Scalars("loss")}
    assert len(found) == len(held.Scalars("loss"))
    return found


def test_tensorboard_events_hold_every_finite_number_the_settings_and_the_images(tmp_path: Path) -> None:
    train(tracked(tmp_path / "run", tensorboard=True), 0, 3)
    held = events(tmp_path / "run")
    assert losses(held) == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3})
    assert [event.step for event in held.Scalars("val/dice")] == [1, 3]
    image = held.Images("pictures/coarse")[0]
    assert (image.step, image.width, image.height) == (3, 6 + 6 + 4 + 4, 4 + 2 + 4)
    text = held.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "optim.learning_rate: 0.001" in text
    assert len(read_run(tmp_path / "run").metrics) == 3


def test_tensorboard_events_after_the_resumed_step_are_purged(tmp_path: Path) -> None:
    train(tracked(tmp_path / "run", tensorboard=True), 0, 5)
    train(tracked(tmp_path / "run", tensorboard=True, resume=True), 3, 4, loss=100)
    assert losses(events(tmp_path / "run")) == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 25})


def test_weights_and_biases_goes_on_with_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    train(tracked(tmp_path / "run", wandb="organs"), 0, 3)
    train(tracked(tmp_path / "run", wandb="organs", resume=True), 2, 3)
    first, second = wandb.runs
    assert (first.begun["project"], first.begun["name"], first.begun["id"]) == ("organs", "run", None)
    assert first.begun["config"]["optim.learning_rate"] == 1e-3
    assert (second.begun["id"], second.begun["resume"]) == (first.id, "allow")
    assert [line["step"] for line in second.lines] == [3, 3]
    assert {line["step"]: line.get("val/dice") for line in first.lines[:3]} == {1: 0.5, 2: None, 3: 0.5}
    assert first.lines[3]["pictures/coarse"].shape == (10, 20)
    assert [run.exit_code for run in wandb.runs] == [0, 0]


def test_another_project_on_resume_is_a_new_run_there(tmp_path: Path, wandb: FakeWandb) -> None:
    train(tracked(tmp_path / "run", wandb="organs"), 0, 1)
    train(tracked(tmp_path / "run", wandb="lesions", resume=True), 1, 2)
    assert [run.begun["id"] for run in wandb.runs] == [None, None]


def test_mlflow_goes_on_with_the_same_run(tmp_path: Path, mlflow: FakeMLflow) -> None:
    train(tracked(tmp_path / "run", mlflow="http://tracker"), 0, 2)
    train(tracked(tmp_path / "run", mlflow="http://tracker", resume=True), 2, 3)
    assert list(mlflow.runs) == ["run-0"]
    run = mlflow.runs["run-0"]
    assert (run.name, run.params["optim.learning_rate"], run.status) == ("run", "0.001", "FINISHED")
    assert run.metrics == [
        ("loss", 1.0, 1),
        ("val/dice", 0.5, 1),
        ("loss", 0.5, 2),
        ("loss", 1 / 3, 3),
        ("val/dice", 0.5, 3),
    ]
    assert run.images == [("pictures/coarse", 2), ("pictures/coarse", 3)]
    assert mlflow.uris == ["http://tracker", "http://tracker"]


def test_a_run_that_fails_is_shown_as_failed(tmp_path: Path, wandb: FakeWandb, mlflow: FakeMLflow) -> None:
    with pytest.raises(RuntimeError), tracked(tmp_path / "run", wandb="organs", mlflow="http://tracker") as run:
        run.cut_metrics(0)
        raise RuntimeError
    assert wandb.runs[0].exit_code == 1
    assert mlflow.runs["run-0"].status == "FAILED"


@pytest.mark.parametrize("when", ["start", "log", "pictures", "finish"])
def test_a_tracker_that_fails_costs_one_warning_and_never_the_run(tmp_path: Path, wandb: FakeWandb, when: str) -> None:
    wandb.broken = when
    with pytest.warns(UserWarning, match=r"tracking.wandb failed \(network is gone\)") as warned:
        train(tracked(tmp_path / "run", wandb="organs", tensorboard=True), 0, 4)
    assert len(warned) == 1
    assert [line["step"] for line in read_run(tmp_path / "run").metrics] == [1, 2, 3, 4]
    assert len(events(tmp_path / "run").Scalars("loss")) == 4
    assert list(read_run(tmp_path / "run").pictures) == [4]


def test_images_that_cannot_be_sent_leave_the_numbers_alone(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.broken = "pictures"
    with pytest.warns(UserWarning, match="shows no more images"), tracked(tmp_path / "run", wandb="organs") as run:
        run.cut_metrics(0)
        run.save_pictures(1, VOLUMES)
        run.save_pictures(2, VOLUMES)
        run.log(2, {"loss": 1.0})
    assert wandb.runs[0].lines == [{"step": 2, "loss": 1.0}]


def test_a_session_that_goes_back_begins_again_at_the_trackers(tmp_path: Path, wandb: FakeWandb) -> None:
    with tracked(tmp_path / "run", wandb="organs") as run:
        run.cut_metrics(0)
        run.log(1, {"loss": 1.0})
        run.cut_metrics(0)
        run.log(1, {"loss": 2.0})
    assert [run.lines for run in wandb.runs] == [[{"step": 1, "loss": 1.0}], [{"step": 1, "loss": 2.0}]]
    assert wandb.runs[1].begun["id"] == wandb.runs[0].id


def test_further_processes_have_no_tracker(tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    train(tracked(tmp_path / "run", wandb="organs", tensorboard=True), 0, 2)
    assert not wandb.runs
    assert not (tmp_path / "run").exists()


def test_a_fold_goes_by_the_name_of_the_folder_around_it(tmp_path: Path, wandb: FakeWandb) -> None:
    train(tracked(tmp_path / "organs" / "fold_2", wandb="p"), 0, 1)
    assert wandb.runs[0].begun["name"] == "organs/fold_2"


def test_a_damaged_file_of_ids_costs_a_new_run_at_the_tracker(tmp_path: Path, wandb: FakeWandb) -> None:
    train(tracked(tmp_path / "run", wandb="organs"), 0, 1)
    assert json.loads((tmp_path / "run" / "tracking.json").read_text())["wandb"]["id"] == wandb.runs[0].id
    (tmp_path / "run" / "tracking.json").write_text("{")
    train(tracked(tmp_path / "run", wandb="organs", resume=True), 1, 2)
    assert wandb.runs[1].begun["id"] is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_a_sentence_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    tracking = Tracking(**{name: True if name == "tensorboard" else "somewhere"})
    with pytest.raises(ConfigError, match=rf"pip install 'mim3d\[{name}\]'$"):
        pretrain(str(tmp_path / "data"), str(tmp_path / "run"), tracking=tracking)
    assert not (tmp_path / "run").exists()


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracking\.wandb is empty; give the name of a project"):
        Tracking(wandb=" ")
    with pytest.raises(ConfigError, match=r"tracking\.mlflow holds a password"):
        Tracking(mlflow="https://me:secret@tracker")


def test_tracking_may_change_on_resume(tmp_path: Path) -> None:
    for resume, tracking in ((False, Tracking()), (True, Tracking(tensorboard=True))):
        settings = {**SETTINGS, "tracking": tracking}
        Run.create(tmp_path / "run", command="pretrain", settings=settings, inputs={}, resume=resume)
    assert read_run(tmp_path / "run").config["tracking"]["tensorboard"] is True


def test_a_folder_of_mlflow_gets_a_database(tmp_path: Path) -> None:
    uri, artifacts = store_uris(str(tmp_path / "deep" / "store"))
    assert uri == f"sqlite:///{tmp_path}/deep/store/mlflow.db"
    assert artifacts == f"file://{tmp_path}/deep/store/artifacts"
    assert store_uris("http://tracker") == ("http://tracker", None)


def test_names_that_mlflow_would_refuse_are_replaced() -> None:
    assert allowed_name("val/dice/left lung (upper)") == "val/dice/left lung _upper_"
    assert allowed_name("//a//b/") == "a/b"
