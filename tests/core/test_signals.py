"""Commands that are asked to stop end in order, with an exit code that says by whom."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mim3d import cli
from mim3d.core.signals import StoppedBySignal, ending_in_order, exit_code_of
from mim3d.core.worker_processes import Workers


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 75)])
def test_a_signal_ends_the_work_in_order(number: signal.Signals, code: int) -> None:
    before, closed = signal.getsignal(number), []
    with pytest.raises(StoppedBySignal) as stop, ending_in_order():
        try:
            os.kill(os.getpid(), number)
            # A wrapping process often delivers the same signal once more.
            os.kill(os.getpid(), number)
            time.sleep(1)
        finally:
            closed.append(True)
    assert closed and stop.value.code == exit_code_of(number) == code
    assert str(stop.value) == f"{number.name} asked to stop"
    assert signal.getsignal(number) == before


def test_a_second_request_ends_the_process_at_once() -> None:
    script = """
import os, signal, time
from mim3d.core.signals import ending_in_order
with ending_in_order():
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)
    finally:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=20, check=False).returncode == -signal.SIGTERM


def sleep_after(path: Path) -> bool:
    path.touch()
    while not path.with_name(f"{path.name}.go").exists():
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_job_is_no_crash_of_a_worker(tmp_path: Path, number: signal.Signals) -> None:
    with Workers[Path, bool](sleep_after, 30) as workers:
        (tmp_path / "first.go").touch()
        workers.give(tmp_path / "first")
        assert workers.take()[1] is True
        workers.give(tmp_path / "begun")
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        os.kill(workers._workers[0].process.pid, number)
        (tmp_path / "begun.go").touch()
        assert workers.take()[1] is True


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cache", "D"], "what is finished is kept; to go on, run the same command again"),
        (["pretrain"], "what is finished is kept; to go on, run the same command again with --resume true"),
        (["finetune", "--resume", "true"], "what is finished is kept; to go on, run the same command again"),
        (["evaluate"], "to do it, run the same command again"),
    ],
)
def test_a_stopped_command_says_how_to_go_on(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, who, code in ((signal.SIGUSR1, "SIGUSR1 asked to stop", 75), (signal.SIGINT, "interrupted", 130)):
        monkeypatch.setattr(cli, "_run", lambda _, number=number: os.kill(os.getpid(), number))
        assert cli.main(words) == code
        assert capsys.readouterr().err == f"mim3d: {who}; {said}\n"
