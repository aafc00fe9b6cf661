"""Damaged sources, each read in a process with a deadline and a bound of memory, and what is wrong with the outcome."""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mim3d
from tests.fuzz.damage import Damaged, damaged, write
from tests.fuzz.reading import Outcome
from tests.fuzz.specimens import Specimen

#: Seconds that a source may take.
DEADLINE_S = 10.0

#: Memory that any source may take besides four times what it claims; so much a process that decodes DICOM may take.
CONSTANT_BYTES = 512 * 2**20

#: Seconds that the imports of a process may take.
_START_S = 180.0


@dataclass(frozen=True)
class Trial:
    """A source that was read.

    Attributes:
        number: Its number; with the seed it names the damage.
        format: The format.
        what: The damage in words; empty where there is none.
        outcome: What came of it: as ``reading.Outcome`` says, or "crashed", or "hung".
        fault: What is wrong with that; empty where nothing is.
    """

    number: int
    format: str
    what: str
    outcome: Outcome
    fault: str


class Reader:
    """A process that reads one source after another; it is ended where one takes too long."""

    def __init__(self, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None

    def read(self, kind: str, path: Path) -> Outcome:
        """What comes of a source."""
        if self._process is None:
            self._process = _started()
        started = time.monotonic()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([kind, str(path)]).encode() + b"\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], self.deadline_s)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return Outcome(**json.loads(line))
        self.close()
        return Outcome("crashed" if ready else "hung", "", time.monotonic() - started)

    def close(self) -> None:
        """End the process, and those that it started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def _started() -> "subprocess.Popen[bytes]":
    """A reading process that has imported what it needs, in a group of its own."""
    places = [str(Path(__file__).parents[2]), str(Path(mim3d.__file__).parents[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.reading"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b'["scan", "/nowhere"]\n')
    process.stdin.flush()
    if not select.select([process.stdout], [], [], _START_S)[0] or not process.stdout.readline():
        raise RuntimeError("the reading process did not start")
    return process


def run(
    specimens: Sequence[Specimen],
    numbers: Sequence[int],
    *,
    seed: int,
    scratch: Path,
    num_readers: int = 2,
    deadline_s: float = DEADLINE_S,
    keep: bool = False,
) -> Iterator[Trial]:
    """Damage and read sources, every format in turn.

    Args:
        specimens: Good sources.
        numbers: Numbers of the trials.
        seed: With the number it names a trial's damage.
        scratch: Folder for the files.
        num_readers: Processes that read.
        deadline_s: Seconds that a source may take.
        keep: Whether the files stay.
    """
    formats = sorted({specimen.format for specimen in specimens})

    def part(first: int) -> list[Trial]:
        reader, done = Reader(deadline_s), []
        warm = _Warm(specimens, scratch / f"good_{first}", reader)
        for number in list(numbers)[first::num_readers]:
            rng = np.random.default_rng((seed, number))
            among = [specimen for specimen in specimens if specimen.format == formats[number % len(formats)]]
            specimen = among[int(rng.integers(len(among)))]
            source = damaged(specimen, rng)
            folder = scratch / f"trial_{number:06d}"
            write(source, folder)
            good = warm.outcome(specimen)
            outcome = reader.read(specimen.kind, folder / specimen.target)
            if outcome.result in ("crashed", "hung"):
                warm.forget()
            done.append(
                Trial(number, specimen.format, source.what, outcome, _fault(outcome, good, specimen, source, folder))
            )
            if not keep:
                shutil.rmtree(folder)
        reader.close()
        return done

    with ThreadPoolExecutor(num_readers) as threads:
        for trials in threads.map(part, range(num_readers)):
            yield from trials


class _Warm:
    """Reads every good source once in each process: what it imports then is not counted as a damaged one's memory."""

    def __init__(self, specimens: Sequence[Specimen], folder: Path, reader: Reader) -> None:
        self._folder, self._reader = folder, reader
        self._known: dict[int, Outcome] = {}
        for number, specimen in enumerate(specimens):
            write(Damaged(dict(specimen.files), ""), folder / str(number))
        self._numbers = {id(specimen): number for number, specimen in enumerate(specimens)}

    def outcome(self, specimen: Specimen) -> Outcome:
        """What comes of the good source."""
        number = self._numbers[id(specimen)]
        if number not in self._known:
            self._known[number] = self._reader.read(specimen.kind, self._folder / str(number) / specimen.target)
        return self._known[number]

    def forget(self) -> None:
        """The process is another one."""
        self._known = {}


def _fault(outcome: Outcome, good: Outcome, specimen: Specimen, source: Damaged, folder: Path) -> str:
    """What is wrong with an outcome; empty where nothing is."""
    if outcome.result in ("crashed", "hung", "foreign"):
        return outcome.result
    # What a boundary around all readers says of an error that nobody foresaw.
    if "please report it" in outcome.text:
        return "foreign"
    if outcome.time_s > DEADLINE_S:
        return "slow"
    if outcome.memory_bytes > 4 * specimen.claimed_bytes + CONSTANT_BYTES:
        return "memory"
    if outcome.result == "refused":
        # A list may name any file, and then it is that file which is named.
        names = [folder.name, "/etc/passwd", *(Path(name).name for name in source.files)]
        if not any(name in outcome.text for name in names):
            return "unnamed"
    if not source.what and (outcome.result != good.result or (good.result == "read" and outcome.text != good.text)):
        return "changed"
    return ""


def described(trial: Trial) -> str:
    """A trial in one line, for a report."""
    lines: Any = [line.strip() for line in trial.outcome.text.splitlines() if line.strip()] or [""]
    said = lines[-1] if trial.outcome.result == "foreign" else lines[0]
    places = [line for line in lines if line.startswith("File ") and "mim3d" in line]
    where = f" at {places[-1]}" if trial.outcome.result == "foreign" and places else ""
    return f"{trial.number} {trial.format} [{trial.what}] {trial.fault}: {said[:200]}{where}"
