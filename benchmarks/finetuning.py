"""What a step of fine-tuning costs with each decoder, and what Dice it buys.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/finetuning.py`` (or ``make bench``), a quarter of an hour on one
core: one 96^3 crop in float32 through encoder and decoder, forward alone and with backward, all decoders in turns at
every round, the encoder alone beside them; 14 classes, and 105 for the base size.

``--dice DATA`` adds the Dice at equal steps and at equal time: `mim3d finetune` from scratch by
``recipes/hippocampus_cpu.yaml`` on a data set such as MSD Task04, with every decoder and ``--seeds`` seeds, and the
paired difference to the U-Net decoder over held-out cases' means (a mean over seeds, with its 95 % t interval).

Times are processor time. Writes benchmarks/results/finetuning_*.json.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import t as student_t
from torch import Tensor, nn
from torch.nn import functional as F
from yardstick.machine import Row, describe, options, prepare, write_results

from mim3d.backbones import create_model
from mim3d.tasks.segmentation.decoders import DECODERS

SIZES = ("nano", "small", "base")
BASELINE = "unet"
RECIPE = Path(__file__).parents[1] / "recipes" / "hippocampus_cpu.yaml"


def in_turns(works: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Least processor time of each, seconds (wall time on a GPU), after a first pass of all."""
    best = dict.fromkeys(works, math.inf)
    for round_number in range(rounds + 1):
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            start_s = clock()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_number:
                best[name] = min(best[name], clock() - start_s)
    return best


def measure(size: str, num_classes: int, edge: int, rounds: int, device: torch.device) -> list[Row]:
    """One row for the encoder alone and one for each decoder."""
    torch.manual_seed(0)
    encoder = create_model(f"hybrid_{size}").to(device)
    volume = torch.rand(1, 1, edge, edge, edge, device=device)
    label = torch.randint(0, num_classes, (1, edge, edge, edge), device=device)
    decoders: dict[str, nn.Module] = {
        name: decoder(
            in_channels=1,
            strides=encoder.strides,
            widths=encoder.widths,
            feature_dim=16,
            num_classes=num_classes,
        ).to(device)
        for name, decoder in DECODERS.items()
    }

    def logits(name: str) -> Tensor:
        found: Tensor = decoders[name](volume, encoder(volume))
        return found

    def forward(name: str) -> None:
        with torch.no_grad():
            logits(name)

    def step(name: str) -> None:
        torch.autograd.backward(F.cross_entropy(logits(name), label))
        for module in (encoder, decoders[name]):
            module.zero_grad(set_to_none=True)

    def encoder_alone(train: bool) -> None:
        with torch.set_grad_enabled(train):
            total = torch.stack([features.sum() for features in encoder(volume)]).sum()
        if train:
            torch.autograd.backward(total)

    works: dict[str, Callable[[], object]] = {
        "encoder/forward": partial(encoder_alone, False),
        "encoder/step": partial(encoder_alone, True),
    }
    for name in decoders:
        works[f"{name}/forward"] = partial(forward, name)
        works[f"{name}/step"] = partial(step, name)
    times = in_turns(works, rounds, device)
    rows: list[Row] = []
    for name in ("encoder", *decoders):
        row: Row = {"size": size, "classes": num_classes, "decoder": "none" if name == "encoder" else name}
        if name in decoders:
            row["parameters"] = sum(parameter.numel() for parameter in decoders[name].parameters())
        for what in ("forward", "step"):
            row[f"{what}_s"] = round(times[f"{name}/{what}"], 4)
            row[f"{BASELINE}_over_{what}"] = round(times[f"{BASELINE}/{what}"] / times[f"{name}/{what}"], 2)
        rows.append(row)
        print(row, flush=True)
    return rows


def curve(data: str, decoder: str, seed: int, max_steps: int, folder: Path) -> dict[int, tuple[float, float]]:
    """Dice of each validation of one run by its step, with the seconds of training before it."""
    out = folder / f"{decoder}_{seed}"
    command = [sys.executable, "-m", "mim3d", "finetune", "--config", str(RECIPE), "--data", data, "--out", str(out)]
    command += ["--task.decoder", decoder, "--seed", str(seed), "--max_steps", str(max_steps)]
    command += ["--cache", str(folder / "cache"), "--num_workers", "0", "--precision", "32-true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-1000:]}")
    points: dict[int, tuple[float, float]] = {}
    training_s = 0.0
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        # A line of validation has no time of its own: that of the last line of training before it counts.
        training_s = entry.get("time_s", training_s)
        if "val/dice" in entry:
            points[entry["step"]] = (entry["val/dice"], training_s)
    return points


def measure_dice(data: str, seeds: int, max_steps: int) -> list[Row]:
    """Rows of Dice by decoder and step, and of the paired differences to the baseline at the end."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        runs = {
            (decoder, seed): curve(data, decoder, seed, max_steps, Path(name))
            for seed, decoder in itertools.product(range(seeds), DECODERS)
        }
    for (decoder, seed), points in runs.items():
        for step, (dice, training_s) in points.items():
            rows.append({"decoder": decoder, "seed": seed, "step": step, "dice": round(dice, 4), "s": training_s})
            print(rows[-1], flush=True)
    last = max(runs[BASELINE, 0])
    for decoder in DECODERS.keys() - {BASELINE}:
        gains = [runs[decoder, seed][last][0] - runs[BASELINE, seed][last][0] for seed in range(seeds)]
        half = stdev(gains) / math.sqrt(seeds) * student_t.ppf(0.975, seeds - 1) if seeds > 1 else math.nan
        rows.append({"decoder": decoder, "step": last, "gain": round(mean(gains), 4), "half_interval": round(half, 4)})
        print(rows[-1], flush=True)
    return rows


def run(arguments: argparse.Namespace) -> None:
    """All parts."""
    device = torch.device(arguments.device)
    prepare(device)
    edge, rounds = (32, 1) if arguments.quick else (96, 3)
    cases = [("nano", 3)] if arguments.quick else [*((size, 14) for size in SIZES), ("base", 105)]
    rows = [row for size, classes in cases for row in measure(size, classes, edge, rounds, device)]
    if arguments.dice is not None:
        rows += measure_dice(arguments.dice, arguments.seeds, arguments.max_steps)
    if not arguments.quick:
        write_results(f"finetuning_{device.type}", describe(device), rows)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--dice", metavar="DATA", help="a labelled data set: adds Dice at equal steps and equal time")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each decoder for --dice (default 3)")
    parser.add_argument("--max_steps", type=int, default=600, help="steps of each run for --dice (default 600)")
    run(parser.parse_args())
