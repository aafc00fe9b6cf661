"""What reading ahead gives the features of ten scans: the next one read and the last one kept while a scan computes.

Run: ``python benchmarks/embed_folder.py``, some minutes on two cores that nothing else uses; ``--quick`` takes some
seconds and writes nothing. The same stages as those of ``mim3d embed``, one after the other and overlapped
(``workflows/shared/overlap.py``), in turns in one process, wall time, the least of each. The encoder is an untrained
``hybrid_nano`` that sees phantom CTs at twice their voxel size, with one thread and with one for each core; with a list
of scans that it was learned from, every scan is also looked at for what it is known by.

Processor time of each stage, measured one after the other, stands beside: their sum over the largest is the most that
overlap can give where the encoder computes elsewhere, as on a GPU. Features of both ways are compared bit for bit.
Writes benchmarks/results/embed_folder_cpu.json.
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

from mim3d.backbones import BACKBONES, create_recipe
from mim3d.core.resources import num_cores
from mim3d.core.settings import to_mapping, to_named
from mim3d.datasets.cases import Case
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid
from mim3d.weights import load_encoder, save_network
from mim3d.workflows.embed.regions import RegionSource
from mim3d.workflows.embed.run import Embedding
from mim3d.workflows.embed.settings import EmbeddingPlan, EmbedSettings
from mim3d.workflows.embed.store import FeatureStore, stamp
from mim3d.workflows.shared.leakage import Seen


class EmbedStages(TimedStages):
    """The stages of ``mim3d embed``."""

    def __init__(self, work: Embedding, store: FeatureStore) -> None:
        super().__init__("read", "compute", "keep")
        self._work, self._store = work, store

    def prepare(self, item: Case) -> Any:
        """Read."""
        return self.timed("read", lambda: self._work.read(item))

    def compute(self, item: Case, ready: Any) -> Any:
        """Embed."""
        return self.timed("compute", lambda: self._work.rows(ready, lambda done, total: None))

    def finish(self, item: Case, done: Any) -> None:
        """Keep the rows as a call that may be killed does."""
        about = {**stamp(item, None, {}), "warnings": []}
        self.timed("keep", lambda: self._store.add(about, done))


def work_of(folder: Path, spacing_mm: tuple[float, float, float], edge: int) -> Embedding:
    """An encoder that learned nothing, as ``mim3d embed`` loads it."""
    torch.manual_seed(0)
    recipe = create_recipe("hybrid_nano")
    card = {
        "backbone": to_named(recipe, BACKBONES),
        "input_multiple": list(recipe.input_multiple),
        "spacing_mm": list(spacing_mm),
        "intensity": to_mapping(Intensity()),
    }
    save_network(folder / "encoder", recipe.build(), card)
    settings = EmbedSettings([], str(folder / "encoder"), window_size=edge)
    encoder = load_encoder(settings.weights)
    plan = EmbeddingPlan.of(settings, encoder.strides, encoder.widths)
    return Embedding(settings, plan, RegionSource(), encoder, torch.device("cpu"), Seen(scans=()))


@torch.no_grad()
def measure(threads: int, cases: Sequence[Case], work: Embedding, turns: int) -> Row:
    """One row: both ways in turns."""
    torch.set_num_threads(threads)
    # The first scan pays for what is made ready once.
    work.rows(work.read(cases[0]), lambda done, total: None)
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    values: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        for turn in range(turns):
            for way in walls:
                out = str(Path(place) / f"{way.replace(' ', '_')}_{turn}.parquet")
                with FeatureStore.opened(out, "auto", {}, work.plan.columns, overwrite=True) as store:
                    stages = EmbedStages(work, store)
                    walls[way].append(stages.wall_s(way, cases))
                    if way == "in turn":
                        seconds = stages.seconds
                    values[way] = store.table.values
    assert np.array_equal(values["in turn"], values["overlapped"])
    return overlap_row({"threads": threads}, f"{threads} thread(s)", walls, seconds)


def main() -> None:
    """Measure and print."""
    arguments = folder_options(__doc__).parse_args()
    x, y, z = arguments.size or ((48, 48, 40) if arguments.quick else (192, 192, 160))
    num_scans, edge, turns = (3, 16, 1) if arguments.quick else (10, 64, arguments.turns)
    prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        scans = phantom_scans(Path(folder), num_scans, (x, y, z))
        cases = [Case(id=scan.id, images=(str(scan.path),), patient=scan.id) for scan in scans]
        x_mm, y_mm, z_mm = read_grid(scans[0].path).spacing_mm
        work = work_of(Path(folder), (2 * x_mm, 2 * y_mm, 2 * z_mm), edge)
        print(f"{num_scans} scans of {x} x {y} x {z} voxels, {os.cpu_count()} cores")
        rows = [
            measure(threads, cases, work, turns) for threads in arguments.threads or dict.fromkeys((1, num_cores()))
        ]
    ratios = overlap_ratios(rows)
    print_ratios("overlap of reading, embedding and keeping", ratios)
    if not arguments.quick:
        machine = {**describe(torch.device("cpu")), "size": [x, y, z], "scans": num_scans, "cores": num_cores()}
        write_results("embed_folder_cpu", machine, [*rows, *(ratio.row() for ratio in ratios)])


if __name__ == "__main__":
    main()
