"""What segmenting a scan costs: mim3d against MONAI's SlidingWindowInferer and the scheme that nnU-Net publishes.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/prediction.py`` (or ``make bench``), a quarter of an hour on one
core; ``--quick`` takes a minute and writes nothing. The same network (untrained, 14 classes), windows and overlap for
all, each in a process of its own: from the file of a phantom CT to classes on its grid. Times are processor time, that
of the network told apart; memory is the most held above what the process held with its network and nothing else.

Where the difference comes from:

* windows: mim3d lays them over the body alone and leaves out those that see nothing of it (``body_only``); ``mim3d, all
  windows`` stands beside it without that. MONAI, nnU-Net and that cover the scan with the same number of windows.
* passes: MONAI and nnU-Net weigh, add, divide, and take softmax and argmax of scores of the whole scan; mim3d weighs
  and adds in one pass over a window and takes the largest sum, since neither the common weight nor softmax changes
  which class that is.
* precision: `mim3d predict` computes in bfloat16 where the machine is good at it; ``bfloat16`` says what that gives on
  this one, and ``additive`` with the faster decoder in the place of the U-Net's. Both compute all windows.
* memory: a window's edge of rows is held instead of the scan's scores, and the scan as stored instead of float32.

Windows lie elsewhere than MONAI's (evenly spaced, as nnU-Net's) and are weighed without its lower limit, so maps differ
where windows disagree, which those of an untrained network do everywhere; the share of voxels that agrees with
``mim3d, all windows`` stands beside the times. Writes benchmarks/results/prediction_*.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yardstick.ct_scans import phantom_scans
from yardstick.machine import describe, options, peak_memory, prepare, write_results
from yardstick.marks import Ratio, print_ratios
from yardstick.sliding_schemes import monai_labels, nnunet_labels

from mim3d.backbones import create_recipe
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.preprocessing import prepare as prepare_case
from mim3d.datasets.cases import Case
from mim3d.inference import Network, Windows, classes_readout, predict_scan
from mim3d.scans.intensity import Intensity
from mim3d.tasks.segmentation.network import SegmentationObjective
from mim3d.tasks.segmentation.task import Segmentation

NUM_CLASSES = 14
OURS, OURS_ALL, MONAI = "mim3d", "mim3d, all windows", "MONAI"
NNUNET_16, NNUNET_32 = "nnU-Net's scheme, float16", "nnU-Net's scheme, float32"
NARROW, ADDITIVE = "mim3d, all windows, bfloat16", "mim3d, all windows, bfloat16, additive"
METHODS = (OURS, OURS_ALL, MONAI, NNUNET_16, NNUNET_32, NARROW, ADDITIVE)
INTENSITY = Intensity()


class TimedNetwork:
    """A segmentation network that counts its windows and the time they take."""

    def __init__(self, backbone: str, patch_size: tuple[int, int, int], method: str) -> None:
        torch.manual_seed(0)
        labels = {value: f"label {value}" for value in range(NUM_CLASSES)}
        task = Segmentation(patch_size=patch_size, decoder="additive" if method == ADDITIVE else "unet")
        self._is_narrow = method in (NARROW, ADDITIVE)
        objective = task.build(create_recipe(backbone), labels)
        assert isinstance(objective, SegmentationObjective)
        self._objective = objective.eval()
        self.num_windows, self.seconds = 0, 0.0

    def __call__(self, window_BCXYZ: Tensor) -> Tensor:
        """Logits of a batch of windows."""
        start_s = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._is_narrow):
            logits = self._objective.logits(window_BCXYZ)
        self.seconds += time.process_time() - start_s
        self.num_windows += len(window_BCXYZ)
        return logits


@torch.no_grad()
def segment(method: str, network: Network, case: Case, windows: Windows, device: torch.device) -> np.ndarray:
    """Classes of a scan on its own grid, from its file; the network is on that device."""
    if method in (OURS, OURS_ALL, NARROW, ADDITIVE):
        labels, _ = predict_scan(
            [network],
            case,
            readout=classes_readout(NUM_CLASSES),
            preprocessing=Preprocessing(),
            intensity=INTENSITY,
            windows=windows,
            device=device,
        )
        return labels
    prepared = prepare_case(case, Preprocessing(), with_label=False)
    image = torch.from_numpy(INTENSITY.apply(prepared.image, prepared.statistics)).to(device)
    if method == MONAI:
        return monai_labels(network, image, windows)
    return nnunet_labels(network, image, windows, torch.float16 if method == NNUNET_16 else torch.float32)


def measure(method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method in this process; its map is left beside the scan."""
    device = torch.device("cpu")
    prepare(device)
    edge = arguments.patch
    windows = Windows(patch_size=(edge, edge, edge), batch_size=1, body_only=method == OURS)
    network = TimedNetwork(arguments.backbone, windows.patch_size, method)
    with torch.no_grad():
        network(torch.zeros(1, 1, edge, edge, edge))
    network.num_windows, network.seconds = 0, 0.0
    before_bytes = peak_memory(device)
    case = Case(id="scan", images=(arguments.scan,), patient="scan")
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    labels = segment(method, network, case, windows, device)
    cpu_s, wall_s = time.process_time() - start_cpu_s, time.perf_counter() - start_s
    np.save(f"{arguments.scan}.{METHODS.index(method)}.npy", labels)
    return {
        "method": method,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(cpu_s, 2),
        "network_s": round(network.seconds, 2),
        "other_s": round(cpu_s - network.seconds, 2),
        "windows": network.num_windows,
        "peak_bytes": peak_memory(device) - before_bytes,
    }


