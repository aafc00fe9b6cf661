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

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from yardstick.ct_scans import phantom_scans
from yardstick.machine import Row, describe, prepare, write_results
from yardstick.marks import print_ratios
from yardstick.overlapping import WAYS, TimedStages, folder_options, overlap_ratios, overlap_row

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.resources import num_cores
from mim3d.datasets.cases import Case
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid, read_volume
from mim3d.tasks.contract import PredictionSettings, TrainedNetwork
from mim3d.tasks.segmentation.prediction import SegmentationPredictor
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.workflows.shared.scan_sources import ScanFiles

NUM_CLASSES = 14
KINDS: dict[str, dict[str, Any]] = {
    "labels": {},
    "largest component": {"largest_component": True},
    "probabilities": {"probabilities": True},
}


class PredictionStages(TimedStages):
    """The stages of ``mim3d predict``."""

    def __init__(self, predictor: SegmentationPredictor, folder: Path) -> None:
        super().__init__("read", "compute", "write")
        self._predictor, self._folder = predictor, folder

    def prepare(self, item: Case) -> Any:
        """Read."""
        return self.timed("read", lambda: self._predictor.read(item))

    def compute(self, item: Case, ready: Any) -> Any:
        """Predict."""
        return self.timed(
            "compute", lambda: self._predictor.predict([item], [ready], self._folder, lambda done, total: None)[0]
        )

    def finish(self, item: Case, done: Any) -> None:
        """Write, and take the digest of the scan for the list."""

        def work() -> None:
            self._predictor.write(item, done, self._folder)
            ScanFiles.of(item.images, with_content=True)

        self.timed("write", work)


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
def measure(kind: str, threads: int, cases: Sequence[Case], network: TrainedNetwork, turns: int) -> Row:
    """One row: both ways in turns."""
    torch.set_num_threads(threads)
    predictor = SegmentationPredictor([network], PredictionSettings(precision="32-true", **KINDS[kind]))
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {way: Path(place) / way for way in walls}
        for _ in range(turns):
            for way, folder in folders.items():
                stages = PredictionStages(predictor, folder)
                walls[way].append(stages.wall_s(way, cases))
                if way == "in turn":
                    seconds = stages.seconds
        for case in cases:
            for name in predictor.files_of(case).values():
                one, other = (read_volume(_first_channel(folder / name)).array for folder in folders.values())
                assert np.array_equal(one, other), name
    return overlap_row({"kind": kind, "threads": threads}, f"{kind:18} {threads} thread(s)", walls, seconds)


def _first_channel(path: Path) -> str:
    return f"{path}::channel=0" if "_probabilities" in path.name else str(path)


def main() -> None:
    """Measure and print."""
    parser = folder_options(__doc__)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="what is written")
    arguments = parser.parse_args()
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
    ratios = overlap_ratios(rows)
    print_ratios("overlap of reading, computing and writing", ratios)
    if not arguments.quick:
        about = {"size": [x, y, z], "scans": num_scans, "classes": NUM_CLASSES, "cores": num_cores()}
        machine = {**describe(torch.device("cpu")), **about, "backbone": "hybrid_nano"}
        write_results("prediction_folder_cpu", machine, [*rows, *(ratio.row() for ratio in ratios)])


if __name__ == "__main__":
    main()
