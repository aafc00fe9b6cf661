"""What a scan of 512 x 512 x 400 voxels costs with 139 classes: memory, and time besides the network.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/many_classes.py`` (or ``make bench``), half an hour on one
core; ``--quick`` takes a minute and writes nothing. The same network (``hybrid_nano``, additive decoder, untrained) in
each row, in a process of its own, from the file of a phantom CT to the file of its label map:

* on the scan's own grid, and in voxels of twice its size, from where probabilities are interpolated to it;
* with the features of the last layer blended in the place of the logits, as mim3d does where the logits are many, and
  with the logits blended, as it does else: ``logits``. At 512 x 512 x 400 voxels on their own grid those take 11 GB and
  the machine must have 16.
* with weights of the last layer as they were drawn: every class is about as probable as any other everywhere, so that
  no class can be left out of the interpolation, the worst case; and with ``confident`` ones, which are 50 times as
  large, so that probabilities are near 0 and 1, as those of trained networks are inside of structures.

Times are processor time, that of the network and of reading told apart; memory is the most that the process held, with
Python, torch and the network. Writes benchmarks/results/many_classes_cpu.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yardstick.ct_scans import phantom_scans
from yardstick.machine import describe, options, peak_memory, prepare, write_results
from yardstick.marks import Ratio, print_ratios

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.preprocessing import prepare as prepare_case
from mim3d.datasets.cases import Case
from mim3d.inference import HeadedNetwork, Network, Windows, classes_readout, predict_prepared, prediction
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid, write_volume
from mim3d.tasks.segmentation.network import SegmentationObjective
from mim3d.tasks.segmentation.task import Segmentation

OWN, COARSE, CONFIDENT, LOGITS = "own grid", "half of it", "half of it, confident", "half of it, logits"
OWN_LOGITS = "own grid, logits"
CASES = (OWN, COARSE, CONFIDENT, LOGITS, OWN_LOGITS)

#: Memory that no row but those of blended logits may take, as bytes.
MARK_BYTES = 6e9


class TimedNetwork:
    """A segmentation network whose calls are timed."""

    def __init__(self, num_classes: int, edge: int, *, is_confident: bool) -> None:
        torch.manual_seed(0)
        task = Segmentation(patch_size=(edge, edge, edge), decoder="additive")
        objective = task.build(create_recipe("hybrid_nano"), {value: f"label {value}" for value in range(num_classes)})
        assert isinstance(objective, SegmentationObjective)
        if is_confident:
            for parameter in objective.decoder.head.parameters():
                parameter.data *= 50
        self._objective = objective.eval()
        self.num_windows, self.seconds = 0, 0.0

    def headed(self) -> HeadedNetwork:
        """The network as ``mim3d predict`` takes it."""
        head = self._objective.linear_head
        assert head is not None
        logits, features = self._timed(self._objective.logits), self._timed(self._objective.finest_features)
        return HeadedNetwork(logits=logits, features=features, weight_KF=head[0], bias_K=head[1])

    def _timed(self, compute: Network) -> Network:
        def timed(window_BCXYZ: Tensor) -> Tensor:
            start_s = time.process_time()
            computed = compute(window_BCXYZ)
            self.seconds += time.process_time() - start_s
            self.num_windows += len(window_BCXYZ)
            return computed

        return timed


@torch.no_grad()
def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row in this process."""
    device = torch.device("cpu")
    prepare(device)
    network = TimedNetwork(arguments.classes, arguments.patch, is_confident=name == CONFIDENT)
    if name in (LOGITS, OWN_LOGITS):
        prediction.MOST_SCORE_BYTES = 2**62
    elif arguments.quick:
        prediction.MOST_SCORE_BYTES = 0
    case = Case(id="scan", images=(arguments.scan,), patient="scan")
    x_mm, y_mm, z_mm = read_grid(arguments.scan).spacing_mm
    spacing = None if name in (OWN, OWN_LOGITS) else (2 * x_mm, 2 * y_mm, 2 * z_mm)
    start_s = time.process_time()
    prepared = prepare_case(case, Preprocessing(spacing_mm=spacing), with_label=False)
    read_s = time.process_time() - start_s
    labels = predict_prepared(
        [network.headed()],
        prepared,
        readout=classes_readout(arguments.classes),
        intensity=Intensity(),
        windows=Windows(patch_size=(arguments.patch,) * 3, overlap=arguments.overlap, batch_size=1, body_only=False),
        device=device,
    )
    write_volume(f"{arguments.scan}.{CASES.index(name)}.nii.gz", labels, prepared.grid)
    total_s = time.process_time() - start_s
    return {
        "row": name,
        "read_s": round(read_s, 1),
        "network_s": round(network.seconds, 1),
        "export_s": round(total_s - read_s - network.seconds, 1),
        "windows": network.num_windows,
        "peak_bytes": peak_memory(device),
    }


def measured_apart(name: str, scan: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row in a process of its own."""
    command = [sys.executable, __file__, "--row", name, "--scan", str(scan), "--patch", str(arguments.patch)]
    command += [
        "--classes",
        str(arguments.classes),
        "--overlap",
        str(arguments.overlap),
        *(["--quick"] if arguments.quick else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"  {name:20} read {row['read_s']:6.1f} s  network {row['network_s']:7.1f} s in {row['windows']} windows  "
        f"export {row['export_s']:6.1f} s  {row['peak_bytes'] / 1e9:5.2f} GB",
        flush=True,
    )
    return row


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--rows", nargs="+", choices=CASES, default=CASES[:-1], help="what to measure")
    parser.add_argument("--size", type=int, nargs=3, default=None, help="voxels of the phantom")
    parser.add_argument("--classes", type=int, default=139, help="number of classes, background among them")
    parser.add_argument("--patch", type=int, default=None, help="edge of a window")
    parser.add_argument("--overlap", type=float, default=0.5, help="share of a window that its neighbour sees too")
    parser.add_argument("--row", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--scan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measure(arguments.row, arguments)))
        return
    arguments.patch = arguments.patch or (32 if arguments.quick else 96)
    x, y, z = arguments.size or ((96, 96, 64) if arguments.quick else (512, 512, 400))
    prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        (scan,) = phantom_scans(Path(folder), 1, (x, y, z))
        windows = f"windows of {arguments.patch}^3, overlap {arguments.overlap}"
        print(f"{x} x {y} x {z} voxels, {arguments.classes} classes, {windows}")
        rows = [measured_apart(name, scan.path, arguments) for name in arguments.rows]
    blended = [row for row in rows if "logits" not in row["row"]]
    ratios = [
        *(Ratio(f"network over export: {row['row']}", row["network_s"] / row["export_s"], 1.0) for row in blended),
        *(Ratio(f"6 GB over peak memory: {row['row']}", MARK_BYTES / row["peak_bytes"], 1.0) for row in blended),
    ]
    print_ratios("139 classes", ratios)
    if not arguments.quick:
        about = {"size": [x, y, z], "patch": arguments.patch, "classes": arguments.classes}
        machine = {**describe(torch.device("cpu")), **about, "overlap": arguments.overlap, "backbone": "hybrid_nano"}
        write_results("many_classes_cpu", machine, [*rows, *(ratio.row() for ratio in ratios)])


if __name__ == "__main__":
    main()
