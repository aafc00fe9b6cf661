"""Checkpoint files: written whole or not at all, few of them, and nothing in them runs."""

import os
import pickle
import resource
import shutil
import stat
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mim3d.core.errors import CheckpointError, ConfigError, Mim3dError
from mim3d.training.checkpoint import Checkpoints, load_best, read_checkpoint, restore_weights
from tests.training.toy_training import ToyObjective, toy_run

WEIGHTS = {"objective": {"weight": torch.zeros(3)}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_newest_are_kept_with_the_best_that_each_of_them_knows(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    module = torch.nn.Linear(1, 1)
    for step in range(1, 9):
        if step in (2, 3, 5, 7):
            checkpoints.save_best(step, module, {"dice": step / 10})
        if step % 2 == 0:
            checkpoints.save(step, WEIGHTS)
    assert names(tmp_path) == ["best_00000005.pt", "best_00000007.pt", "step_00000006.pt", "step_00000008.pt"]
    assert checkpoints.last_step() == 8


def test_what_came_after_the_resumed_step_is_dropped(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (2, 4):
        checkpoints.save(step, WEIGHTS)
    checkpoints.save_best(5, torch.nn.Linear(1, 1), {})
    (tmp_path / ".step_00000006.pt.partial").write_bytes(b"half")
    checkpoints.drop_after(2)
    assert names(tmp_path) == ["step_00000002.pt"]


def test_a_kill_between_the_best_weights_and_the_checkpoint_loses_neither_the_best_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    module = torch.nn.Linear(1, 1)
    checkpoints.save_best(2, module, {"dice": 0.2})
    checkpoints.save(4, WEIGHTS)
    checkpoints.save_best(6, module, {"dice": 0.6})
    # Here the power goes, and the run is resumed.
    again = Checkpoints(tmp_path, keep=1)
    newest = again.newest()
    assert newest == tmp_path / "step_00000004.pt"
    again.drop_after(4)
    assert names(tmp_path) == ["best_00000002.pt", "step_00000004.pt"]
    assert load_best(tmp_path, torch.nn.Linear(1, 1)) == {"step": 2, "values": {"dice": 0.2}}


def test_a_write_is_durable_before_anything_older_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, unlink = os.fsync, Path.unlink

    def synced(descriptor: int) -> None:
        happened.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        happened.append(self.name)
        unlink(self, missing_ok)

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, WEIGHTS)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "unlink", unlinked)
    checkpoints.save(2, WEIGHTS)
    assert happened == ["file", "folder", "step_00000001.pt"]


def test_a_write_that_fails_leaves_no_trace_and_the_ones_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, WEIGHTS)
    with files_no_larger_than(10_000), pytest.raises(Mim3dError, match=r"could not be written .+ earlier ones are"):
        checkpoints.save(2, {"objective": {"weight": torch.zeros(100_000)}})
    assert names(tmp_path) == ["step_00000001.pt"]
    assert checkpoints.newest() == tmp_path / "step_00000001.pt"


class Malice:
    """What a pickle could do."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("malice_was_here"),))  # type: ignore[return-value]


def test_nothing_in_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step_00000001.pt"
    torch.save({"format": "x", "objective": Malice()}, path)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(Malice()))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    assert names(tmp_path) == ["step_00000001.pt"]


def test_a_file_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is no training checkpoint of this version"):
        read_checkpoint(tmp_path / "other.pt")


def test_weights_that_do_not_fit_name_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    content = {"objective": torch.nn.Linear(2, 3).state_dict()}
    with pytest.raises(CheckpointError, match=r"weight is \(3, 2\) in the file and \(3, 4\) in the network"):
        restore_weights(torch.nn.Linear(4, 3), content, tmp_path)
    with pytest.raises(CheckpointError, match=r"bias is \(3,\) in the file and unknown in the network"):
        restore_weights(torch.nn.Linear(2, 3, bias=False), content, tmp_path)


def test_no_best_leaves_the_objective_alone(tmp_path: Path) -> None:
    assert load_best(tmp_path, ToyObjective()) is None
    assert load_best(tmp_path / "absent", ToyObjective()) is None


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = torch.nn.Linear(1000, 1000)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 35_000_000))
    Checkpoints(tmp_path, keep=1).require_space(module)
    with pytest.raises(ConfigError, match=r"has 0.04 GB of free space, .+ need 0.06 GB.+keep_checkpoints below 3"):
        Checkpoints(tmp_path, keep=3).require_space(module)


def test_a_failing_disk_in_the_middle_of_a_run_loses_only_the_steps_since(tmp_path: Path) -> None:
    toy_run(tmp_path / "run", checkpoint_every=2, max_time_s=1e-6)
    with files_no_larger_than(2_000), pytest.raises(Mim3dError, match="could not be written"):
        toy_run(tmp_path / "run", checkpoint_every=2)
    result, objective, _ = toy_run(tmp_path / "run", checkpoint_every=2)
    assert result.finished
    assert objective.seen[0] == 4.0
