"""How fast mim3d is on one GPU, in at most ten minutes and without internet: from kernels to loading.

Run: ``make gpu`` (or ``python benchmarks/gpu.py``) on a machine with an NVIDIA GPU of some 80 GiB or more and eight
cores; ``--parts`` chooses parts. Each part runs in a process of its own and is stopped when its share of the time is
used up. What it has measured by then is kept: the results are written after each part, and when the script is stopped.
A part that fails says why in one line, its last words stand in the results, and the others go on; the exit code is
then 1.

* kernels: the Triton kernel and PyTorch's path against PyTorch in float64, with times; then the tests marked ``gpu``.
* pretraining: MiM base in bf16, a step at batches of 1 to 16 hierarchies of 192^3 voxels (21 volumes of 96^3 each),
  with and without ``torch.compile``. CUDA graphs are left out: mim3d does not use them.
* finetuning: a step on one 96^3 crop in bf16 with 14 classes, beside MONAI's SwinUNETR and a plain U-Net of nnU-Net's
  kind (MONAI's DynUNet, 32 to 320 channels).
* prediction: a phantom CT from its file to labels, 14 classes, windows of 96^3 that overlap by half, all networks in
  bf16, beside MONAI's inferer.
* memory: what the plan of memory says a step needs against what it took.
* loading: samples a second from eight reading processes and from one, as they come and as float32 on the GPU.

``--quick`` tries every part small, on a CPU where there is no GPU: float32, nothing compiled, and the C++ kernel in the
place of Triton's. Writes benchmarks/results/gpu.json.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from finetuning import in_turns
from finetuning import measure as measure_decoders
from prediction import MONAI, NUM_CLASSES, OURS, OURS_ALL, segment
from pretrain_step import FULL_CHILDREN, Case, time_steps
from pretrain_step import measure as measure_pretraining
from torch import Tensor, nn
from torch.nn import functional as F
from yardstick.apart import print_table, read_rows, run_apart
from yardstick.batches import hybrid, mim_with_children, random_batch
from yardstick.ct_scans import phantom_scans
from yardstick.kernel_errors import kernel_errors
from yardstick.loader_rates import Hierarchy, converted, our_batches, seconds_per_sample
from yardstick.machine import Row, describe, options, write_results
from yardstick.rivals import rivals, without_einops

from mim3d.backbones import create_recipe
from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.datasets.cases import Case as ScanCase
from mim3d.datasets.cases import read_cases
from mim3d.inference import Windows
from mim3d.methods.mim.hierarchy import full_levels
from mim3d.objective import Batch, Objective
from mim3d.tasks.segmentation.network import SegmentationObjective
from mim3d.tasks.segmentation.task import Segmentation
from mim3d.training.memory import StepMemory
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings

ROOT = Path(__file__).parents[1]
GIB = 2**30
OPTIM = Optimisation(learning_rate=1e-6, weight_decay=0.05)
LABELS = {value: f"label {value}" for value in range(NUM_CLASSES)}


def bf16(device: torch.device) -> torch.autocast:
    """Autocast to bf16 on a GPU; nothing on a CPU, where that may be slow. Without its cache: the steps are many."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


