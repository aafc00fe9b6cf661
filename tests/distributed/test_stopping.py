"""Under SLURM a run that a scheduler stops asks to be started again; anywhere else it ends."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mim3d.distributed.stopping import StopRequests, requeue
from tests.training import toy_training
from tests.training.toy_training import toy_run

BATCH_JOB = {"SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "pretrain"}

SCONTROL = """#!/bin/sh
echo "$@" >> "{calls}"
if [ "$1" = show ]; then
    echo "JobId=123 JobName=pretrain"
    echo "   JobState={state} Reason=None Dependency=(null)"
    exit 0
fi
{requeue}
"""


class Slurm:
    """A scontrol on the PATH that takes down what it is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        self.answers()

    def answers(self, state: str = "RUNNING", requeue: str = "exit 0") -> None:
        script = self._folder / "scontrol"
        script.write_text(SCONTROL.format(calls=self._calls, state=state, requeue=requeue))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    @property
    def asked(self) -> list[str]:
        lines = self._calls.read_text().splitlines() if self._calls.exists() else []
        return [line for line in lines if not line.startswith("show")]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    return Slurm(folder, monkeypatch)


@pytest.mark.parametrize(
    ("more", "job"),
    [({}, "123"), ({"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"}, "120_4")],
)
def test_a_batch_job_is_asked_for_again(slurm: Slurm, more: dict[str, str], job: str) -> None:
    said = requeue({**BATCH_JOB, **more})
    assert said == f"SLURM was asked to start job {job} again, which goes on here if its command has --resume true"
    assert slurm.asked == [f"requeue {job}"]


@pytest.mark.parametrize(
    "environment",
    [{}, {"SLURM_JOB_ID": "123", "SLURM_JOB_NAME": "interactive"}, {"SLURM_JOB_ID": "1; rm", "SLURM_JOB_NAME": "x"}],
)
def test_outside_of_batch_jobs_nothing_is_asked(slurm: Slurm, environment: dict[str, str]) -> None:
    assert requeue(environment) is None
    assert slurm.asked == []


def test_a_job_that_was_cancelled_is_not_brought_back(slurm: Slurm) -> None:
    slurm.answers(state="COMPLETING")
    said = requeue(BATCH_JOB)
    assert said is not None
    assert said.startswith(
        "SLURM is ending job 123 (COMPLETING), so it was not asked to start it again; to go on, submit"
    )
    assert slurm.asked == []


def test_a_refusal_says_what_to_do(slurm: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.answers(requeue="echo 'slurm_requeue error: Requested operation is presently disabled' >&2; exit 1")
    assert requeue(BATCH_JOB) == (
        "SLURM could not be asked to start job 123 again (slurm_requeue error: Requested operation is presently "
        "disabled); submit the same script once more, with --resume true in its command"
    )
    monkeypatch.setenv("PATH", "")
    assert "No such file or directory: 'scontrol'" in str(requeue(BATCH_JOB))


def test_only_who_asks_twice_is_not_waited_for() -> None:
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    with StopRequests(None) as stop:
        for number, reason in [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")]:
            stop._signalled_at -= 10
            os.kill(os.getpid(), number)
            assert stop.reason() == f"{reason} asked to stop"
            assert stop.to_be_continued
        assert not ended
        stop._signalled_at -= 10
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)


def run_until_signalled(out: Path, number: signal.Signals | None, **settings: Any) -> tuple[str, str]:
    """Output and errors of a run that is sent a signal once it has its first checkpoint."""
    script = [sys.executable, toy_training.__file__, str(out), json.dumps({"wait_s": 0.03, **settings})]
    environment = {**os.environ, **BATCH_JOB}
    process = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while number is not None and not list(out.glob("checkpoints/step_*.pt")):
            assert process.poll() is None
            time.sleep(0.01)
        if number is not None:
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_slurm_stops_comes_back_and_goes_on(tmp_path: Path, slurm: Slurm, number: signal.Signals) -> None:
    settings: dict[str, Any] = {"max_steps": 60, "checkpoint_every": 2, "validating": False}
    output, errors = run_until_signalled(tmp_path / "run", number, **settings)
    step = json.loads(output.splitlines()[-1])["step"]
    assert 2 <= step < 60
    last, before = errors.splitlines()[-1], errors.splitlines()[-2]
    assert before.startswith(f"stopped after step {step} of 60, because {number.name} asked to stop; its checkpoint")
    assert last == "SLURM was asked to start job 123 again, which goes on here if its command has --resume true"
    assert slurm.asked == ["requeue 123"]
    result, objective, _ = toy_run(tmp_path / "run", **settings)
    assert result.finished
    assert objective.seen[0] == 4 * step


@pytest.mark.parametrize(
    ("number", "settings"),
    [(signal.SIGINT, {"max_steps": 60}), (None, {"max_steps": 60, "max_time_s": 0.1}), (None, {"max_steps": 2})],
)
def test_what_the_user_stopped_and_what_is_finished_is_not_asked_for_again(
    tmp_path: Path, slurm: Slurm, number: signal.Signals | None, settings: dict[str, Any]
) -> None:
    _, errors = run_until_signalled(tmp_path / "run", number, checkpoint_every=2, validating=False, **settings)
    assert slurm.asked == []
    assert errors.splitlines()[-1].startswith(("stopped after step", "all 2 steps are done"))


EARLY = """
import sys, time
from pathlib import Path
from mim3d.distributed.stopping import requeued_when_stopped
with requeued_when_stopped(asks=sys.argv[2] == "first"):
    Path(sys.argv[1]).touch()
    time.sleep(30)
"""


@pytest.mark.parametrize("process", ["first", "other"])
def test_what_is_stopped_before_training_comes_back_too_by_the_word_of_one_process(
    tmp_path: Path, slurm: Slurm, process: str
) -> None:
    script = [sys.executable, "-c", EARLY, str(tmp_path / "ready"), process]
    started = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env={**os.environ, **BATCH_JOB})
    try:
        while not (tmp_path / "ready").exists():
            assert started.poll() is None
            time.sleep(0.01)
        started.send_signal(signal.SIGUSR1)
        errors = started.communicate(timeout=60)[1]
    finally:
        started.kill()
    assert started.returncode == 75
    assert slurm.asked == (["requeue 123"] if process == "first" else [])
    said = "mim3d: SIGUSR1 asked to stop; SLURM was asked to start job 123 again, which goes on here if"
    assert errors.startswith(said) if process == "first" else errors == ""
