"""A run that was stopped, killed or damaged and then resumed is the same, to the bit, as one that never was."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mim3d.core.errors import TO_BE_CONTINUED, CheckpointError, ConfigError, take_exit_code
from mim3d.core.run_folder import Run, read_run
from mim3d.objective import Batch
from mim3d.training.meter import Meter
from tests.distributed.test_processes import start
from tests.training import toy_training
from tests.training.toy_training import ToySource, comparable, toy_run

CPU = torch.device("cpu")

SETTINGS: dict[str, Any] = {
    "max_steps": 24,
    "log_every": 5,
    "checkpoint_every": 4,
    "validate_every": 6,
    "pictures_every": 8,
    "accumulation": 2,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and metrics of the run that nothing happened to."""
    _, objective, run = toy_run(tmp_path_factory.mktemp("whole") / "run", **SETTINGS)
    return objective.state_dict(), comparable(read_run(run.path).metrics)


def assert_same(
    folder: Path, objective: torch.nn.Module, reference: tuple[dict[str, torch.Tensor], list[dict[str, Any]]]
) -> None:
    assert comparable(read_run(folder).metrics) == reference[1]
    weights = objective.state_dict()
    assert [name for name in weights if not torch.equal(weights[name], reference[0][name])] == []


class InterruptedSource(ToySource):
    """Sends this process a signal while it waits for a given sample."""

    signal_number = signal.SIGTERM
    at_sample = 100

    def sample(self, number: int) -> Batch:
        if number == self.at_sample:
            os.kill(os.getpid(), self.signal_number)
        return super().sample(number)


def test_stopped_by_the_time_limit_and_resumed(tmp_path: Path, uninterrupted: Any) -> None:
    sessions = 0
    finished = False
    while not finished:
        result, objective, run = toy_run(tmp_path / "run", **SETTINGS, max_time_s=0.06, wait_s=0.003)
        finished, sessions = result.finished, sessions + 1
        assert finished or result.reason == "the time limit of 0.06 s was reached"
        assert take_exit_code() == (0 if finished else TO_BE_CONTINUED)
    assert sessions > 2
    assert_same(run.path, objective, uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, TO_BE_CONTINUED)]
)
def test_stopped_by_a_signal_and_resumed(
    tmp_path: Path,
    uninterrupted: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    take_exit_code()
    before = signal.getsignal(number)
    monkeypatch.setattr(InterruptedSource, "signal_number", number)
    monkeypatch.setattr(toy_training, "ToySource", InterruptedSource)
    result, objective, run = toy_run(tmp_path / "run", **SETTINGS)
    # Sample 100 belongs to step 13, which is finished and saved before stopping.
    assert (result.step, result.finished, result.reason) == (13, False, f"{number.name} asked to stop")
    assert take_exit_code() == code
    assert run.how_to_resume in capsys.readouterr().err
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert objective.seen == [float(sample) for sample in range(13 * 8)]
    result, objective, run = toy_run(tmp_path / "run", **SETTINGS)
    assert objective.seen == [float(sample) for sample in range(13 * 8, 24 * 8)]
    assert_same(run.path, objective, uninterrupted)


def test_killed_at_once_and_resumed(tmp_path: Path, uninterrupted: Any) -> None:
    out = tmp_path / "run"
    script = [sys.executable, toy_training.__file__, str(out), json.dumps({**SETTINGS, "wait_s": 0.05})]
    process = subprocess.Popen(script, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(6000):
            if len(list(out.glob("checkpoints/step_*.pt"))) == 2 and len(read_run(out).metrics) >= 2:
                break
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    finally:
        process.kill()
        process.wait()
    assert not (out / "final.pt").exists()
    _, objective, _ = toy_run(out, **SETTINGS)
    assert 0 < len(objective.seen) < 24 * 8
    assert_same(out, objective, uninterrupted)


def test_metrics_after_the_last_checkpoint_are_written_anew_not_twice(tmp_path: Path, uninterrupted: Any) -> None:
    out = tmp_path / "run"

    class LostPower(BaseException):
        pass

    class FailingSource(ToySource):
        def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
            for number, batch in enumerate(super().batches(first_sample)):
                if number == 2 * 15:
                    raise LostPower
                yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_training, "ToySource", FailingSource)
        with pytest.raises(LostPower):
            toy_run(out, **SETTINGS)
    assert max(line["step"] for line in read_run(out).metrics) == 15
    assert sorted(path.name for path in out.glob("checkpoints/step_*")) == ["step_00000008.pt", "step_00000012.pt"]
    _, objective, _ = toy_run(out, **SETTINGS)
    assert_same(out, objective, uninterrupted)


def test_half_precision_resumes_its_loss_scale_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"precision": "16-mixed", "log_every": 3, "checkpoint_every": 3}
    _, whole, reference = toy_run(tmp_path / "whole", **settings, max_steps=12)
    finished = False
    while not finished:
        result, parts, run = toy_run(tmp_path / "parts", **settings, max_steps=12, max_time_s=0.01, wait_s=0.005)
        finished = result.finished
    assert comparable(read_run(run.path).metrics) == comparable(read_run(reference.path).metrics)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in parts.state_dict().items())


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty", "text"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, uninterrupted: Any, damage: str
) -> None:
    _, _, run = toy_run(tmp_path / "run", **SETTINGS)
    newest = run.checkpoints_dir / "step_00000024.pt"
    content = bytearray(newest.read_bytes())
    content[content.index(uninterrupted[0]["head.weight"].numpy().tobytes()) + 1] ^= 0xFF
    newest.write_bytes({"truncated": content[:-900], "one byte": content, "empty": b"", "text": b"hi"}[damage])
    with pytest.warns(UserWarning, match=r"step_00000024.pt is damaged \(.+\); renamed to step_00000024.pt.damaged"):
        _, objective, _ = toy_run(tmp_path / "run", **SETTINGS)
    assert objective.seen == [float(sample) for sample in range(20 * 8, 24 * 8)]
    assert_same(run.path, objective, uninterrupted)


