"""What one step of MiM costs: mim3d against the dense network and a masked autoencoder, in one run.

Run: ``python benchmarks/pretrain_step.py`` (or ``make bench``). One thread on a CPU; a GPU where there is one. Every
figure is the best of a few steps (forward, backward, AdamW) in a process of its own, so that peak memory is its own
too. Ratios are taken at one child per level, 3 volumes a sample: the dense network needs more memory than most machines
have for the full hierarchy of 21, which is measured for mim3d alone. Writes benchmarks/results/pretrain_step_*.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from yardstick.batches import hybrid, mim_with_children, random_batch
from yardstick.dense_mim import DenseMiM
from yardstick.flops import count_flops
from yardstick.machine import Row, best_seconds, describe, gemm_peak, options, peak_memory, prepare, write_results

from mim3d.backbones import create_recipe
from mim3d.kernels.masked.operator import Kernel, kernel_forced
from mim3d.methods.mae import MAE
from mim3d.objective import Batch, Objective
from mim3d.training.launch import compile_blocks

SIZES = ("nano", "tiny", "small", "base")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FULL_CHILDREN = 4


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        network: ``mim3d``, ``dense`` (the yardstick) or ``mae`` (ViT-B on the same voxels).
        size: of the hybrid backbone.
        precision: ``float32`` or ``bfloat16`` (autocast).
        kernel: of the masked depth-wise convolution; None for the device's own choice.
        num_children: of each volume above the last level.
        recompute: whether convolution blocks are recomputed in the backward pass.
        batch_size: hierarchies.
        compiled: whether the blocks go through ``torch.compile``.
    """

    network: str
    size: str
    precision: str
    kernel: Kernel | None = None
    num_children: int = 1
    recompute: bool = False
    batch_size: int = 1
    compiled: bool = False

    @property
    def num_volumes(self) -> int:
        """Volumes of one hierarchy."""
        return 1 + self.num_children + self.num_children**2

    @property
    def title(self) -> str:
        """For people."""
        network = {"mim3d": "mim3d", "dense": "dense yardstick", "mae": "MAE ViT-B"}[self.network]
        kernel = f"{self.kernel} kernel" if self.kernel else ""
        ways = ("recompute" if self.recompute else "", "compiled" if self.compiled else "")
        return ", ".join(part for part in (network, kernel, *ways) if part)


def list_cases(sizes: list[str], device: str, batch_size: int) -> list[Case]:
    """For each size the yardstick, ours with every kernel, and the autoencoder; then ours on the full hierarchy."""
    kernels: list[Kernel] = ["torch", "cpp" if device == "cpu" else "triton"]
    cases = []
    for size in sizes:
        cases += [Case("dense", size, precision) for precision in PRECISIONS]
        cases += [Case("mim3d", size, precision, kernel) for kernel in kernels for precision in PRECISIONS]
        if size == "base":
            cases += [Case("mae", size, precision) for precision in PRECISIONS]
            cases += [Case("mim3d", size, precision, kernels[-1], compiled=True) for precision in PRECISIONS]
    full = Case("mim3d", sizes[-1], "float32", kernels[-1], FULL_CHILDREN, batch_size=batch_size)
    narrow = replace(full, precision="bfloat16")
    return [*cases, full, narrow, replace(narrow, recompute=True), replace(narrow, kernel="torch")]


def build_loss(case: Case, device: torch.device) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The network, and what computes its loss on a fixed batch."""
    recipe = replace(hybrid(case.size), recompute=case.recompute)
    method = mim_with_children(recipe.token_size, case.num_children)
    if case.network == "mae":
        vit, size = create_recipe("vit_base"), method.hierarchy(recipe).levels[0].level.size
        autoencoding = MAE(size=size).planned(vit, [size])
        crops = random_batch(autoencoding, vit, case.batch_size * case.num_volumes)
        autoencoder = autoencoding.build(vit).to(device)
        return autoencoder, partial(loss_of_batch, autoencoder, {key: value.to(device) for key, value in crops.items()})
    batch = {name: value.to(device) for name, value in random_batch(method, recipe, case.batch_size).items()}
    objective = method.build(recipe).to(device)
    if case.network == "dense":
        dense = DenseMiM(objective)
        return dense, lambda: dense(batch)[0]
    if case.compiled:
        compile_blocks(objective)
    return objective, partial(loss_of_batch, objective, batch)


def loss_of_batch(objective: Objective, batch: Batch) -> Tensor:
    """Loss of a fixed batch."""
    return objective(batch, 0.0).loss


def measure(case: Case, device: torch.device, num_steps: int, threads: int) -> dict[str, float]:
    """Loss of the first step, seconds of the best of the others, and the process's peak memory."""
    prepare(device, threads)
    torch.manual_seed(0)
    network, loss_of = build_loss(case, device)
    with kernel_forced(case.kernel) if case.kernel else nullcontext():
        loss, time_s = time_steps(network, loss_of, case.precision, device, num_steps)
    return {"loss": loss, "time_s": time_s, "memory_gib": peak_memory(device) / 2**30}


