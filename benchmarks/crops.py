"""How fast random crops come out of the cache, against reading the whole scan for each.

Run: ``python benchmarks/crops.py`` (or ``make bench``). Makes its own scans and writes benchmarks/results/crops.json.
"""

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import mim3d
from mim3d.data.cache import open_cache
from mim3d.data.volumes import read_volume

SCAN = (256, 256, 128)
SIZES = ((64, 64, 64), (96, 96, 96))
NUM_CROPS = 40
RESULTS = Path(__file__).parent / "results" / "crops.json"


def per_second(draw: Callable[[tuple[int, int, int]], object], size: tuple[int, int, int], num_crops: int) -> float:
    """Crops per second at random places of one scan, the same places for everything measured."""
    rng = np.random.default_rng(0)
    places = [tuple(int(rng.integers(0, n - s)) for n, s in zip(SCAN, size, strict=True)) for _ in range(num_crops)]
    start_s = time.perf_counter()
    for place in places:
        draw(place)
    return num_crops / (time.perf_counter() - start_s)


def measure(folder: Path) -> list[dict[str, object]]:
    """One row per crop size."""
    mim3d.phantom(out=str(folder / "scans"), num_cases=1, size=SCAN, seed=0)
    mim3d.cache(data=str(folder / "scans"), out=str(folder / "cache"), num_workers=0)
    scan = open_cache(folder / "cache")[0]
    raw = scan.case.images[0]
    rows = []
    for size in SIZES:
        cached = per_second(lambda place, size=size: scan.read(place, size), size, NUM_CROPS)
        whole = per_second(lambda place: read_volume(raw).array, size, 3)
        rows.append({"size": size, "cache_crops_per_s": round(cached, 1), "raw_crops_per_s": round(whole, 2)})
    return rows


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder))
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version()}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"scan": SCAN, "machine": machine, "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(row)
    print(f"Results: {RESULTS}")
