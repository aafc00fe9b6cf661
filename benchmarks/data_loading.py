"""What data cost: crops, samples and caches of mim3d against the published pipeline's and other stores, in one run.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/data_loading.py`` (or ``make bench``), ten minutes on phantom
CTs of 512x512x200; ``--scans`` adds a table of real scans. Every store gives the same random crops, and the stores take
turns at every crop.

* warm: processor time of a crop, the file in the system's memory;
* cold: wall time of a crop after ``sync`` and ``posix_fadvise(DONTNEED)`` on the store's files (what a host keeps of a
  virtual disk is beyond its reach), by a reader that has not seen the scan before.

Crops and samples are read with the allocator tuned as mim3d tunes it for training, for every store alike; caches are
built without that. Crops of mim3d are judged as float32 network input, as the published pipeline gives them; crops as
stored stand beside them. Samples are judged when they are in the trainer's hands: float32 from the published loader, as
stored from mim3d's, whose conversion is left to the device; what that takes on this device stands beside it.

``--parts hand_over`` compares the ways from the reading processes to the trainer: mim3d's shared ring and torch's
DataLoader (persistent workers, pinned beside a GPU), which read the same samples with the same code. It needs two
cores; rates per CPU second, of the trainer and its reading processes, hold where other programs run as well. Writes
benchmarks/results/data_loading_*.json, or hand_over_*.json.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from yardstick.builds import HAVE_BLOSC, Built, build_stores, compare_voxels
from yardstick.crop_times import Times, draw_origins, fits, largest_error_hu, time_crops
from yardstick.ct_scans import Scan, noise_hu, phantom_scans, real_scans
from yardstick.data_marks import LARGE, SIZES, judge_builds, judge_crops, judge_loaders, name_of
from yardstick.data_stores import pyramid_stores
from yardstick.hand_over import judge_hand_over, materials, measure_hand_over
from yardstick.loader_rates import (
    Batches,
    Hierarchy,
    converted,
    hierarchies,
    our_batches,
    published_batches,
    seconds_per_sample,
)
from yardstick.machine import Row, describe, options, prepare, write_results
from yardstick.marks import print_ratios
from yardstick.page_cache import drop, files_below, load

from mim3d.core.types import Triple

#: For scans that hold none of the other crops.
SMALL = (48, 48, 48)
PACKAGES = ("blosc2", "google-crc32c", "monai", "nibabel", "numcodecs", "numpy", "torch", "zarr")


def build(scans: Sequence[Scan], scratch: Path, kind: str) -> list[Built]:
    """Build every store of every scan."""
    built = []
    print(f"\n{kind} scans")
    for scan in scans:
        voxels = scan.voxels_hu()
        print(f"  {scan.id}: {name_of(voxels.shape)} voxels, noise {noise_hu(voxels):.0f} HU", flush=True)
        built.append(build_stores(scan, scratch))
    return built


def describe_builds(built: Sequence[Built], kind: str) -> list[Row]:
    """Print and return what the stores take, what building them took, and how exact mim3d's voxels are."""
    rows: list[Row] = []
    print(f"\n{kind} scans: bytes and build time per volume (mean of {len(built)})")
    sizes = [one.sizes_bytes() for one in built]
    for name in sizes[0]:
        row: Row = {"part": "build", "data": kind, "store": name, "bytes": round(mean(size[name] for size in sizes))}
        took = ""
        if name in built[0].wall_s:
            row["build_wall_s"] = round(mean(one.wall_s[name] for one in built), 3)
            row["build_cpu_s"] = round(mean(one.cpu_s[name] for one in built), 3)
            took = f"{row['build_wall_s']:7.2f} s wall {row['build_cpu_s']:7.2f} s CPU"
        print(f"  {name:42} {row['bytes'] / 1e6:9.2f} MB  {took}", flush=True)
        rows.append(row)
    for one in built:
        row = {"part": "voxels", "data": kind, **compare_voxels(one)}
        equal, inside = row["lossless_equal_in_window"], row["voxels_in_window"]
        print(f"  {row['scan']}: lossless, {equal} of {inside} voxels inside the window are equal", end=" ")
        print(f"({row['lossless_equal']} of all {row['voxels']});", end=" ")
        print(f"8-bit, RMS error {row['rms_error_hu_of_8_bit_in_window']} HU", flush=True)
        rows.append(row)
    return rows