def test_only_damaged_checkpoints_are_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    _, _, run = toy_run(tmp_path / "run", **SETTINGS)
    for path in run.checkpoints_dir.glob("step_*.pt"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        toy_run(tmp_path / "run", **SETTINGS)


def test_checkpoints_that_a_kill_left_are_pruned_by_the_next_session(tmp_path: Path) -> None:
    _, _, run = toy_run(tmp_path / "run", **SETTINGS)
    newest = run.checkpoints_dir / "step_00000024.pt"
    shutil.copy(newest, newest.with_name("step_00000016.pt"))
    toy_run(tmp_path / "run", **SETTINGS)
    assert len(list(run.checkpoints_dir.glob("step_*.pt"))) == 2


def test_a_finished_run_resumes_to_nothing_and_reads_no_data(tmp_path: Path, uninterrupted: Any) -> None:
    toy_run(tmp_path / "run", **SETTINGS)
    result, objective, run = toy_run(tmp_path / "run", **SETTINGS)
    assert (result.step, result.finished) == (24, True)
    assert result.best is not None
    assert objective.seen == []
    assert_same(run.path, objective, uninterrupted)


def test_the_samples_of_a_step_may_be_dealt_out_in_another_way(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SETTINGS, "dropout": 0.0}
    _, whole, reference = toy_run(tmp_path / "whole", **settings)
    toy_run(tmp_path / "run", **settings, max_time_s=1e-6)
    begin = 1
    for split in ({"batch_size": 8, "accumulation": 1}, {"batch_size": 1, "accumulation": 8}):
        stopped, objective, run = toy_run(tmp_path / "run", **{**settings, **split}, max_time_s=1e-6)
        assert objective.seen == [float(sample) for sample in range(8 * begin, 8 * stopped.step)]
        begin = stopped.step
    result, objective, run = toy_run(tmp_path / "run", **settings)
    assert result.finished
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(objective.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(*(comparable(read_run(each.path).metrics) for each in (run, reference)), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_means_go_on_when_other_processes_take_over_the_windows() -> None:
    values = torch.rand((4, 6), generator=torch.Generator().manual_seed(0))
    whole, meters = Meter(CPU), [Meter(CPU) for _ in values]
    for step, column in enumerate(values.T):
        for meter, value in zip(meters, column, strict=True):
            meter.add(step, {"loss": value})
            whole.add(step, {"loss": value})
    state = [meter.state(alone=True)[0] for meter in meters]
    for world_size in (1, 2, 3, 4, 7):
        rows = []
        for rank in range(world_size):
            taken_over = Meter(CPU)
            taken_over.restore(state, rank, world_size)
            rows += taken_over.state(alone=True)[0]
        sums, counts = (sum(row[name][0] for row in rows) for name in ("sums", "counts"))
        # Six steps, each as often as it is added from now on.
        assert counts == pytest.approx(6 * world_size)
        assert sums / counts == pytest.approx(whole.read()["loss"])
    same = Meter(CPU)
    same.restore(state, 2, 4)
    assert same.state(alone=True)[0] == state[2]


def test_a_split_of_as_many_samples_is_no_other_setting(tmp_path: Path) -> None:
    def create(**settings: int) -> None:
        Run.create(tmp_path / "run", command="pretrain", settings=settings, inputs={}, resume=True)

    create(batch_size=2, accumulation=4, devices=1, num_nodes=1)
    create(batch_size=1, accumulation=2, devices=2, num_nodes=2)
    create(batch_size=2, accumulation=4, devices=1, num_nodes=1)
    with pytest.raises(ConfigError, match="devices was 1 and is now 2"):
        create(batch_size=2, accumulation=4, devices=2, num_nodes=1)


@pytest.mark.slow
def test_a_run_goes_on_with_more_and_with_fewer_processes(tmp_path: Path) -> None:
    shared: dict[str, Any] = {
        "dropout": 0.0,
        "max_steps": 12,
        "log_every": 4,
        "checkpoint_every": 3,
        "validate_every": 6,
    }
    _, whole, reference = toy_run(tmp_path / "whole", **shared, batch_size=4, accumulation=1)
    for devices, seconds in ((2, 0.05), (1, 0.05), (4, 0.05), (2, None)):
        process = start(
            tmp_path / "run", **shared, batch_size=4 // devices, devices=devices, max_time_s=seconds, wait_s=0.02
        )
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["finished"]
    weights = torch.load(tmp_path / "run" / "final.pt", weights_only=True)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)
    for one, other in zip(*(comparable(read_run(p).metrics) for p in (tmp_path / "run", reference.path)), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_kill_between_the_last_checkpoint_and_its_export_is_made_good(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(objective: torch.nn.Module, step: int) -> None:
        if step == 24:
            raise Killed

    with pytest.raises(Killed):
        toy_run(tmp_path / "run", **SETTINGS, on_checkpoint=kill)
    exported = []
    result, _, _ = toy_run(tmp_path / "run", **SETTINGS, on_checkpoint=lambda objective, step: exported.append(step))
    assert (result.finished, exported) == (True, [24])


def test_resuming_with_another_batch_is_refused(tmp_path: Path) -> None:
    toy_run(tmp_path / "run", **SETTINGS, max_time_s=1e-6)
    with pytest.raises(CheckpointError, match="was written with 8 samples per step, now there are 4"):
        toy_run(tmp_path / "run", **{**SETTINGS, "accumulation": 1})
