"""Print the mean scores of several score files as one short table: demo/table.py SCORES.json ..."""

import json
import sys
from pathlib import Path

from mim3d.reporting.comparison import comparisons
from mim3d.reporting.sources import read_sources

COLUMNS = {"dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD"}


def row(path: Path) -> str:
    """One line of the table: the run's name and its means over all labels."""
    mean = json.loads(path.read_text(encoding="utf-8"))["mean"]
    cells = ["-" if mean[key] is None else f"{mean[key]:.3f}" for key in COLUMNS]
    return f"{path.parent.name:<14}" + "".join(f"{cell:>12}" for cell in cells)


if __name__ == "__main__":
    print(f"{'held-out mean':<14}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
    paths = [Path(argument) for argument in sys.argv[1:]]
    print("\n".join(row(path) for path in paths))
    runs = [str(path.parent) for path in paths if (path.parent / "manifest.json").is_file()]
    print("\n".join(comparisons(read_sources(runs, [])[0]).values()))
