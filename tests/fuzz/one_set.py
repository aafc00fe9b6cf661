"""Thousands of small scans in one set, some of them bad in different ways: ``mim3d cache`` does all the others."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np

import mim3d
from mim3d.caching.cache import Cache, open_cache
from tests.fuzz.damage import Damaged, damaged, write
from tests.fuzz.specimens import Specimen
from tests.fuzz.trials import Reader

#: Formats of which a scan may be one file or a folder in a tree.
FORMATS = ("NIfTI .nii", "NIfTI .nii.gz", "MetaImage", "NRRD", "DICOM")

SHAPE = (9, 8, 7)


@dataclass(frozen=True)
class TriedSet:
    """What came of a set.

    Attributes:
        num_good: Good scans in it.
        num_bad: Bad ones.
        num_ways: Ways in which they are bad.
        return_code: What the command returned.
        time_s: Seconds that it took.
        peak_bytes: Most memory that it held at a time, without its workers.
        faults: What is wrong with that; empty where nothing is.
    """

    num_good: int
    num_bad: int
    num_ways: int
    return_code: int
    time_s: float
    peak_bytes: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        """One paragraph of Markdown."""
        held = (
            "All good ones were cached, voxel for voxel; `failed.csv` lists every bad one with a reason that names it"
        )
        found = f"At fault: {'; '.join(self.faults[:5])}" if self.faults else held
        return (
            f"One set of {self.num_good + self.num_bad} scans, of which {self.num_bad} were damaged in {self.num_ways} "
            f"ways (`mim3d cache`, {self.time_s:.0f} s on {os.cpu_count()} cores, {self.peak_bytes / 2**20:.0f} MiB of "
            f"memory, return code {self.return_code}). {found}."
        )


def good_scan(number: int) -> np.ndarray:
    """Voxels of a good scan, (X, Y, Z) int16, unlike those of any other."""
    return np.random.default_rng(number).normal(0, 300, SHAPE).astype(np.int16).clip(-1000, 1000)


def try_set(specimens: Sequence[Specimen], num_scans: int, num_bad: int, *, seed: int, scratch: Path) -> TriedSet:
    """Make a set, cache it, and compare.

    Args:
        specimens: Good sources, which are damaged.
        num_scans: All scans.
        num_bad: Bad scans among them.
        seed: Seed of the damage.
        scratch: Folder for the set and its cache.
    """
    data, out = scratch / "data", scratch / "cache"
    ways = _write_bad(specimens, num_bad, seed, data)
    for number in range(num_scans - num_bad):
        path = data / f"site_{number % 7}" / f"good_{number:05d}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(good_scan(number), np.eye(4)), path)
    started = time.monotonic()
    with open(scratch / "said.txt", "w+", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "mim3d", "cache", str(data), "--out", str(out), "--intensities", "lossless"],
            env={**os.environ, "PYTHONPATH": str(Path(mim3d.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=said,
        )
        # Its own memory, not that of every process before it.
        _, status, usage = os.wait4(process.pid, 0)
        return_code = process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        text = said.read().strip()
    time_s = time.monotonic() - started
    faults = [] if return_code == 2 else [f"return code {return_code}: {text[-300:]}"]
    if "Traceback" in text:
        faults.append(f"a traceback: {text[-300:]}")
    if (out / "manifest.parquet").exists():
        faults += _faults(open_cache(out), num_scans - num_bad, sorted(ways))
    return TriedSet(
        num_good=num_scans - num_bad,
        num_bad=num_bad,
        num_ways=len(set(ways.values())),
        return_code=return_code,
        time_s=time_s,
        peak_bytes=usage.ru_maxrss * 2**10,
        faults=tuple(faults),
    )


def _write_bad(specimens: Sequence[Specimen], num_bad: int, seed: int, data: Path) -> dict[str, str]:
    """Bad scans, each known to be refused when it is read alone: name of its folder -> damage."""
    usable = [each for each in specimens if each.format.startswith(FORMATS) and each.kind != "channels"]
    reader, ways, number = Reader(60.0), dict[str, str](), 0
    while len(ways) < num_bad:
        specimen, rng = usable[number % len(usable)], np.random.default_rng((seed, number))
        # Series of one UID would be one series, wherever they lie.
        uid = f"1.{10_000 + number}".encode()
        files = {name: content.replace(b"1.2.3.4", uid) for name, content in specimen.files.items()}
        source = damaged(replace(specimen, files=files), rng)
        name = f"bad_{number:05d}"
        number += 1
        # The damage without its place, so that each way is another one.
        way = f"{specimen.format}, {source.what}"
        if None in source.files.values() or way in ways.values():
            continue
        if specimen.target and specimen.target not in source.files:
            continue
        write(Damaged(source.files, source.what), data / name)
        if reader.read(specimen.kind, data / name / specimen.target).result == "refused":
            ways[name] = way
        else:
            shutil.rmtree(data / name)
    reader.close()
    return ways


def _faults(cache: Cache, num_good: int, bad: Sequence[str]) -> list[str]:
    """Good scans that are not in the cache as they are, and bad ones that are not listed."""
    faults = []
    found = {scan.case.id: scan for scan in cache}
    for number in range(num_good):
        scan = found.pop(f"good_{number:05d}", None)
        if scan is None or not np.array_equal(scan.read((0, 0, 0), SHAPE)[0], good_scan(number)):
            faults.append(f"good_{number:05d} is {'missing' if scan is None else 'changed'}")
    faults += [f"{name} is in the cache" for name in found]
    listed = {row["images"]: row["reason"] for row in cache.failed}
    for name in bad:
        reasons = [reason for images, reason in listed.items() if f"/{name}" in images]
        if len(reasons) != 1 or name not in reasons[0] or "please report it" in reasons[0]:
            faults.append(f"{name}: {reasons}")
    if len(listed) != len(bad):
        faults.append(f"{len(listed)} scans listed for {len(bad)} bad ones")
    return faults