def measured(row: Row, work: Callable[[], Row], device: torch.device) -> Row:
    """The row with what was measured and the memory that it took on a GPU, or that there was too little."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        row |= work()
    except torch.OutOfMemoryError:
        return row | {"left_out": "does not fit into memory"}
    if device.type == "cuda":
        row["allocated_gib"] = round(torch.cuda.max_memory_allocated(device) / GIB, 2)
        row["reserved_gib"] = round(torch.cuda.max_memory_reserved(device) / GIB, 2)
    return row


def kernels(device: torch.device, quick: bool) -> Iterator[Row]:
    """Errors and times at the shapes of training; then the tests, which try more shapes."""
    yield from kernel_errors(*(("nano", 2, 1) if quick else ("base", 16, 10)), device)
    tests = ["tests/kernels/test_masked_triton.py"] if quick else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip().splitlines()
    yield {"tests": "pytest -m gpu", "said": said[-1] if said else "", "agrees": done.returncode == 0}


def pretraining(device: torch.device, quick: bool) -> Iterator[Row]:
    """What is compiled comes last: it takes longest."""
    start_s = time.perf_counter()
    precision = "bfloat16" if device.type == "cuda" else "float32"
    case = Case("mim3d", "nano" if quick else "base", precision, num_children=1 if quick else FULL_CHILDREN)
    plain = [(False, batch) for batch in ((1, 2) if quick else (1, 2, 4, 8, 16))]
    for compiled, batch in [*plain, *(() if quick else ((True, batch) for batch in (4, 16, 1, 8, 2)))]:
        torch._dynamo.reset()
        one = replace(case, compiled=compiled, batch_size=batch)
        row: Row = {"size": one.size, "precision": precision, "batch": batch, "compiled": compiled}
        # Compiling may take a minute for each batch, so that none begins in the second half of the time.
        if compiled and time.perf_counter() - start_s > SECONDS["pretraining"] / 2:
            yield row | {"left_out": "too little time left to compile once more"}
            continue
        yield measured(row, partial(_pretraining_step, one, device, 1 if quick else 5), device)


def _pretraining_step(case: Case, device: torch.device, num_steps: int) -> Row:
    start_s = time.perf_counter()
    found = measure_pretraining(case, device, num_steps, threads=1)
    samples_per_s = case.batch_size / found["time_s"]
    return {
        "ms_per_sample": round(1e3 / samples_per_s, 2),
        "samples_per_s": round(samples_per_s, 2),
        "volumes_per_s": round(case.num_volumes * samples_per_s, 1),
        "all_took_s": round(time.perf_counter() - start_s, 1),
    }


def finetuning(device: torch.device, quick: bool) -> Iterator[Row]:
    """First what is compared: the base size beside the others."""
    edge, rounds = (64, 1) if quick else (96, 5)
    volume = torch.rand(1, 1, edge, edge, edge, device=device)
    label = torch.randint(0, NUM_CLASSES, (1, edge, edge, edge), device=device)

    def forward(network: nn.Module) -> None:
        with torch.no_grad():
            network(volume)

    def step(network: nn.Module) -> None:
        torch.autograd.backward(F.cross_entropy(network(volume), label))
        network.zero_grad(set_to_none=True)

    with bf16(device):
        yield from measure_decoders("nano" if quick else "base", NUM_CLASSES, 32 if quick else edge, rounds, device)
        others = rivals(NUM_CLASSES, device, quick)
        works = {(name, work): partial(work, network) for name, network in others.items() for work in (forward, step)}
        times = in_turns({f"{name}/{work.__name__}": done for (name, work), done in works.items()}, rounds, device)
        for name in others:
            found = {f"{what}_s": round(times[f"{name}/{what}"], 4) for what in ("forward", "step")}
            yield {"network": name, "classes": NUM_CLASSES, **found}
        yield from without_einops()
        for size in () if quick else ("small", "nano"):
            yield from measure_decoders(size, NUM_CLASSES, edge, rounds, device)


def prediction(device: torch.device, quick: bool) -> Iterator[Row]:
    """From the file to labels on the scan's grid, wall time; the first windows of each network are not timed."""
    backbone, edge = ("hybrid_nano", 64) if quick else ("hybrid_base", 96)
    windows = Windows(patch_size=(edge, edge, edge), overlap=0.0 if quick else 0.5)
    objective = Segmentation(patch_size=windows.patch_size).build(create_recipe(backbone), LABELS)
    assert isinstance(objective, SegmentationObjective)
    objective.to(device).eval()
    networks: dict[str, Callable[[Tensor], Any]] = {backbone: objective.logits}
    networks |= {name: network.eval() for name, network in rivals(NUM_CLASSES, device, quick).items()}

    def narrowly(network: Callable[[Tensor], Any], window_BCXYZ: Tensor) -> Tensor:
        with torch.no_grad(), bf16(device):
            logits: Tensor = network(window_BCXYZ)
        return logits.float()

    def work(method: str, name: str) -> Row:
        network = partial(narrowly, networks[name])
        network(torch.zeros(windows.batch_size, 1, edge, edge, edge, device=device))
        start_s = time.perf_counter()
        segment(method, network, case, replace(windows, body_only=method == OURS), device)
        return {"wall_s": round(time.perf_counter() - start_s, 2)}

    with tempfile.TemporaryDirectory() as folder:
        size = (80, 64, 64) if quick else (384, 384, 256)
        (scan,) = phantom_scans(Path(folder), 1, size)
        case = ScanCase(id="scan", images=(str(scan.path),), patient="scan")
        methods = [(OURS, backbone), (OURS_ALL, backbone), *((MONAI, name) for name in networks)]
        for method, name in methods:
            row: Row = {"windows_by": method, "network": name, "voxels": "x".join(map(str, size))}
            yield measured(row, partial(work, method, name), device)
    yield from without_einops()


def memory(device: torch.device, quick: bool) -> Iterator[Row]:
    """Pre-training with and without recomputation, and fine-tuning."""
    size, children = ("nano", 1) if quick else ("base", FULL_CHILDREN)
    for recompute, batch_size in ((False, 1),) if quick else ((False, 1), (False, 4), (True, 4), (False, 12)):
        recipe = replace(hybrid(size), recompute=recompute)
        method = mim_with_children(recipe.token_size, children)
        row: Row = {"what": "pretraining", "size": size, "batch": batch_size, "recompute": recompute}
        yield _planned_and_taken(row, partial(method.build, recipe), random_batch(method, recipe, batch_size), device)
    edge = 32 if quick else 96
    task = Segmentation(patch_size=(edge, edge, edge))
    label = torch.zeros(2, 1, edge, edge, edge, dtype=torch.int64)
    row = {"what": "finetuning", "size": size, "batch": len(label), "recompute": False}
    batch = {"image": label[:, None].float(), "label": label}
    yield _planned_and_taken(row, partial(task.build, hybrid(size), LABELS), batch, device)