def time_steps(
    network: nn.Module, loss_of: Callable[[], Tensor], precision: str, device: torch.device, num_steps: int
) -> tuple[float, float]:
    """Loss of the first step of AdamW, and seconds of the best of the others."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=True)
    dtype = PRECISIONS[precision]

    def step() -> float:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_of()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    loss = step()
    return loss, best_seconds(step, device, num_steps)


def measure_apart(case: Case, arguments: argparse.Namespace) -> dict[str, float]:
    """Measure in a fresh process."""
    options = {"--device": arguments.device, "--threads": arguments.threads, "--steps": arguments.steps}
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    command += [str(part) for option in options.items() for part in option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def derive(case: Case, measured: dict[str, float], dense_s: float | None, peaks: dict[str, float]) -> Row:
    """A row of the results: what was measured, per sample and against the floor and the yardstick."""
    per_sample_s = measured["time_s"] / case.batch_size
    row: Row = {**asdict(case), "num_volumes": case.num_volumes, "loss": round(measured["loss"], 6)}
    row |= {"s_per_sample": round(per_sample_s, 4), "peak_memory_gib": round(measured["memory_gib"], 2)}
    if case.network != "mae":
        recipe = hybrid(case.size)
        needed = count_flops(mim_with_children(recipe.token_size, case.num_children), recipe).needed
        row["needed_gflop_per_s"] = round(needed / per_sample_s / 1e9, 1)
        row["share_of_floor"] = round(needed / peaks[case.precision] / per_sample_s, 3)
    if dense_s is not None and case.num_children == 1:
        row["times_dense_float32"] = round(dense_s / per_sample_s, 2)
    return row


def print_row(case: Case, row: Row) -> None:
    """One line of the table."""
    rate, floor, ratio = (row.get(key) for key in ("needed_gflop_per_s", "share_of_floor", "times_dense_float32"))
    print(
        f"{case.size:5} {case.num_volumes:3} volumes  {case.precision:8}  {case.title:30} "
        f"{row['s_per_sample']:9.3f} s {row['peak_memory_gib']:6.2f} GiB "
        f"{'' if rate is None else f'{rate:7.1f} GFLOP/s {floor:4.0%} of the floor':>36} "
        f"{'' if ratio is None else f'{ratio:6.2f}x dense float32'}",
        flush=True,
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure every case, print the table and write it."""
    device = torch.device(arguments.device)
    prepare(device, arguments.threads)
    peaks = {name: gemm_peak(device, dtype) for name, dtype in PRECISIONS.items()}
    machine = {
        **describe(device),
        "gemm_peak_gflop_per_s": {name: round(peak / 1e9, 1) for name, peak in peaks.items()},
    }
    print(machine, flush=True)
    rows, dense_s = [], {}
    for case in list_cases(arguments.sizes, arguments.device, arguments.batch_size):
        measured = measure_apart(case, arguments)
        if case.network == "dense" and case.precision == "float32":
            dense_s[case.size] = measured["time_s"] / case.batch_size
        rows.append(derive(case, measured, dense_s.get(case.size), peaks))
        print_row(case, rows[-1])
    if not arguments.quick:
        write_results(f"pretrain_step_{device.type}{arguments.suffix}", machine, rows)


def main() -> None:
    """Parse arguments; measure one case when told to, else all."""
    parser = options(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the hybrid backbone")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--steps", type=int, default=3, help="timed steps, of which the best counts")
    parser.add_argument("--batch_size", type=int, default=1, help="hierarchies per step of the full hierarchy")
    parser.add_argument("--suffix", default="", help="of the results' file name")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.steps = ["nano"], 1
    if arguments.case is None:
        run(arguments)
    else:
        case, device = Case(**json.loads(arguments.case)), torch.device(arguments.device)
        print(json.dumps(measure(case, device, arguments.steps, arguments.threads)))


if __name__ == "__main__":
    main()
