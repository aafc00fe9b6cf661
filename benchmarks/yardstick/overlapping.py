"""A folder of scans one after the other and overlapped: the stages with their time, both ways, and what comes of it."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mim3d.core.resources import num_cores
from mim3d.datasets.cases import Case
from mim3d.workflows.shared.overlap import Stages, run_overlapped
from yardstick.machine import Row, options
from yardstick.marks import Ratio

#: Ten scans overlapped must be so many times as fast.
MARK = 1.3

WAYS = ("in turn", "overlapped")


class TimedStages(Stages[Case, Any, Any, None]):
    """The stages of a command, with the processor time of each.

    Args:
        names: Names of the stages.

    Attributes:
        seconds: Processor time of each so far.
    """

    def __init__(self, *names: str) -> None:
        self.seconds = dict.fromkeys(names, 0.0)

    def timed(self, stage: str, work: Callable[[], Any]) -> Any:
        """Do a stage's work."""
        start_s = time.process_time()
        done = work()
        self.seconds[stage] += time.process_time() - start_s
        return done

    def record(self, item: Case, result: Exception | None) -> None:
        """Nothing may fail here."""
        if result is not None:
            raise result

    def wall_s(self, way: str, cases: Sequence[Case]) -> float:
        """Take all scans through the stages in one of ``WAYS``; the wall time."""
        start_s = time.perf_counter()
        if way == "overlapped":
            run_overlapped(cases, self)
        else:
            for case in cases:
                self.finish(case, self.compute(case, self.prepare(case)))
        return time.perf_counter() - start_s


def overlap_row(about: Row, title: str, walls: Mapping[str, Sequence[float]], seconds: Mapping[str, float]) -> Row:
    """What was measured, printed in a line too: the least wall time of each way, and the processor time of each stage.

    Args:
        about: What the row is of.
        title: The same in words.
        walls: Wall times of each way.
        seconds: Processor time of each stage, one scan after the other.
    """
    least = {way: min(times) for way, times in walls.items()}
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    print(
        f"  {title}: {least['in turn']:6.1f} s in turn, {least['overlapped']:6.1f} s overlapped ({parts} s of "
        "processor time)",
        flush=True,
    )
    return {
        **about,
        **{f"{way.replace(' ', '_')}_s": round(value, 2) for way, value in least.items()},
        **{f"{stage}_cpu_s": round(value, 2) for stage, value in seconds.items()},
        "times_as_fast": round(least["in turn"] / least["overlapped"], 3),
        "bound": round(sum(seconds.values()) / max(*seconds.values(), 1e-9), 3),
    }


def overlap_ratios(rows: Sequence[Row]) -> list[Ratio]:
    """How many times as fast; the mark is for one thread, which leaves a core to the stages beside."""
    ratios = []
    for row in rows:
        kind = f"{row['kind']}, " if "kind" in row else ""
        name, free = f"{kind}{row['threads']} thread(s)", row["threads"] == 1 and num_cores() > 1
        ratios.append(Ratio(f"in turn / overlapped: {name}", row["times_as_fast"], at_least=MARK if free else None))
        ratios.append(Ratio(f"all stages / the longest: {name}", row["bound"]))
    return ratios


def folder_options(description: str | None) -> argparse.ArgumentParser:
    """The flags of a benchmark of a folder."""
    parser = options(description)
    parser.add_argument("--size", type=int, nargs=3, default=None, help="voxels of the phantoms")
    parser.add_argument("--turns", type=int, default=2, help="how often each way is measured")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="threads of the network")
    return parser
