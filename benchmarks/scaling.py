"""What more processes bring: samples per second at 1, 2 and more, and what the exchange of gradients takes of a step.

Run: ``python benchmarks/scaling.py`` (or ``make bench``), a few minutes. Every count of processes trains the same
network by the engine's own start and DistributedDataParallel, each process on its own samples: on a CPU each on a core
of its own, on GPUs each on one. One process with the same samples per process is the measure. Each count takes turns
with the others, and the median over all steps counts. The time of the exchange is what a step takes longer than one
whose gradients stay where they are; its bytes are counted by a hook as they are handed over. Reading data is not part
of it (benchmarks/data_loading.py). Writes benchmarks/results/scaling_*.json.

``--paper`` measures nothing: it prints the tables of docs/concepts/scaling.md, what 8 to 512 GPUs need of network and
disks and how large a network one GPU holds, from figures in the repository and assumptions that it names
(``yardstick/paper.py``).
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from yardstick.batches import hybrid, mim_with_children, random_batch
from yardstick.machine import Row, describe, options, prepare, write_results
from yardstick.paper import print_paper

from mim3d.objective import Batch
from mim3d.training.launch import FabricModule, StepModule, launch
from mim3d.training.optim import build_optimizer, clip_gradients
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings

OPTIM = Optimisation(learning_rate=1e-6, weight_decay=0.05, clip_norm=1.0)


class Trainer:
    """One process's part: a network, its optimiser and a batch of noise.

    Args:
        arguments: of the script.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        loop = LoopSettings(max_steps=1, devices=arguments.worker, accelerator=arguments.device)
        self.fabric = launch(loop)
        rank = self.fabric.local_rank
        if arguments.device == "cpu":
            # As on a GPU, where no process has a share of another's. Only now: processes that are started inherit it.
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[rank % len(cores)]})
        prepare(self.fabric.device)
        recipe = hybrid(arguments.size)
        method = mim_with_children(recipe.token_size, arguments.children)
        torch.manual_seed(0)
        self.model: FabricModule = self.fabric.setup_module(StepModule(method.build(recipe)))
        schedule = make_schedule(OPTIM, effective_batch=arguments.worker, max_steps=1)
        self.max_norm = schedule.clip_norm
        self.optimizer: Any = self.fabric.setup_optimizers(build_optimizer(self.model, schedule))
        batch: Batch = random_batch(method, recipe, arguments.batch_size, seed=rank)
        self.batch: Batch = self.fabric.to_device(batch)

    def step(self, *, exchanging: bool = True) -> float:
        """Seconds of one step, from when all begin it until the device has done it."""
        several = self.fabric.world_size > 1
        alone = self.fabric.no_backward_sync(self.model) if several and not exchanging else nullcontext()
        self.fabric.barrier()
        start_s = time.perf_counter()
        with alone:
            loss, _ = self.model(self.batch, 0.0)
            self.fabric.backward(loss)
        clip_gradients(self.fabric, self.model, self.optimizer, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        return time.perf_counter() - start_s

    def exchanged_bytes(self) -> int:
        """Bytes that one process hands over to be summed in one step."""
        if self.fabric.world_size == 1:
            return 0
        counted: list[int] = []

        def count(group: torch.distributed.ProcessGroup, bucket: GradBucket) -> Future[torch.Tensor]:
            counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(group, bucket)

        replicas = self.model._forward_module
        assert isinstance(replicas, DistributedDataParallel)
        replicas.register_comm_hook(None, count)
        self.step()
        return sum(counted)


def work(arguments: argparse.Namespace) -> None:
    """Measure in this process and those that it starts; the first prints what all of them took."""
    trainer = Trainer(arguments)
    for _ in range(2):
        trainer.step()
    steps, alone = [], []
    for _ in range(arguments.steps):
        steps.append(trainer.step())
        alone.append(trainer.step(exchanging=False))
    slowest = [max(times) for times in zip(*gathered(trainer, steps), strict=True)]
    slowest_alone = [max(times) for times in zip(*gathered(trainer, alone), strict=True)]
    exchanged = trainer.exchanged_bytes()
    if trainer.fabric.is_global_zero:
        print(json.dumps({"steps_s": slowest, "alone_s": slowest_alone, "exchanged_bytes": exchanged}), flush=True)


def gathered(trainer: Trainer, times: list[float]) -> list[list[float]]:
    """The times of every process."""
    if trainer.fabric.world_size == 1:
        return [times]
    everybody: list[list[float]] = [[] for _ in range(trainer.fabric.world_size)]
    torch.distributed.all_gather_object(everybody, times)
    return everybody


def measure_apart(number: int, arguments: argparse.Namespace) -> Row:
    """Measure ``number`` processes in a run of their own."""
    given = {"--device": arguments.device, "--size": arguments.size, "--children": arguments.children}
    given |= {"--batch_size": arguments.batch_size, "--steps": arguments.steps, "--worker": number}
    command = [sys.executable, __file__, *(str(part) for pair in given.items() for part in pair)]
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{number} processes failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def derive(number: int, measured: list[Row], arguments: argparse.Namespace) -> Row:
    """A row of the results, without what needs the row of one process."""
    step_s = statistics.median(time for part in measured for time in part["steps_s"])
    alone_s = statistics.median(time for part in measured for time in part["alone_s"])
    return {
        "processes": number,
        "size": arguments.size,
        "children": arguments.children,
        "samples_per_process": arguments.batch_size,
        "step_s": round(step_s, 5),
        "best_step_s": round(min(time for part in measured for time in part["steps_s"]), 5),
        "step_without_exchange_s": round(alone_s, 5),
        "samples_per_s": round(number * arguments.batch_size / step_s, 3),
        "exchanged_bytes": measured[0]["exchanged_bytes"],
        "exchange_ratio": round(max(0.0, 1 - alone_s / step_s), 4) if number > 1 else 0.0,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure every count in turns, print the table and write it."""
    device, load = torch.device(arguments.device), os.getloadavg()[0]
    available = torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))
    # One process is what the others are measured against.
    numbers = sorted({1, *(number for number in arguments.processes if number <= available)})
    measured: dict[int, list[Row]] = {number: [] for number in numbers}
    for _ in range(arguments.rounds):
        for number in numbers:
            measured[number].append(measure_apart(number, arguments))
    rows = [derive(number, measured[number], arguments) for number in numbers]
    print(f"hybrid_{arguments.size}, {arguments.batch_size} samples per process and step, {device.type}")
    for row in rows:
        row["efficiency"] = round(row["samples_per_s"] / (row["processes"] * rows[0]["samples_per_s"]), 4)
        # Of the quickest step of each: what is left of it where other work takes its share of the machine.
        row["best_efficiency"] = round(rows[0]["best_step_s"] / row["best_step_s"], 4)
        shares = f"efficiency {row['efficiency']:6.1%} (of the best step {row['best_efficiency']:6.1%})"
        print(
            f"{row['processes']:4} processes  {row['samples_per_s']:9.2f} samples/s  {shares}  "
            f"{row['exchanged_bytes'] / 1e6:9.2f} MB exchanged a step  {row['exchange_ratio']:6.1%} of its time",
            flush=True,
        )
    # Other work on the machine takes more from several processes, which wait for the slowest, than from one.
    machine = {**describe(device), "threads": 1, "devices": available, "load_before": round(load, 1)}
    if not arguments.quick:
        write_results(f"scaling_{device.type}", machine, rows)


def main() -> None:
    """Parse arguments; print the paper, be a process that is measured, or measure."""
    parser = options(__doc__)
    parser.add_argument("--paper", action="store_true", help="print the model on paper instead")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4, 8], help="counts; those that fit")
    parser.add_argument("--size", default="nano", help="of the hybrid backbone")
    parser.add_argument("--children", type=int, default=1, help="of each volume above the last level")
    parser.add_argument("--batch_size", type=int, default=2, help="samples of each process in a step")
    parser.add_argument("--steps", type=int, default=12, help="timed, of each kind, in a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each count")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.processes, arguments.steps, arguments.rounds = [2], 2, 1
    if arguments.paper:
        print_paper()
    elif arguments.worker:
        work(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
