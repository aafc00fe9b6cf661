"""Every store of a scan, built one after the other from the same file, and what that took."""

import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Literal

import numpy as np

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.datasets.cases import Case, CaseSet
from yardstick.ct_scans import Scan
from yardstick.data_stores import (
    EXACT,
    OURS,
    PUBLISHED,
    OurCache,
    Store,
    blosc_store,
    build_blosc,
    build_persistent,
    build_plain,
    nifti_store,
    our_stores,
    persistent_stores,
    plain_store,
    zarr_store,
)
from yardstick.machine import Row
from yardstick.page_cache import load, size_bytes

HAVE_BLOSC = find_spec("blosc2") is not None


@dataclass(frozen=True)
class Built:
    """A scan in every store.

    Attributes:
        scan: where it comes from.
        stores: for crops of full resolution.
        pickle: of the published pipeline.
        eight: mim3d's cache in 8 bits.
        sixteen: mim3d's cache without loss.
        wall_s: what building took, by store.
        cpu_s: processor time of that.
    """

    scan: Scan
    stores: list[Store]
    pickle: Path
    eight: OurCache
    sixteen: OurCache
    wall_s: dict[str, float]
    cpu_s: dict[str, float]

    def sizes_bytes(self) -> dict[str, int]:
        """What the scan takes in each store, all files counted."""
        return {store.name: size_bytes(store.place) for store in self.stores}


def build_stores(scan: Scan, scratch: Path) -> Built:
    """Build all stores of a scan, from a file that is in the system's memory."""
    load([scan.path])
    wall_s, cpu_s = {}, {}

    def timed(name: str, build: Callable[[], Path]) -> Path:
        wall, cpu = time.perf_counter(), time.process_time()
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            place = build()
        wall_s[name], cpu_s[name] = time.perf_counter() - wall, time.process_time() - cpu
        return place

    pickles, eight, sixteen = scratch / "monai", scratch / f"{scan.id}_8_bit", scratch / f"{scan.id}_lossless"
    stores = [nifti_store(scan)]
    pickle = timed(PUBLISHED, lambda: build_persistent(scan, pickles))
    stores += persistent_stores(scan, pickle)
    for dtype in ("float32", "int16") if HAVE_BLOSC else ():
        store = blosc_store(scratch / f"{scan.id}_{dtype}.b2nd", dtype)
        timed(store.name, partial(build_blosc, scan, store.place, dtype))
        stores.append(store)
    stores.append(plain_store(build_plain(scan, scratch / f"{scan.id}.npy")))
    ours = OurCache(timed(OURS, lambda: _build_ours(scan, eight, "8-bit")))
    exact = OurCache(timed(EXACT, lambda: _build_ours(scan, sixteen, "lossless")))
    stores += [zarr_store(ours), *our_stores(ours, exact)]
    return Built(scan, stores, pickle, ours, exact, wall_s, cpu_s)


def _build_ours(scan: Scan, out: Path, intensities: Literal["8-bit", "lossless"]) -> Path:
    case = Case(id=scan.id, images=(str(scan.path),), patient=scan.id)
    cases = CaseSet(root=str(scan.path.parent), form="images", cases=(case,), labels={})
    build_cache(cases, out, Preprocessing(intensities=intensities), num_workers=0)
    return out


def compare_voxels(built: Built) -> Row:
    """The whole scan as mim3d gives it back, against the scan's own file."""
    wanted = built.scan.voxels_hu().astype(np.float32)
    inside = (wanted >= -1000) & (wanted <= 1000)
    found = [cache.scan() for cache in (built.sixteen, built.eight)]
    exact, eight = (scan.to_values(scan.read((0, 0, 0), scan.shape))[0] for scan in found)
    return {
        "scan": built.scan.id,
        "voxels": wanted.size,
        "voxels_in_window": int(inside.sum()),
        "lossless_equal_in_window": int((exact == wanted)[inside].sum()),
        "lossless_equal": int((exact == wanted).sum()),
        "rms_error_hu_of_8_bit_in_window": round(float(np.sqrt(np.mean((eight - wanted)[inside] ** 2))), 3),
    }
