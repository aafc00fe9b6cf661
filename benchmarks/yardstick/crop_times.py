"""Times of crops: the stores take turns at every crop, so that whatever else the machine does hits all of them."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from mim3d.core.types import Triple
from yardstick.data_stores import Store
from yardstick.page_cache import drop, load, share_in_memory

#: First voxels are multiples of this, so that the pyramid holds every crop.
STEP = 4


@dataclass
class Times:
    """What crops of one size took in one store.

    Attributes:
        warm_ms: processor time of each crop, all of the file in the system's memory.
        cold_ms: wall time of each crop, none of it.
        left_in_memory: share of the file that was in memory all the same before each cold crop.
    """

    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    left_in_memory: list[float] = field(default_factory=list)

    def extend(self, other: "Times") -> None:
        """Take in the crops of another scan."""
        self.warm_ms += other.warm_ms
        self.cold_ms += other.cold_ms
        self.left_in_memory += other.left_in_memory

    def row(self) -> dict[str, float | int]:
        """Medians, and how many crops of each kind they are of."""
        return {
            "warm_cpu_ms": round(median(self.warm_ms), 3),
            "cold_wall_ms": round(median(self.cold_ms), 3),
            "warm_crops": len(self.warm_ms),
            "cold_crops": len(self.cold_ms),
            "left_in_memory": round(max(self.left_in_memory), 4),
        }


def draw_origins(shape: Triple, size: Triple, num_crops: int, seed: int) -> list[Triple]:
    """First voxels of random crops inside a scan."""
    rng = np.random.default_rng(seed)
    origins = []
    for _ in range(num_crops):
        x, y, z = (
            STEP * int(rng.integers((voxels - length) // STEP + 1)) for voxels, length in zip(shape, size, strict=True)
        )
        origins.append((x, y, z))
    return origins


def fits(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a scan holds a crop."""
    return all(length <= voxels for length, voxels in zip(size, shape, strict=True))


def time_crops(stores: Sequence[Store], origins: Sequence[Triple], size: Triple) -> dict[str, Times]:
    """Times of the same crops of one scan in each of its stores, first from memory, then from the disk."""
    times: dict[str, Times] = defaultdict(Times)
    for store in stores:
        load(store.files)
        # The first crop of a store pays for imports and tables.
        store.read(origins[-1], size)
    for store, origin in _turns(stores, origins):
        start_s = time.process_time()
        store.read(origin, size)
        times[store.name].warm_ms.append(1e3 * (time.process_time() - start_s))
    os.sync()
    for store, origin in _turns(stores, origins):
        read = store.opened_anew() if store.opened_anew else store.read
        drop(store.files)
        times[store.name].left_in_memory.append(share_in_memory(store.files))
        start_s = time.perf_counter()
        read(origin, size)
        times[store.name].cold_ms.append(1e3 * (time.perf_counter() - start_s))
    return times


def _turns(stores: Sequence[Store], origins: Sequence[Triple]) -> Iterator[tuple[Store, Triple]]:
    """Every store at the first crop, then every store at the next; another store first each time."""
    for number, origin in enumerate(origins):
        for index in range(len(stores)):
            store = stores[(index + number) % len(stores)]
            if not (store.slow and number):
                yield store, origin


def largest_error_hu(stores: Sequence[Store], voxels_hu: np.ndarray, origin: Triple, size: Triple) -> dict[str, float]:
    """Largest deviation of one crop from the scan inside the window, of each store that gives full resolution."""
    box = tuple(slice(first, first + length) for first, length in zip(origin, size, strict=True))
    wanted = np.clip(voxels_hu[box].astype(np.float32), -1000, 1000)
    errors = {}
    for store in stores:
        if store.hu_of is not None:
            found = np.clip(store.hu_of(store.read(origin, size)).astype(np.float32), -1000, 1000)
            errors[store.name] = round(float(np.abs(found - wanted).max()), 3)
    return errors
