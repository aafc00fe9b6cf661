"""The run folder: what it holds, and every folder it refuses."""

import json
import os
import shutil
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mim3d.core.errors import CheckpointError, ConfigError, DataError, Mim3dError
from mim3d.core.run_folder import Run, read_lines, read_manifest, read_run
from mim3d.core.settings import read_yaml
from mim3d.training.checkpoint import Checkpoints

SETTINGS = {"data": "scans", "max_steps": 10, "optim": {"learning_rate": 1e-3, "betas": (0.9, 0.95)}, "seed": 3}


def make(out: Path, resume: bool = False, command: str = "pretrain", digest: str = "aa", **changes: object) -> Run:
    settings = {**SETTINGS, "out": str(out), "resume": resume, **changes}
    return Run.create(out, command=command, settings=settings, inputs={"data": digest}, resume=resume)


def test_a_new_run_writes_settings_that_run_again_and_a_manifest(tmp_path: Path) -> None:
    run = make(tmp_path / "deep" / "run", split_seed=1)
    config = read_yaml(run.config_path)
    assert config["command"] == "pretrain"
    assert config["optim"] == {"learning_rate": 1e-3, "betas": [0.9, 0.95]}
    assert "resume" not in config
    manifest = json.loads(run.manifest_path.read_text())
    assert manifest["inputs"] == {"data": "aa"}
    assert manifest["seeds"] == {"seed": 3, "split_seed": 1}
    assert {"mim3d", "python", "torch", "monai"} <= manifest["versions"].keys()
    assert "hardware" in manifest