def measured_apart(method: str, scan: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One method in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--scan", str(scan)]
    command += ["--backbone", arguments.backbone, "--patch", str(arguments.patch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{method}: {done.stderr}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = (np.load(f"{scan}.{METHODS.index(name)}.npy") for name in (OURS_ALL, method))
    row["agrees_with_all_windows"] = round(float((ours == theirs).mean()), 5)
    spent = (
        f"{row['cpu_s']:8.1f} s ({row['network_s']:.1f} s in {row['windows']} windows, {row['other_s']:.1f} s besides)"
    )
    agrees = "" if method == OURS else f"  agrees {row['agrees_with_all_windows']:.4f}"
    print(f"  {method:38} {spent}  {row['peak_bytes'] / 2**20:7.0f} MiB{agrees}", flush=True)
    return row


def ratios_of(rows: list[dict[str, Any]]) -> list[Ratio]:
    """Times and memory of the others over those of mim3d, with its gain from the body apart."""
    by_name = {row["method"]: row for row in rows}
    ratios = []
    for ours in (OURS, OURS_ALL):
        for other in (MONAI, NNUNET_16, NNUNET_32):
            mark = 1.0 if ours == OURS else None
            for key, what in (("cpu_s", "time"), ("other_s", "time besides the network"), ("peak_bytes", "memory")):
                value = by_name[other][key] / by_name[ours][key]
                ratios.append(Ratio(f"{what}: {other} / {ours}", value, at_least=mark if key == "cpu_s" else None))
    for ours in (NARROW, ADDITIVE):
        ratios.append(Ratio(f"time: {MONAI} / {ours}", by_name[MONAI]["cpu_s"] / by_name[ours]["cpu_s"]))
    return ratios


def main() -> None:
    """Measure and print."""
    parser = options(__doc__)
    parser.add_argument("--backbone", default="hybrid_nano")
    parser.add_argument("--size", type=int, nargs=3, default=None, help="voxels of the phantom")
    parser.add_argument("--patch", type=int, default=None, help="edge of a window")
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--scan", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.method is not None:
        print(json.dumps(measure(arguments.method, arguments)))
        return
    arguments.patch = arguments.patch or (48 if arguments.quick else 96)
    x, y, z = arguments.size or ((128, 128, 96) if arguments.quick else (256, 256, 200))
    prepare(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        (scan,) = phantom_scans(Path(folder), 1, (x, y, z))
        print(f"{x} x {y} x {z} voxels, {NUM_CLASSES} classes, {arguments.backbone}, windows of {arguments.patch}^3")
        order = [OURS_ALL, *(method for method in METHODS if method != OURS_ALL)]
        rows = [measured_apart(method, scan.path, arguments) for method in order]
    ratios = ratios_of(rows)
    print_ratios("others over mim3d", ratios)
    if not arguments.quick:
        about = {"size": [x, y, z], "patch": arguments.patch, "backbone": arguments.backbone, "classes": NUM_CLASSES}
        machine = {**describe(torch.device("cpu")), **about}
        name = "prediction_cpu" if arguments.backbone == "hybrid_nano" else f"prediction_{arguments.backbone}_cpu"
        write_results(name, machine, [*rows, *(ratio.row() for ratio in ratios)])


if __name__ == "__main__":
    main()
