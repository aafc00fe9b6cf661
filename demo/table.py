"""Print the mean scores of several score files as one short table: demo/table.py SCORES.json ..."""

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

from scipy.stats import t as student_t

from mim3d.reporting.comparison import comparisons
from mim3d.reporting.sources import read_sources

COLUMNS = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD"}


def row(path: Path) -> str:
    """One line of the table: the run's name and its means over all labels."""
    means = json.loads(path.read_text(encoding="utf-8"))["mean"]
    cells = ["-" if means[key] is None else f"{means[key]:.3f}" for key in COLUMNS]
    return f"{path.parent.name:<14}" + "".join(f"{cell:>12}" for cell in cells)


def gain(ours: Path, theirs: Path) -> str:
    """The difference of two runs' Dice, with a 95 % t interval over the patients, each with the mean of its labels."""
    patients = []
    for path in (ours, theirs):
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        patients.append(
            {case["id"]: mean(label["dice"] for label in case["labels"].values() if "dice" in label) for case in cases}
        )
    gains = [dice - patients[1][case] for case, dice in patients[0].items()]
    half = float(student_t.ppf(0.975, len(gains) - 1)) * stdev(gains) / math.sqrt(len(gains))
    return (
        f"Dice of {ours.parent.name} less {theirs.parent.name}: {mean(gains):+.3f}, 95 % interval "
        f"{mean(gains) - half:+.3f} to {mean(gains) + half:+.3f} over {len(gains)} patients, one seed."
    )


if __name__ == "__main__":
    print(f"{'held-out mean':<14}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
    paths = [Path(argument) for argument in sys.argv[1:]]
    print("\n".join(row(path) for path in paths))
    if len(paths) == 2:
        print(gain(*paths))
    runs = [str(path.parent) for path in paths if (path.parent / "manifest.json").is_file()]
    print("\n".join(comparisons(read_sources(runs, [])[0]).values()))
