"""What the training loop costs beyond the bare step: mim3d's loop against forward, backward, clip and AdamW alone.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/loop_overhead.py`` (or ``make bench``), minutes. The same
network, batch, optimiser and clipping for both; they take turns in one process, a few steps each, and the median over
the rounds counts. The loop runs as the commands start it: seeds, schedule, meter, metrics every 10 steps, progress, the
look for signals. Steps are those of whole hierarchies, 21 volumes a sample; one of 3 volumes stands beside them, the
shortest step there is. What comes once in 200 steps, a checkpoint, is measured apart. Reading data is not part of
either (benchmarks/data_loading.py). Writes benchmarks/results/loop_overhead_*.json.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from io import StringIO
from itertools import pairwise
from pathlib import Path

import torch
from yardstick.batches import hybrid, mim_with_children, random_batch
from yardstick.machine import Row, describe, options, prepare, write_results

from mim3d.core.run_folder import Run
from mim3d.objective import Batch, Objective
from mim3d.training.loop import train
from mim3d.training.optim import build_optimizer
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings

OPTIM = Optimisation(learning_rate=1e-6, weight_decay=0.05, clip_norm=1.0)
#: The loop may take this much longer than its steps.
MARK = 0.02

#: Size of the hybrid backbone, and children of each volume above the last level.
CASES = (("nano", 4), ("nano", 1), ("small", 1))


class FixedBatch:
    """A source that gives one batch again and again, and remembers when it was asked for one."""

    batch_size = 1
    samples_per_epoch = 1000

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.asked_s: list[float] = []

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Endless."""
        while True:
            self.asked_s.append(time.perf_counter())
            yield self._batch


def build(size: str, num_children: int) -> tuple[Objective, Batch]:
    """The network, and one batch of noise."""
    recipe = hybrid(size)
    method = mim_with_children(recipe.token_size, num_children)
    torch.manual_seed(0)
    return method.build(recipe), random_batch(method, recipe, 1)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_bare(objective: Objective, batch: Batch, device: torch.device, num_steps: int) -> list[float]:
    """Seconds of each step, nothing but the step; on a GPU they are enqueued, and their mean counts for all."""
    schedule = make_schedule(OPTIM, effective_batch=1, max_steps=num_steps)
    optimizer = build_optimizer(objective, schedule)
    objective.train()
    moved = {name: value.to(device) for name, value in batch.items()}
    marks = []
    for step in range(num_steps + 1):
        marks.append(time.perf_counter())
        if step == num_steps:
            break
        objective(moved, 0.0).loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), schedule.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for(device)
    return per_step(marks, time.perf_counter(), device)


def time_loop(objective: Objective, batch: Batch, device: torch.device, num_steps: int) -> tuple[list[float], float]:
    """Seconds of each step in the loop, from one request for a batch to the next; and of all that follows the last."""
    source = FixedBatch(batch)
    loop = LoopSettings(max_steps=num_steps + 1, checkpoint_every=10**6, accelerator=device.type)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        run = Run.create(Path(folder) / "run", command="pretrain", settings={"seed": 0}, inputs={})
        train(objective, source, run=run, loop=loop, optim=OPTIM)
    wait_for(device)
    # Its last step is followed by a checkpoint and is left out of the steps.
    steps = per_step(source.asked_s, source.asked_s[-1], device)
    return steps, time.perf_counter() - source.asked_s[-1] - statistics.median(steps)


def per_step(marks: list[float], end_s: float, device: torch.device) -> list[float]:
    """Seconds of each step; on a GPU, where steps are only enqueued, their mean."""
    if device.type == "cuda":
        return [(end_s - marks[0]) / (len(marks) - 1)]
    return [later - earlier for earlier, later in pairwise(marks)]


def measure(size: str, num_children: int, arguments: argparse.Namespace, device: torch.device) -> Row:
    """One row: bare steps and steps of the loop in turns."""
    objective, batch = build(size, num_children)
    objective.to(device)
    bare: list[float] = []
    looped: list[float] = []
    ends: list[float] = []
    time_bare(objective, batch, device, 2)
    for _ in range(arguments.rounds):
        bare += time_bare(objective, batch, device, arguments.steps)
        steps, end = time_loop(objective, batch, device, arguments.steps)
        looped += steps
        ends.append(end)
    bare_s, loop_s = statistics.median(bare), statistics.median(looped)
    return {
        "size": size,
        "num_volumes": 1 + num_children + num_children**2,
        "bare_s": round(bare_s, 5),
        "loop_s": round(loop_s, 5),
        "mean_bare_s": round(statistics.fmean(bare), 5),
        "mean_loop_s": round(statistics.fmean(looped), 5),
        "overhead_ratio": round(loop_s / bare_s - 1, 5),
        "checkpoint_and_end_s": round(statistics.median(ends), 3),
    }


def main() -> None:
    """Measure every case and print the table."""
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="turns of each")
    parser.add_argument("--steps", type=int, default=20, help="in a turn")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 2
    device = torch.device(arguments.device)
    prepare(device)
    rows = []
    for size, num_children in CASES[1:2] if arguments.quick else CASES:
        row = measure(size, num_children, arguments, device)
        rows.append(row)
        verdict = "PASS" if row["overhead_ratio"] <= MARK else "FAIL"
        print(
            f"hybrid_{size:5} {row['num_volumes']:2} volumes   bare step {row['bare_s'] * 1e3:9.2f} ms   "
            f"in the loop {row['loop_s'] * 1e3:9.2f} ms   "
            f"overhead {row['overhead_ratio']:+.2%}   mark: at most {MARK:.0%}  {verdict}   "
            f"(means {row['mean_bare_s'] * 1e3:.2f} and {row['mean_loop_s'] * 1e3:.2f} ms; "
            f"checkpoint and end {row['checkpoint_and_end_s']:.2f} s)",
            flush=True,
        )
    if not arguments.quick:
        write_results(f"loop_overhead_{device.type}", describe(device), rows)


if __name__ == "__main__":
    main()
