"""A process that hangs, fails or is gone is named and does not keep the others for ever; long validations may."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.distributed import HashStore

from mim3d.distributed.heartbeat import BETWEEN, COMPUTING, READING, Heartbeat, StallMonitor
from tests.distributed.launching import TORCHRUN, ended, start
from tests.training import toy_training


class Clock:
    """Three processes seen by the first one, a minute at a time."""

    def __init__(self) -> None:
        self.monitor = StallMonitor(3, 1800.0)
        self.minute = 0

    def pass_minutes(self, number: int, *places: str | None) -> list[str]:
        """What is said while the processes are at these places; None is silent."""
        said = []
        for _ in range(number):
            self.minute += 1
            words = {rank: f"{self.minute} {place}" for rank, place in enumerate(places) if place is not None}
            words |= {rank: "0 1 computes" for rank, place in enumerate(places) if place is None}
            said.append(self.monitor.update(words, 60.0))
        return [sentence for sentence in said if sentence is not None]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (
            (f"7 {COMPUTING}", f"7 {READING}", f"7 {COMPUTING}"),
            "the others wait for 6 min for process 1 at step 7: it waits",
        ),
        ((f"7 {COMPUTING}", f"6 {BETWEEN}", f"6 {BETWEEN}"), "for processes 1, 2 at step 6: it is done with the step"),
        ((f"7 {COMPUTING}",) * 3, "no process went on for 6 min: each computes at step 7"),
        (
            (f"7 {COMPUTING}", None, f"7 {COMPUTING}"),
            "nothing was heard for 6 min of process 1; look whether its machine",
        ),
    ],
)
def test_who_keeps_the_others_is_named_once_and_ends_them_in_the_end(places: tuple[str, ...], words: str) -> None:
    clock = Clock()
    said = clock.pass_minutes(30, *places)
    assert len(said) == 1
    assert words in said[0]
    assert clock.monitor.verdict is None
    clock.pass_minutes(2, *places)
    assert clock.monitor.verdict is not None
    assert words.replace("6 min", "31 min") in clock.monitor.verdict


def test_slow_steps_and_long_validations_are_nobody_s_fault() -> None:
    clock = Clock()
    for step in range(10):
        assert clock.pass_minutes(4, *[f"{step} {COMPUTING}"] * 3) == []
    assert clock.pass_minutes(170, *["10 validates"] * 3) == []
    assert clock.pass_minutes(170, "10 writes a checkpoint", f"11 {COMPUTING}", f"11 {COMPUTING}") == []
    assert clock.monitor.verdict is None


def test_a_process_that_failed_is_told_of_with_its_words() -> None:
    clock = Clock()
    clock.pass_minutes(3, f"7 {COMPUTING}", "failed The disk is full.", f"7 {COMPUTING}")
    assert clock.monitor.verdict == "process 1 has failed: The disk is full."


class Store(HashStore):
    """A store whose keeper can go."""

    gone = False

    def clone(self) -> "Store":
        return self

    def set(self, key: str, value: str) -> None:
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        super().set(key, value)


def wait_until(condition: Callable[[], object], seconds: float = 20.0) -> object:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_processes_hear_of_each_other_and_all_end() -> None:
    store, said, ended = Store(), [], []
    first = Heartbeat(0, 2, said.append, 4.0, store=store, end=lambda code: ended.append((0, code)))
    second = Heartbeat(1, 2, said.append, 4.0, store=store, end=lambda code: ended.append((1, code)))
    with first, second:
        first.at(3, COMPUTING)
        second.at(3, READING)
        assert wait_until(lambda: said)
        assert "for process 1 at step 3: it waits for data" in said[0]
        assert not ended
        assert wait_until(lambda: ended)
        assert ended == [(0, 1)]
        assert said[1].startswith("process 0 is ended, because the others wait")
        store.gone = True
        assert wait_until(lambda: len(ended) == 2)
        assert ended[1] == (1, 1)


def test_a_run_of_one_process_starts_nothing() -> None:
    before = threading.active_count()
    with Heartbeat(0, 1, pytest.fail, 1.0) as heart:
        heart.at(1, READING)
        assert threading.active_count() == before


HANG = """
import sys, time
from pathlib import Path
from tests.training import toy_training

class HangingSource(toy_training.ToySource):
    def sample(self, number):
        if number == 34:
            time.sleep(600)
        return super().sample(number)

toy_training.ToySource = HangingSource
toy_training.toy_run(Path(sys.argv[1]), devices=2, batch_size=2, rank_timeout_s=12.0, checkpoint_every=4)
"""


@pytest.mark.slow
def test_a_process_that_hangs_among_real_ones_is_named_and_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text(HANG)
    environment = {**os.environ, "PYTHONPATH": str(Path(toy_training.__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")], env=environment, stderr=subprocess.PIPE, text=True
    )
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "for process 1 at step 9: it waits for data" in errors
    assert "process 0 is ended, because the others wait" in errors
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_00000004.pt",
        "step_00000008.pt",
    ]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["command"] == "pretrain"


DIE = """
import os, sys
from pathlib import Path
from mim3d.core.errors import Mim3dError
from tests.training import toy_training

class DyingSource(toy_training.ToySource):
    def sample(self, number):
        if number == 34:
            os.kill(os.getpid(), 9)
        return super().sample(number)

toy_training.ToySource = DyingSource
try:
    toy_training.toy_run(Path(sys.argv[1]), devices=2, batch_size=2, checkpoint_every=4)
except Mim3dError as error:
    sys.exit(f"said: {error}")
"""


def test_a_process_that_was_killed_is_one_sentence_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "die.py").write_text(DIE)
    words = [*TORCHRUN, "--nproc-per-node", "2", str(tmp_path / "die.py"), str(tmp_path / "run")]
    ((code, said),) = ended([start(words)], 120)
    assert code != 0
    assert re.search(
        r"said: Process [01] of 2 lost the others during step 9 .*; the checkpoint of step 8 is kept", said
    )
    assert "RuntimeError" not in said