def _planned_and_taken(row: Row, build: Callable[[], Objective], batch: Batch, device: torch.device) -> Row:
    """The plan counts the batch of the step before as well, which pictures are drawn from and which is not here."""
    on_gpu = device.type == "cuda"
    loop = LoopSettings(max_steps=1, accelerator=device.type, precision="bf16-mixed" if on_gpu else "32-true")
    sample = {key: (tuple(value.shape[1:]), value.dtype) for key, value in batch.items()}
    need = StepMemory(build, sample, loop, OPTIM).need(row["batch"], 1)
    tensors = need.total - need.program - need.reserve
    row |= {"tensors_gib": round(tensors / GIB, 2), "predicted_gib": round(need.total / GIB, 2)}

    def work() -> Row:
        network = build().to(device)
        moved = {key: value.to(device) for key, value in batch.items()}
        time_steps(network, lambda: network(moved, 0.0).loss, "bfloat16" if on_gpu else "float32", device, 2)
        return {}

    row = measured(row, work, device)
    if row.get("reserved_gib"):
        row["predicted_over_reserved"] = round(row["predicted_gib"] / row["reserved_gib"], 2)
    return row


def loading(device: torch.device, quick: bool) -> Iterator[Row]:
    """Samples of pre-training from files in the system's memory, batches of one."""
    backbone = "hybrid_nano" if quick else "hybrid_base"
    levels = full_levels(create_recipe(backbone).token_size)
    edge = 64 if quick else 256
    with tempfile.TemporaryDirectory() as folder:
        (scan,) = phantom_scans(Path(folder), 1, (edge, edge, edge))
        cases = read_cases(scan.path.parent)
        scans = list(build_cache(cases, Path(folder) / "cache", Preprocessing(intensities="8-bit")))
        dropped_s = torch.zeros(1, dtype=torch.float64)
        ours = our_batches(scans, {}, Hierarchy(backbone, levels), dropped_s, backbone)
        starts = {"as stored": ours, f"float32 on the {device.type}": converted(ours, device)}
        for num_workers in (2,) if quick else (8, 1):
            times = seconds_per_sample(
                starts,
                dropped_s,
                num_workers=num_workers,
                cold=False,
                num_rounds=1 if quick else 2,
                num_samples=10 if quick else 100 * num_workers,
            )
            for what, rounds in times.items():
                yield {"workers": num_workers, "batches": what, "samples_per_s": round(1 / min(rounds), 1)}


#: What measures a part on a device, small or not; each row counts as soon as it is there.
PARTS: dict[str, Callable[[torch.device, bool], Iterator[Row]]] = {
    "kernels": kernels,
    "pretraining": pretraining,
    "finetuning": finetuning,
    "prediction": prediction,
    "memory": memory,
    "loading": loading,
}

#: Shares of the time, the start of a part's process included: together under ten minutes.
SECONDS = {"kernels": 80, "pretraining": 170, "finetuning": 80, "prediction": 110, "memory": 60, "loading": 80}


def run(arguments: argparse.Namespace, folder: Path) -> int:
    """Run each part, print its table and write what there is, also of a part that is cut short; 1 when one failed."""
    # A script that is told to end leaves by the same way as one that is interrupted.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    device = torch.device(arguments.device)
    machine = {**describe(device), "cuda": torch.version.cuda, "cores": len(os.sched_getaffinity(0))}
    print(machine, flush=True)
    rows: list[Row] = []
    for name in arguments.parts:
        print(f"\n{name}", flush=True)
        written, log, failed = folder / f"{name}.jsonl", folder / f"{name}.txt", "stopped with the script"
        command = [sys.executable, __file__, "--device", arguments.device, "--part", name, "--rows", str(written)]
        try:
            failed = run_apart([*command, *(["--quick"] if arguments.quick else [])], SECONDS[name], log)
        finally:
            found = read_rows(written)
            if not failed and any(row.get("agrees") is False for row in found):
                failed = "what is marked False under agrees"
            print_table(found)
            if failed:
                print(f"  {name} failed: {failed}", flush=True)
                found.append({"failed": failed, "said": log.read_text(errors="replace")[-2000:]})
            rows += ({"part": name, **row} for row in found)
            if not arguments.quick:
                write_results("gpu", machine, rows)
    return int(any("failed" in row for row in rows))


def main() -> None:
    """Parse arguments; measure one part when told to, else those that are asked for."""
    parser = options(__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured, in this order"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        sys.exit("There is no GPU here; --quick tries every part small on the CPU.")
    if arguments.part is not None:
        with arguments.rows.open("w") as sink:
            for row in PARTS[arguments.part](torch.device(arguments.device), arguments.quick):
                sink.write(json.dumps(row) + "\n")
                sink.flush()
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(arguments, Path(folder)))


if __name__ == "__main__":
    main()
