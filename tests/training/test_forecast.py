"""How long a run will take is said once, after ten measured steps; and what fits into an hour where it is too long."""

from pathlib import Path
from typing import Any

import pytest

from mim3d.core.run_folder import read_run
from mim3d.training import meter
from mim3d.training.session import expected_time
from tests.training import toy_training
from tests.training.toy_training import toy_run


class FakeClock:
    """Seconds that pass only when a step or a validation says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock on which the first two steps take 100 s, all others 3 s, and a validation 1,000 s."""
    fake = FakeClock()

    def step(objective: Any, progress: float) -> None:
        fake.now_s += 100.0 if len(objective.seen) <= 8 else 3.0

    def score(objective: Any) -> dict[str, float]:
        fake.now_s += 1000.0
        return {"dice": 0.5}

    monkeypatch.setattr(meter, "time", fake)
    monkeypatch.setattr(toy_training.ToyObjective, "after_step", step)
    monkeypatch.setattr(toy_training, "toy_score", score)
    return fake


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith(("expected", "that is more"))]


def test_the_time_left_is_measured_without_the_first_steps_and_validations(
    tmp_path: Path, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, run = toy_run(tmp_path / "run", max_steps=40, validate_every=5)
    assert said(capsys.readouterr().err) == ["expected: 0:01:24 (h:mm:ss) for 28 more steps of 3 s"]
    assert read_run(run.path).manifest["derived"]["seconds_per_step"] == 3.0


def test_a_session_that_goes_on_measures_anew(
    tmp_path: Path, clock: FakeClock, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_run(tmp_path / "run", max_steps=40, checkpoint_every=1, max_time_s=1e-9)
    assert not said(capsys.readouterr().err)
    toy_run(tmp_path / "run", max_steps=40)
    assert said(capsys.readouterr().err) == ["expected: 0:01:21 (h:mm:ss) for 27 more steps of 3 s"]


def test_more_than_a_day_comes_with_what_fits_into_an_hour() -> None:
    lines = expected_time(3.1, 100_000, "cpu")
    assert lines == [
        "expected: 86:06:40 (h:mm:ss) for 100,000 more steps of 3.1 s",
        "that is more than a day on cpu: --max_steps 1100 fits into an hour, with a whole schedule; --max_time 1:00:00 "
        "stops after one, and --resume true goes on",
    ]
    assert len(expected_time(3.1, 100_000, "cpu", is_limited=True)) == 1
    assert len(expected_time(3.1, 20_000, "cpu")) == 1
    assert expected_time(0.1, 500, "cpu") == []
    assert "--max_steps" not in expected_time(4000.0, 100, "cpu")[1]
