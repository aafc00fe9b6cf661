"""What overlap gives a folder of ten scans: the next one read and the last one written while a scan computes.

Run: ``python benchmarks/prediction_folder.py`` (or ``make bench``), some minutes on two cores that nothing else uses;
``--quick`` takes a minute and writes nothing. The same stages as those of ``mim3d predict``, one after the other and
overlapped (``workflows/shared/overlap.py``), in turns in one process, wall time, the least of each. The network is an
untrained ``hybrid_nano`` of 14 classes with a voxel size of its own, twice that of the scans (phantom CTs):

* with one thread for the network and with one for each core. What is hidden needs a core of its own: with one for each,
  threads that read and write take time from the network, and what is left is what the network cannot use;
* label maps alone, with ``largest_component``, and with probabilities, whose file takes longer than the network.

Processor time of each stage, measured one after the other, stands beside: their sum over the largest is the most that
overlap can give where the network computes elsewhere, as on a GPU. All files are compared. Writes
benchmarks/results/prediction_folder_cpu.json.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yardstick.ct_scans import phantom_scans
from yardstick.machine import describe, options, prepare, write_results
from yardstick.marks import Ratio, print_ratios

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.resources import num_cores
from mim3d.datasets.cases import Case
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid, read_volume
from mim3d.tasks.contract import PredictionSettings, TrainedNetwork
from mim3d.tasks.segmentation.prediction import SegmentationPredictor
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.workflows.shared.overlap import Stages, run_overlapped
from mim3d.workflows.shared.scan_sources import ScanFiles

NUM_CLASSES = 14
KINDS: dict[str, dict[str, Any]] = {
    "labels": {},
    "largest component": {"largest_component": True},
    "probabilities": {"probabilities": True},
}

#: Ten scans overlapped must be so many times as fast.
MARK = 1.3


class PredictionStages(Stages[Case, Any, Any, None]):
    """The stages of ``mim3d predict``, with the processor time of each."""

    def __init__(self, predictor: SegmentationPredictor, folder: Path) -> None:
        self._predictor, self._folder = predictor, folder
        self.seconds = dict.fromkeys(("read", "compute", "write"), 0.0)

    def _timed(self, stage: str, work: Callable[[], Any]) -> Any:
        start_s = time.process_time()
        done = work()
        self.seconds[stage] += time.process_time() - start_s
        return done

    def prepare(self, item: Case) -> Any:
        """Read."""
        return self._timed("read", lambda: self._predictor.read(item))

    def compute(self, item: Case, ready: Any) -> Any:
        """Predict."""
        return self._timed(
            "compute", lambda: self._predictor.predict([item], [ready], self._folder, lambda done, total: None)[0]
        )

    def finish(self, item: Case, done: Any) -> None:
        """Write, and take the digest of the scan for the list."""

        def work() -> None:
            self._predictor.write(item, done, self._folder)
            ScanFiles.of(item.images, with_content=True)

        self._timed("write", work)

    def record(self, item: Case, result: Exception | None) -> None:
        """Nothing may fail here."""
        if result is not None:
            raise result


def network_of(spacing_mm: tuple[float, float, float], edge: int) -> TrainedNetwork:
    """A segmenter that learned nothing."""
    torch.manual_seed(0)
    task = Segmentation(patch_size=(edge, edge, edge), decoder="additive")
    labels = {value: f"label {value}" for value in range(NUM_CLASSES)}
    return TrainedNetwork(
        path="untrained",
        card={},
        module=task.build(create_recipe("hybrid_nano"), labels).eval(),
        task=task,
        labels=labels,
        num_channels=1,
        preprocessing=Preprocessing(spacing_mm=spacing_mm),
        intensity=Intensity(),
        digest="0",
        device=torch.device("cpu"),
    )


@torch.no_grad()
def measure(kind: str, threads: int, cases: Sequence[Case], network: TrainedNetwork, turns: int) -> dict[str, Any]:
    """One row: both ways in turns."""
    torch.set_num_threads(threads)
    predictor = SegmentationPredictor([network], PredictionSettings(precision="32-true", **KINDS[kind]))
    walls: dict[str, list[float]] = {"in turn": [], "overlapped": []}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {way: Path(place) / way for way in walls}
        for _ in range(turns):
            for way, folder in folders.items():
                stages = PredictionStages(predictor, folder)
                start_s = time.perf_counter()
                if way == "overlapped":
                    run_overlapped(cases, stages)
                else:
                    for case in cases:
                        stages.finish(case, stages.compute(case, stages.prepare(case)))
                    seconds = stages.seconds
                walls[way].append(time.perf_counter() - start_s)
        for case in cases:
            for name in predictor.files_of(case).values():
                one, other = (read_volume(_first_channel(folder / name)).array for folder in folders.values())
                assert np.array_equal(one, other), name
    least = {way: min(times) for way, times in walls.items()}
    row = {
        "kind": kind,
        "threads": threads,
        **{f"{way.replace(' ', '_')}_s": round(value, 2) for way, value in least.items()},
        **{f"{stage}_cpu_s": round(value, 2) for stage, value in seconds.items()},
        "times_as_fast": round(least["in turn"] / least["overlapped"], 3),
        "bound": round(sum(seconds.values()) / max(seconds.values()), 3),
    }
    parts = ", ".join(f"{stage} {value:.1f}" for stage, value in seconds.items())
    print(
        f"  {kind:18} {threads} thread(s): {least['in turn']:6.1f} s in turn, {least['overlapped']:6.1f} s overlapped "
        f"({parts} s of processor time)",
        flush=True,
    )
    return row


def _first_channel(path: Path) -> str:
    return f"{path}::channel=0" if "_probabilities" in path.name else str(path)


def ratios_of(rows: Sequence[dict[str, Any]]) -> list[Ratio]:
    """How many times as fast; the mark is for one thread, which leaves a core to read and write."""
    ratios = []
    for row in rows:
        name, free = f"{row['kind']}, {row['threads']} thread(s)", row["threads"] == 1 and num_cores() > 1
        ratios.append(Ratio(f"in turn / overlapped: {name}", row["times_as_fast"], at_least=MARK if free else None))
        ratios.append(Ratio(f"all stages / the longest: {name}", row["bound"]))
    return ratios


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=None, help="voxels of the phantoms")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what is written")
    parser.add_argument("--turns", type=int, default=2, help="how often each way is measured")
    parser.add_argument("--threads", type=int, nargs="+", default=None, help="threads of the network")
    arguments: argparse.Namespace = parser.parse_args()
    x, y, z = arguments.size or ((48, 48, 40) if arguments.quick else (192, 192, 160))
    num_scans, edge, turns = (3, 16, 1) if arguments.quick else (10, 64, arguments.turns)
    prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        scans = phantom_scans(Path(folder), num_scans, (x, y, z))
        cases = [Case(id=scan.id, images=(str(scan.path),), patient=scan.id) for scan in scans]
        x_mm, y_mm, z_mm = read_grid(scans[0].path).spacing_mm
        network = network_of((2 * x_mm, 2 * y_mm, 2 * z_mm), edge)
        print(f"{num_scans} scans of {x} x {y} x {z} voxels, {os.cpu_count()} cores")
        counts = arguments.threads or dict.fromkeys((1, num_cores()))
        every = [(kind, threads) for kind in arguments.kinds for threads in counts]
        rows = [measure(kind, threads, cases, network, turns) for kind, threads in every]
    ratios = ratios_of(rows)
    print_ratios("overlap of reading, computing and writing", ratios)
    if not arguments.quick:
        about = {"size": [x, y, z], "scans": num_scans, "classes": NUM_CLASSES, "cores": num_cores()}
        machine = {**describe(torch.device("cpu")), **about, "backbone": "hybrid_nano"}
        write_results("prediction_folder_cpu", machine, [*rows, *(ratio.row() for ratio in ratios)])


if __name__ == "__main__":
    main()
