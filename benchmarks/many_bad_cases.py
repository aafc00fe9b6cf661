"""One bad case in fifty among thousands: are all good ones cached, and is every bad one listed with its reason?

Run: ``python benchmarks/many_bad_cases.py``. 10,000 small scans, 16 to 24 voxels a side, a fiftieth of them bad in one
of ten ways. Prints the time, the memory at its peak, and what was listed; fails where a case is lost or not listed.
Writes benchmarks/results/many_bad_cases.json.
"""

import argparse
import csv
import gzip
import importlib
import json
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.cache import open_cache
from mim3d.cli import main

# nibabel leaves half of it without types.
nibabel: Any = importlib.import_module("nibabel")

#: One case in this many is bad.
ONE_IN = 50


def write(path: Path, array: npt.NDArray[Any], affine: npt.NDArray[Any] | None = None) -> None:
    """Write a NIfTI; fast, as there are thousands."""
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1))


def damage(image: Path, label: Path, kind: int) -> str:
    """Make a case bad in one of ten ways; the name of the way."""
    content = image.read_bytes()
    array = np.asarray(nibabel.load(image).dataobj)
    if kind == 0:
        image.write_bytes(content[: len(content) // 2])
        return "gzip cut short"
    if kind == 1:
        image.write_bytes(b"")
        return "empty file"
    if kind == 2:
        image.write_text("not a scan\n")
        return "text file"
    if kind == 3:
        write(image, np.full(array.shape, np.nan, np.float32))
        return "not a number everywhere"
    if kind == 4:
        write(image, np.stack([array] * 3, axis=-1)[:, :, :, None, :].astype(np.uint8))
        return "five dimensions"
    if kind == 5:
        write(label, np.asarray(nibabel.load(label).dataobj), np.diag([1.0, 1.0, 3.0, 1.0]))
        return "label on another grid"
    if kind == 6:
        write(label, np.full(array.shape, 77, np.uint8))
        return "label value that is not declared"
    if kind == 7:
        image.unlink()
        image.symlink_to("nowhere.nii.gz")
        return "link that leads nowhere"
    if kind == 8:
        raw = bytearray(gzip.decompress(content))
        raw[40:56] = np.array([3, 30000, 30000, 30000, 1, 1, 1, 1], np.int16).tobytes()
        image.write_bytes(gzip.compress(bytes(raw), compresslevel=1))
        return "header that claims too much"
    half = bytearray(content)
    half[len(half) // 2] ^= 0xFF
    image.write_bytes(bytes(half))
    return "flipped bit in the gzip"


def make_set(folder: Path, num_cases: int) -> dict[str, str]:
    """Write the set as a Decathlon folder; the bad cases with the way in which they are."""
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    bad, entries = {}, []
    for number in range(num_cases):
        name, shape = f"case_{number:05d}", tuple(rng.integers(16, 25, size=3))
        image, label = (folder / part / f"{name}.nii.gz" for part in ("imagesTr", "labelsTr"))
        array = rng.normal(0, 200, shape).astype(np.int16)
        write(image, array)
        write(label, (array > 150).astype(np.uint8))
        entries.append({"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"})
        if number % ONE_IN == ONE_IN // 2:
            bad[name] = damage(image, label, number // ONE_IN % 10)
    description = {"labels": {"0": "background", "1": "bright"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(description))
    return bad


def run(num_cases: int, num_workers: int, folder: Path) -> dict[str, Any]:
    """Make and cache the set; the facts, once it is known that no case is lost."""
    start = time.monotonic()
    bad = make_set(folder / "set", num_cases)
    made_s = time.monotonic() - start
    start = time.monotonic()
    arguments = [str(folder / "set"), "--out", str(folder / "cache"), "--num_workers", str(num_workers)]
    exit_code = main(["cache", *arguments])
    cached_s = time.monotonic() - start
    with open(folder / "cache" / "failed.csv", encoding="utf-8", newline="") as file:
        reasons = {row["id"]: row["reason"] for row in csv.DictReader(file)}
    cache = open_cache(folder / "cache")
    good = {scan.case.id for scan in cache}
    lost = {f"case_{number:05d}" for number in range(num_cases)} - good - reasons.keys()
    examples: dict[str, str] = {}
    for name, way in bad.items():
        if name in reasons:
            examples.setdefault(way, reasons[name].replace(str(folder), "."))
    facts = {
        "num_cases": num_cases,
        "num_bad": len(bad),
        "num_cached": len(good),
        "num_listed": len(reasons),
        "lost": sorted(lost),
        "bad_but_cached": sorted(bad.keys() & good),
        "good_but_listed": sorted(reasons.keys() - bad.keys()),
        "by_way": dict(Counter(bad.values())),
        "examples": examples,
        "exit_code": exit_code,
        "num_workers": num_workers,
        "seconds_to_make": round(made_s, 1),
        "seconds_to_cache": round(cached_s, 1),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_mib_of_a_worker": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
    }
    print(json.dumps(facts, indent=1))
    return facts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_cases", type=int, default=10_000)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="100 cases, and no file of results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        facts = run(100 if arguments.quick else arguments.num_cases, arguments.num_workers, Path(scratch))
    if not arguments.quick:
        place = Path(__file__).parent / "results" / "many_bad_cases.json"
        place.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(facts["lost"] or facts["bad_but_cached"] or facts["good_but_listed"]))