def test_settings_may_be_dataclasses(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Settings:
        size: tuple[int, int, int]

    run = make(tmp_path / "run", method=Settings((1, 2, 3)))
    assert read_yaml(run.config_path)["method"] == {"size": [1, 2, 3]}
    assert make(tmp_path / "run", resume=True, method=Settings((1, 2, 3))).path == run.path


def test_a_run_whose_backbone_still_holds_the_decoder_goes_on_where_the_method_has_the_same(tmp_path: Path) -> None:
    old = {"backbone": {"name": "hybrid", "decoder_dim": 24}, "method": {"name": "MiM", "decoder_dim": None}}
    run = make(tmp_path / "run", **old)
    today = {"backbone": {"name": "hybrid"}, "method": {"name": "MiM", "decoder_dim": 24}}
    assert make(tmp_path / "run", resume=True, **today).path == run.path
    with pytest.raises(ConfigError, match=r"method\.decoder_dim was 24 and is now 48"):
        make(tmp_path / "run", resume=True, backbone={"name": "hybrid"}, method={"name": "MiM", "decoder_dim": 48})
    tuned = make(tmp_path / "tuned", command="finetune", backbone=old["backbone"])
    again = make(tmp_path / "tuned", resume=True, command="finetune", backbone=today["backbone"])
    assert again.path == tuned.path


def test_metrics_are_lines_of_json_and_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.log(1, {"loss": 0.5, "val/dice": float("nan")})
    run.log(2, {"loss": float(np.float32(0.25))})
    assert read_run(run.path).metrics == [
        {"step": 1, "loss": 0.5, "val/dice": None},
        {"step": 2, "loss": 0.25},
    ]


def test_cutting_drops_later_lines_and_pictures_and_a_line_cut_short_by_a_kill(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for step in (10, 20, 30):
        run.log(step, {"loss": 1.0})
        run.save_pictures(step, {"coarse/original": np.zeros((2, 2, 2))})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 40, "lo')
    assert len(read_run(run.path).metrics) == 3
    run.cut_metrics(20)
    record = read_run(run.path)
    assert [line["step"] for line in record.metrics] == [10, 20]
    assert list(record.pictures) == [10, 20]
    run.log(30, {"loss": 2.0})
    assert [line["step"] for line in read_run(run.path).metrics] == [10, 20, 30]


def test_pictures_come_back_under_their_names(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.save_pictures(200, {"coarse/original": np.arange(8.0).reshape(2, 2, 2)})
    with np.load(run.pictures_dir / "step_00000200.npz", allow_pickle=False) as pictures:
        assert pictures["coarse/original"][1, 1, 1] == 7


def test_notes_are_added_to_the_manifest(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.note({"effective_batch": 8})
    run.note({"learning_rate": 0.1, "patch": (1, 2)})
    assert read_run(run.path).manifest["derived"] == {"effective_batch": 8, "learning_rate": 0.1, "patch": [1, 2]}


def test_resume_starts_the_run_where_there_is_none_and_goes_on_where_there_is(tmp_path: Path) -> None:
    first = make(tmp_path / "run", resume=True)
    first.log(1, {"loss": 1.0})
    started = read_run(first.path).manifest["started"]
    again = make(tmp_path / "run", resume=True)
    assert read_run(again.path).metrics == [{"step": 1, "loss": 1.0}]
    assert read_run(again.path).manifest["started"] == started
    assert f"--out {again.path} --resume true" in again.how_to_resume


def test_an_existing_run_without_resume_is_refused_and_untouched(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.log(1, {"loss": 1.0})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="holds a run of mim3d pretrain already; go on with it by --resume true"):
        make(tmp_path / "run")
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_a_run_that_never_got_to_a_result_may_be_started_over_with_other_settings(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert read_yaml(make(tmp_path / "run", max_steps=99).config_path)["max_steps"] == 99


def test_resume_with_other_settings_names_each_of_them(tmp_path: Path) -> None:
    make(tmp_path / "run")
    optim = {"learning_rate": 2e-3, "betas": (0.9, 0.95)}
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "run", resume=True, max_steps=20, optim=optim)
    assert "max_steps was 10 and is now 20" in str(error.value)
    assert "optim.learning_rate was 0.001 and is now 0.002" in str(error.value)
    assert "betas" not in str(error.value)
    assert f"leave these out: mim3d pretrain --out {tmp_path}/run --resume true." in str(error.value)


def test_a_path_is_the_same_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "began").mkdir()
    monkeypatch.chdir(tmp_path / "began")
    make(tmp_path / "run", held_out_list="ids")
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run", resume=True, held_out_list="began/ids")
    with pytest.raises(ConfigError, match="held_out_list was 'ids' and is now 'other'"):
        make(tmp_path / "run", resume=True, held_out_list="other")


def test_settings_that_were_left_open_and_are_given_now_are_named_one_by_one(tmp_path: Path) -> None:
    make(tmp_path / "run", backbone=None)
    with pytest.raises(ConfigError) as error:
        make(tmp_path / "run", resume=True, backbone={"name": "hybrid", "num_heads": 3})
    assert "backbone.name was None and is now 'hybrid'; backbone.num_heads was None and is now 3." in str(error.value)
    assert "{" not in str(error.value)


def test_resume_may_change_what_changes_nothing_learned(tmp_path: Path) -> None:
    make(tmp_path / "run", max_time="01:00", num_workers=0)
    run = make(tmp_path / "run", resume=True, max_time=None, num_workers=4, data=os.path.abspath("scans"))
    assert read_yaml(run.config_path)["num_workers"] == 4


def test_resume_of_another_command_or_other_data_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run of mim3d pretrain, not of mim3d finetune"):
        make(tmp_path / "run", resume=True, command="finetune")
    with pytest.raises(ConfigError, match="was started with other data: its content has changed"):
        make(tmp_path / "run", resume=True, digest="bb")


def test_a_folder_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="is not empty and holds no run"):
            make(tmp_path, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_as_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file; choose a folder"):
        make(tmp_path / "file")
    with pytest.raises(ConfigError, match="cannot be written to"):
        make(tmp_path / "file" / "run")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_a_read_only_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"/proc/run cannot be written to \(.+\); choose another --out"):
        make(Path("/proc/run"))
    with pytest.raises(ConfigError, match="/proc/self cannot be written to"):
        make(Path("/proc/self"))


def test_a_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 2**20, 2**20))
    with pytest.raises(ConfigError, match="has 1 MiB of free space"):
        make(tmp_path / "run")


