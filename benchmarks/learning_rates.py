"""At which learning rates MiM learns at small batches: losses of every level, and the probe, rate by rate.

Run: ``OMP_NUM_THREADS=1 python benchmarks/learning_rates.py phantoms hippocampus=CACHE --batch 1 --steps 120``: data
sets or caches of them by name; ``phantoms`` are made on the spot, and measured alone where nothing is named. Every run
is a short pre-training with mim3d's defaults but for the rate: the planned hierarchy, warm-up, AdamW, a cosine to 0. A
row has the loss of each level over the first and the last tenth of the steps (1 is the loss of a constant guess), the
largest norm of the gradient, and the probe's balanced accuracy (linear, nearest neighbours) of the frozen encoder on
held-out scans, beside an encoder drawn at random. The first rate is the paper's for the batch, unless ``--no_rule``.
Equal steps at each rate, one seed.

A row in benchmarks/results/learning_rates_*.json is replaced by one of the same size, data, batch, steps and rate, and
all others stay, so that the table is made in parts. The floors in mim3d/methods/masked.py were read from it.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean

import torch
from yardstick.machine import RESULTS, Row, describe, options, prepare, write_results

import mim3d
from mim3d.core.errors import DataError
from mim3d.core.run_folder import read_run
from mim3d.methods.mim.method import MiM
from mim3d.phantoms.dataset import PhantomSettings, make_set
from mim3d.training.schedule import Optimisation

#: The same phantoms as those of `mim3d probe --data phantom`.
PHANTOMS = PhantomSettings(num_cases=15, size=(96, 96, 80), seed=0)

#: What tells a row from all others.
KEYS = ("size", "data", "batch", "steps", "learning_rate")


def pretrained(folder: Path, data: str, size: str, rate: float, args: argparse.Namespace) -> Row:
    """What one run of pre-training logged."""
    mim3d.pretrain(
        data=data,
        out=str(folder),
        backbone=f"hybrid_{size}",
        fold=0,
        max_steps=args.steps,
        batch_size=min(args.batch, args.micro),
        accumulation=max(1, args.batch // args.micro),
        optim=Optimisation(learning_rate=rate),
        log_every=max(1, args.steps // 30),
        checkpoint_every=0,
        pictures_every=0,
        accelerator=args.device,
    )
    lines = [line for line in read_run(folder).metrics if "loss" in line]
    part = max(1, len(lines) // 10)
    levels = [name for name in lines[-1] if name.startswith("loss/") and "align" not in name]
    return {
        "loss_first": {name[5:]: round(fmean(line[name] for line in lines[:part]), 3) for name in levels},
        "loss_last": {name[5:]: round(fmean(line[name] for line in lines[-part:]), 3) for name in levels},
        "largest_gradient": round(max(line["grad_norm"] for line in lines), 2),
    }


def accuracies(runs: list[Path], data: str) -> list[Row]:
    """Balanced accuracy of each run's features, and last of those of an encoder drawn at random."""
    content = mim3d.probe(weights=[str(run) for run in runs], data=data, fold=0, num_bootstrap=0)
    found = [row for row in content["features"] if row["kind"] in ("encoder", "random")]
    names = ("linear", "neighbours")
    return [{name: round(row[name]["balanced_accuracy"], 3) for name in names} for row in found]


def measure(name: str, data: str, size: str, rates: list[float], args: argparse.Namespace) -> list[Row]:
    """A row for every rate on one data set."""
    with tempfile.TemporaryDirectory() as scratch:
        runs = [Path(scratch) / f"{rate:g}" for rate in rates]
        logged = [pretrained(run, data, size, rate, args) for run, rate in zip(runs, rates, strict=True)]
        found: list[Row | None] = [None] * (len(runs) + 1)
        if not args.no_probe:
            try:
                found = [*accuracies(runs, data)]
            except DataError as error:
                # Hours of training are worth keeping where tokens are too wide for the labels.
                print(f"no probe: {error}")
    about = {"size": size, "data": name, "batch": args.batch, "steps": args.steps}
    return [
        {**about, "learning_rate": rate, **row, "probe": probe, "probe_random": found[-1]}
        for rate, row, probe in zip(rates, logged, found[:-1], strict=True)
    ]


def table(rows: list[Row]) -> str:
    """The rows in Markdown, as in docs/concepts/learning-rates.md."""
    lines = [
        "| size | data | batch | steps | rate | loss of each level | linear (random) | k-NN (random) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first, last = row["loss_first"], row["loss_last"]
        fell = ", ".join(f"{level} {first[level]:.2f} to {last[level]:.3f}" for level in first)
        scores = " | ".join(
            f"{row['probe'][kind]:.3f} ({row['probe_random'][kind]:.3f})" if row["probe"] else "-"
            for kind in ("linear", "neighbours")
        )
        about = " | ".join(str(row[key]) for key in KEYS[:-1])
        lines.append(f"| {about} | {row['learning_rate']:.2g} | {fell} | {scores} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and keep the rows."""
    parser = options(__doc__)
    parser.add_argument("data", nargs="*", default=["phantoms"], help="phantoms, or NAME=DATA")
    parser.add_argument("--size", default="nano", help="size of the hybrid backbone")
    parser.add_argument("--batch", type=int, default=1, help="hierarchies per step")
    parser.add_argument(
        "--micro", type=int, default=4, help="of them at most so many at once, the rest by accumulation"
    )
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-5, 1e-4, 3e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--no_rule", action="store_true", help="leave the paper's rate for this batch out")
    parser.add_argument("--no_probe", action="store_true", help="losses alone")
    args = parser.parse_args()
    args.steps = 3 if args.quick else args.steps
    device = torch.device(args.device)
    prepare(device)
    rule = MiM().optimisation
    assert rule.base_learning_rate is not None and rule.reference_batch is not None
    by_rule = [] if args.no_rule else [rule.base_learning_rate * args.batch / rule.reference_batch]
    rates = [*by_rule, *args.rates[: 1 if args.quick else None]]
    name = f"learning_rates_{device.type}"
    rows: list[Row] = []
    for given in args.data:
        label, _, data = given.partition("=")
        with tempfile.TemporaryDirectory() as made:
            if not data:
                make_set(made, PHANTOMS)
            rows += measure(label, data or made, args.size, rates, args)
        print(table(rows), flush=True)
        if not args.quick:
            write_results(name, describe(device), merged(RESULTS / f"{name}.json", rows))


def merged(path: Path, rows: list[Row]) -> list[Row]:
    """The rows with those of earlier parts of the table before them."""
    new = {tuple(row[key] for key in KEYS) for row in rows}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    return [*(row for row in before if tuple(row[key] for key in KEYS) not in new), *rows]


if __name__ == "__main__":
    main()