def measure_crops(built: Sequence[Built], num_crops: int, kind: str, size: Triple) -> list[Row]:
    """Print and return times of crops of one size in every store, over the scans that hold them."""
    times: dict[str, Times] = {}
    delivers: dict[str, str] = {}
    errors: dict[str, float] = {}
    for seed, one in enumerate(built):
        voxels = one.scan.voxels_hu()
        if not fits(voxels.shape, size):
            continue
        stores = [*one.stores, *(pyramid_stores(one.eight) if size == LARGE else ())]
        delivers |= {store.name: store.delivers for store in stores}
        origins = draw_origins(voxels.shape, size, num_crops, seed)
        for name, error in largest_error_hu(stores, voxels, origins[0], size).items():
            errors[name] = max(error, errors.get(name, 0.0))
        for name, measured in time_crops(stores, origins, size).items():
            times.setdefault(name, Times()).extend(measured)
    rows: list[Row] = []
    if times:
        print(
            f"\n{kind} scans, crops of {name_of(size)}: medians (warm: CPU time; cold: wall time, page cache dropped)"
        )
    for name in times:
        row: Row = {"part": "crops", "data": kind, "size": size, "store": name, "delivers": delivers[name]}
        row |= {**times[name].row(), "largest_error_hu": errors.get(name)}
        within = "" if name not in errors else f"within {errors[name]:.3g} HU"
        print(f"  {name:42} {row['warm_cpu_ms']:9.2f} ms warm {row['cold_wall_ms']:9.2f} ms cold", end="   ")
        print(f"{delivers[name]:13} {within}", flush=True)
        rows.append(row)
    return rows


def measure_loaders(
    built: Sequence[Built], hierarchy: Hierarchy, device: torch.device, num_rounds: int, num_samples: int
) -> list[Row]:
    """Print and return what a sample takes in both loaders: from memory and from the disk, with 0 and 1 workers."""
    scans = [one.eight.scan() for one in built]
    files = {one.scan.id: files_below(one.eight.path) for one in built}
    images, pickles = [one.scan.path for one in built], [one.pickle for one in built]
    zero: Any = torch.zeros(1, dtype=torch.float64)
    dropped_s: Tensor = zero.share_memory_()
    ours = our_batches(scans, files, hierarchy, dropped_s)
    starts: Mapping[str, Batches] = {
        "published": published_batches(images, pickles, hierarchy, dropped_s),
        "mim3d": ours,
        "mim3d_float32": converted(ours, device),
    }
    print(f"\nsamples of {hierarchy.title}: wall time each, hand-over included (published: root as 96^3, 4 of 96^3)")
    rows = []
    for cold in (False, True):
        for num_workers in (0, 1):
            load([*pickles, *(path for paths in files.values() for path in paths)])
            measured = seconds_per_sample(
                starts,
                dropped_s,
                num_workers=num_workers,
                cold=cold,
                num_rounds=num_rounds,
                num_samples=num_samples,
            )
            row: Row = {"part": "loader", "hierarchy": hierarchy.title, "root": hierarchy.root}
            row |= {"num_workers": num_workers, "cold": cold, "rounds": num_rounds, "samples_a_round": num_samples}
            row |= {f"{name}_ms": round(1e3 * median(rounds), 3) for name, rounds in measured.items()}
            rows.append(row)
            print(f"  {'cold' if cold else 'warm'}, {num_workers} workers: published", end=" ")
            print(f"{row['published_ms']:8.1f} ms, mim3d {row['mim3d_ms']:8.1f} ms", end=" ")
            print(f"({1e3 / row['mim3d_ms']:.1f} samples per second),", end=" ")
            print(f"{row['mim3d_float32_ms']:8.1f} ms until it is float32 on the {device.type}", flush=True)
    return rows


def disk_mb_per_s(path: Path) -> float:
    """Speed of reading a file from the disk in one piece."""
    os.sync()
    drop([path])
    start_s = time.perf_counter()
    load([path])
    return path.stat().st_size / 1e6 / (time.perf_counter() - start_s)


def describe_machine(device: torch.device, path: Path) -> Row:
    """What a reader of the results must know: hardware, disk, versions, and what is meant by cold."""
    versions = {name: version(name) for name in PACKAGES if name != "blosc2" or HAVE_BLOSC}
    return {
        **describe(device),
        "cores": len(os.sched_getaffinity(0)),
        "disk_mb_per_s": round(disk_mb_per_s(path), 1),
        "versions": versions,
        "cold": "sync, then posix_fadvise(DONTNEED) on the store's files before each crop or sample",
    }


