"""Some hundreds of damaged files of every format; ``make fuzz`` tries thousands."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.damage import damaged
from tests.fuzz.one_set import try_set
from tests.fuzz.reading import Outcome
from tests.fuzz.specimens import Specimen, specimens
from tests.fuzz.trials import Reader, described, run

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

#: Another one than that of ``make fuzz``.
SEED = 20_26

#: A machine that runs other tests beside these is slow; what hangs does so for ever.
DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def good() -> list[Specimen]:
    return specimens()


def test_good_sources_are_read_and_the_same_again(good: list[Specimen], tmp_path: Path) -> None:
    for number, specimen in enumerate(good):
        for name, content in specimen.files.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    reader = Reader(DEADLINE_S)
    for number, specimen in enumerate(good):
        first, second = (reader.read(specimen.kind, tmp_path / str(number) / specimen.target) for _ in range(2))
        assert first.result == "read", (specimen.format, first.text)
        assert first.text == second.text
    reader.close()


def test_damage_follows_the_seed(good: list[Specimen]) -> None:
    for number, specimen in enumerate(good):
        one, two = (damaged(specimen, np.random.default_rng((SEED, number))) for _ in range(2))
        assert one == two


def test_damaged_files_are_read_or_refused_by_name(good: list[Specimen], tmp_path: Path) -> None:
    trials = list(run(good, range(340), seed=SEED, scratch=tmp_path, deadline_s=DEADLINE_S))
    assert len(trials) == 340
    at_fault = [described(trial) for trial in trials if trial.fault not in ("", "slow")]
    assert not at_fault, "\n".join(at_fault)


def test_bad_scans_in_a_set_are_listed_and_the_others_are_cached(good: list[Specimen], tmp_path: Path) -> None:
    tried = try_set(good, num_scans=60, num_bad=12, seed=SEED, scratch=tmp_path)
    assert tried.num_ways == 12
    assert not tried.faults, "\n".join(tried.faults)


def test_a_reader_that_crashes_or_hangs_is_told_and_another_one_goes_on(tmp_path: Path) -> None:
    reader = Reader(60.0)
    assert reader.read("scan", tmp_path).result == "refused"
    assert reader._process is not None
    os.kill(reader._process.pid, signal.SIGSEGV)
    assert reader.read("scan", tmp_path).result == "crashed"
    assert reader.read("scan", tmp_path).result == "refused"
    reader.deadline_s, started = 0.5, time.monotonic()
    os.kill(reader._process.pid, signal.SIGSTOP)
    outcome = reader.read("scan", tmp_path)
    assert isinstance(outcome, Outcome)
    assert outcome.result == "hung"
    assert time.monotonic() - started < 10
    reader.close()