def test_a_disk_that_fills_up_during_a_run_is_a_sentence(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.metrics_path.unlink()
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(Mim3dError, match=r"metrics.jsonl could not be written \(No space left on device\)"):
        run.log(1, {"loss": 1.0})


def test_a_folder_whose_making_was_killed_is_as_good_as_empty(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.partial").write_text("{")
    assert make(tmp_path).manifest_path.is_file()


def test_a_second_training_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with run.exclusive():
        with pytest.raises(ConfigError, match="in use by another training process"), run.exclusive():
            pass
        with pytest.raises(ConfigError, match="in use by another training process"):
            make(tmp_path / "run", resume=True)
    with run.exclusive():
        pass


def test_further_processes_of_a_distributed_run_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = make(tmp_path / "run")
    run.log(1, {"loss": 1.0})
    run.note({"a": 1})
    run.save_pictures(1, {"a": np.zeros(1)})
    run.cut_metrics(0)
    with run.exclusive():
        pass
    assert not run.writes
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_cannot_be_read_as_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder"):
        read_run(tmp_path)
    for content in ("{", "[]", '{"name": "of another tool"}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=r"manifest.json is no manifest of a run"):
            read_run(tmp_path)
        with pytest.raises(ConfigError, match=r"manifest.json is no manifest of a run"):
            make(tmp_path)


@pytest.mark.parametrize("damage", [b"\xff\xfe\x00", b"[" * 100_000, b"5", b'{"step": '])
def test_metrics_are_read_up_to_the_first_line_that_is_none(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("name", [".lock", "checkpoints/step_00000001.pt", "pictures/step_00000001.npz"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_a_pipe_or_folder_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    run = make(tmp_path / "run")
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    if name == ".lock":
        with pytest.raises(DataError, match=r"\.lock could not be written \(it is no regular file\); remove it"):
            make(tmp_path / "run", resume=True)
    elif name.startswith("checkpoints"):
        with (
            pytest.warns(UserWarning, match="no regular file"),
            pytest.raises(CheckpointError, match="None of the 1 checkpoints"),
        ):
            Checkpoints(run.checkpoints_dir, keep=1).newest()
    else:
        assert not read_run(tmp_path / "run").pictures


def test_settings_of_a_backbone_that_came_later_do_not_keep_a_run_from_going_on(tmp_path):
    first = {"backbone": {"name": "vit", "width": 24}, "intensity": None}
    Run.create(tmp_path / "run", command="pretrain", settings=first, inputs={})
    later = {"backbone": {"name": "vit", "width": 24, "norm_eps": 1e-6}, "intensity": None}
    Run.create(tmp_path / "run", command="pretrain", settings=later, inputs={}, resume=True)
    for changed in ({**later, "intensity": {"kind": "zscore"}}, {**later, "backbone": {"name": "vit", "width": 48}}):
        with pytest.raises(ConfigError, match="was started with other settings"):
            Run.create(tmp_path / "run", command="pretrain", settings=changed, inputs={}, resume=True)


def test_a_resumed_run_finds_the_same_inputs_at_another_place_and_keeps_that(tmp_path):
    first = {"data": "/scratch/job_1/scans", "weights": "/models/a", "out": "run"}
    run = Run.create(tmp_path / "run", command="finetune", settings=first, inputs={"weights": "w"})
    unbound = {**first, "data": "/scratch/job_2/scans"}
    with pytest.raises(ConfigError, match="data was '/scratch/job_1/scans' and is now"):
        Run.create(tmp_path / "run", command="finetune", settings=unbound, inputs={"weights": "w"}, resume=True)
    run.bind_input("data", "d")
    moved = {**unbound, "weights": "/models/b"}
    with pytest.raises(ConfigError, match="other weights: its content has changed"):
        Run.create(tmp_path / "run", command="finetune", settings=moved, inputs={"weights": "x"}, resume=True)
    again = Run.create(tmp_path / "run", command="finetune", settings=moved, inputs={"weights": "w"}, resume=True)
    with pytest.raises(ConfigError, match="other data: its content has changed"):
        again.bind_input("data", "e")
    kept = read_manifest(tmp_path / "run" / "manifest.json")["settings"]
    assert kept == {**moved, "data": first["data"]}
    assert read_yaml(again.config_path)["data"] == first["data"]
    again.bind_input("data", "d")
    assert read_manifest(tmp_path / "run" / "manifest.json")["settings"] == moved
    assert {**read_yaml(again.config_path), "command": 0} == {**moved, "command": 0}