def run(arguments: argparse.Namespace, scratch: Path) -> None:
    """Measure, print and write."""
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    quick = arguments.quick
    phantoms = phantom_scans(scratch / "phantoms", 2 if quick else 3, (208, 208, 200) if quick else (512, 512, 200))
    if arguments.parts == "hand_over":
        machine, rows = run_hand_over(arguments, device, phantoms, scratch)
    else:
        machine, rows = run_stores(arguments, device, phantoms, scratch)
    part = "data_loading" if arguments.parts == "stores" else arguments.parts
    name = arguments.out or ("" if quick else f"{part}_{device.type}")
    if name:
        write_results(name, machine, rows)


def run_hand_over(
    arguments: argparse.Namespace, device: torch.device, phantoms: Sequence[Scan], scratch: Path
) -> tuple[Row, list[Row]]:
    """Rates of the shared ring and of torch's DataLoader."""
    read = materials(phantoms[0].path.parent, scratch / "hand_over", arguments.quick)
    prepare(device)
    machine = describe_machine(device, phantoms[0].path)
    print(machine, flush=True)
    rows = []
    for material in read:
        for batch_size in (4,) if arguments.quick else (1, 4):
            for num_workers in (2,) if arguments.quick else (1, 2):
                rows += measure_hand_over(
                    material,
                    device,
                    batch_size=batch_size,
                    num_workers=num_workers,
                    prefetch=arguments.prefetch,
                    num_rounds=2 if arguments.quick else arguments.rounds,
                )
    ratios = judge_hand_over(rows)
    print_ratios("hand-over from reading processes", ratios)
    return machine, [*rows, *({"part": "ratio", **ratio.row()} for ratio in ratios)]


def run_stores(
    arguments: argparse.Namespace, device: torch.device, phantoms: Sequence[Scan], scratch: Path
) -> tuple[Row, list[Row]]:
    """Crops, samples and caches against those of others."""
    quick = arguments.quick
    if not HAVE_BLOSC:
        print("blosc2 is not installed: its two stores are left out")
    # Caches are built before the allocator is tuned: `mim3d cache` does not tune it, and it halves mim3d's time alone.
    built = build(phantoms, scratch, "phantom")
    real = build(real_scans(arguments.scans, scratch / "scans"), scratch, "real") if arguments.scans else []
    prepare(device)
    machine = describe_machine(device, built[0].pickle)
    print(machine, flush=True)
    rows = describe_builds(built, "phantom")
    for size in SIZES:
        if size[0] in arguments.edges:
            rows += measure_crops(built, 3 if quick else 5, "phantom", size)
    for hierarchy in hierarchies():
        if hierarchy.root[0] in arguments.edges and fits(built[0].eight.scan().shape, hierarchy.root):
            rows += measure_loaders(built, hierarchy, device, 2 if quick else 3, 3 if quick else 6)
    ratios = [*judge_crops(rows), *judge_builds(rows), *judge_loaders(rows)]
    if real:
        rows += describe_builds(real, "real")
        for size in (SMALL, *SIZES):
            rows += measure_crops(real, 3 if quick else 5, "real", size)
    print_ratios("phantom scans, marks", [ratio for ratio in ratios if ratio.reached is not None])
    print_ratios("phantom scans, without a mark", [ratio for ratio in ratios if ratio.reached is None])
    return machine, [*rows, *({"part": "ratio", **ratio.row()} for ratio in ratios)]


def main() -> None:
    """Parse arguments; measure in a folder that goes away."""
    parser = options(__doc__)
    parser.add_argument("--scans", nargs="+", default=[], help="folders or files of real CT scans, for another table")
    parser.add_argument("--parts", choices=["stores", "hand_over"], default="stores", help="what is compared")
    parser.add_argument("--rounds", type=int, default=3, help="of hand_over, in each of which every loader has a turn")
    parser.add_argument("--prefetch", type=int, default=2, help="of hand_over: batches a DataLoader's worker is ahead")
    parser.add_argument("--out", help="name of the results' file, without .json")
    parser.add_argument("--scratch", help="folder for the stores, 4 GB; a temporary one if not given")
    parser.add_argument("--edges", nargs="+", type=int, default=[96, 192, 384], help="crops and roots, by first edge")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        run(arguments, Path(scratch))


if __name__ == "__main__":
    main()
