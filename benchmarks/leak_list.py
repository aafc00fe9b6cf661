"""Finds copies of scans by fingerprints, by salted digests, and by salted marks, and counts what is taken for a copy.

A copy is saved in another type, cut, windowed to 8 bits, resampled, or all of these. For every form: the share of
copies that is found, and of pairs of different scans that are taken for one. Run it as a script:

    python benchmarks/leak_list.py [--data FOLDER] [--scans 60]
"""

import json
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import map_coordinates
from yardstick.machine import options

from mim3d.caching.fingerprints import distances, fingerprint_of
from mim3d.caching.marks import marks_of
from mim3d.core.types import Spacing
from mim3d.scans.volumes import read_volume

RESULTS = Path(__file__).parent / "results" / "leak_list.json"

#: Folders of scans below the data, and whether they are CT.
SETS = {
    "hippocampus": ("hippocampus/imagesTr", False),
    "sts_ct": ("sts_ct/images", True),
    "lidc": ("lidc_nodules/images", True),
}

Scan = tuple[np.ndarray, Spacing, np.ndarray]


def copies(scan: Scan, is_ct: bool) -> Iterator[tuple[str, Scan]]:
    """Copies of a scan, each with what was done to it."""
    image, spacing_mm, affine = scan
    yield "as float32, scaled", ((image * 1e-3).astype(np.float32), spacing_mm, affine)
    low, high = (-175, 250) if is_ct else np.percentile(image, [1, 99.5])
    windowed = np.rint((np.clip(image, low, high) - low) / (high - low) * 255).astype(np.uint8)
    yield "windowed to 8 bits", (windowed, spacing_mm, affine)
    cut = cut_of(scan)
    yield "cut by a tenth", cut
    for factor in (0.8, 1.3):
        yield f"resampled to {factor} of its voxel size", resampled(scan, factor)
    yield "windowed, cut and resampled to 1.3", resampled(cut_of((windowed, spacing_mm, affine)), 1.3)


def cut_of(scan: Scan) -> Scan:
    """The scan without a tenth of each axis of ten voxels or more."""
    image, spacing_mm, affine = scan
    first = np.array([size // 10 if axis != 1 else 0 for axis, size in enumerate(image.shape)])
    moved = affine.copy()
    moved[:3, 3] += affine[:3, :3] @ first
    return image[first[0] :, : image.shape[1] - image.shape[1] // 10, first[2] :], spacing_mm, moved


def resampled(scan: Scan, factor: float) -> Scan:
    """The scan in voxels of another size, linearly."""
    image, spacing_mm, affine = scan
    sizes = [max(1, round(size / factor)) for size in image.shape]
    places = np.meshgrid(*(np.arange(size) * factor for size in sizes), indexing="ij")
    moved = affine.copy()
    moved[:3, :3] *= factor
    values = map_coordinates(image.astype(np.float32), places, order=1, mode="nearest")
    x, y, z = (edge * factor for edge in spacing_mm)
    return values, (x, y, z), moved


def by_fingerprint(scan: Scan) -> Any:
    """The coarse image that a run keeps."""
    return fingerprint_of(scan[0], scan[1], scan[2])


def by_marks(scan: Scan) -> Any:
    """The marks that an export carries."""
    return marks_of(scan[0], scan[1], scan[2])


FORMS: dict[str, tuple[Callable[[Scan], Any], Callable[[list[tuple[Any, Any]]], np.ndarray]]] = {
    "fingerprints": (by_fingerprint, lambda pairs: distances(pairs) <= 1),
    "marks": (by_marks, lambda pairs: np.array([one.likeness(two) >= 1 for one, two in pairs])),
}


def measured(files: list[Path], is_ct: bool) -> dict[str, Any]:
    """What each form finds among some scans."""
    scans = []
    for file in files:
        volume = read_volume(str(file))
        scans.append((volume.array, volume.grid.spacing_mm, volume.grid.ras_affine))
    made = [dict(copies(scan, is_ct)) for scan in scans]
    found: dict[str, Any] = {"scans": len(scans), "pairs": len(scans) * (len(scans) - 1) // 2}
    for name, (of, same) in FORMS.items():
        start = time.process_time()
        own = [of(scan) for scan in scans]
        seconds = (time.process_time() - start) / len(scans)
        shares = {
            copy: float(np.mean(same([(one, of(others[copy])) for one, others in zip(own, made, strict=True)])))
            for copy in made[0]
        }
        wrong = int(np.sum(same(list(combinations(own, 2)))))
        found[name] = {"found": shares, "wrong_pairs": wrong, "ms_per_scan": round(1000 * seconds, 1)}
    return found


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with the scans")
    parser.add_argument("--scans", type=int, default=60, help="scans of each set, evenly spread over it")
    given = parser.parse_args()
    num_scans = 3 if given.quick else given.scans
    results = {}
    for name, (folder, is_ct) in SETS.items():
        files = sorted((given.data / folder).glob("*.nii*"))
        if not files:
            print(f"{name}: no scans in {given.data / folder}; left out")
            continue
        places = np.linspace(0, len(files) - 1, min(num_scans, len(files))).astype(int)
        results[name] = measured([files[place] for place in places], is_ct)
        print(name, json.dumps(results[name], indent=1))
    if results and not given.quick:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
