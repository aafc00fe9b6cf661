"""Samples per second that a training loop gets: mim3d's loader and the published one, in turns."""

import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from mim3d.backbones import create_recipe
from mim3d.caching.scan import CachedScan
from mim3d.core.types import Triple
from mim3d.loading.loader import Loader
from mim3d.loading.samples import Sample, Sampler
from mim3d.methods.mim.hierarchy import Level, full_levels
from mim3d.methods.mim.method import MiM
from mim3d.planning.plan import plan_intensity
from yardstick.page_cache import drop
from yardstick.published_loader import PublishedSamples

#: Samples of the published loader; more than are ever taken.
MANY = 10_000

#: Gives an endless iterator of batches, for a number of workers, from the disk (or from memory).
Batches = Callable[[int, bool], Iterator[Mapping[str, Any]]]


@dataclass(frozen=True)
class Hierarchy:
    """What one sample is cut from.

    Attributes:
        title: for people.
        levels: of MiM.
    """

    title: str
    levels: tuple[Level, ...]

    @property
    def root(self) -> Triple:
        """Voxels of the scan under one sample."""
        return self.levels[0].footprint


def hierarchies() -> list[Hierarchy]:
    """The paper's two roots, and the larger one with a level of 192^3 between.

    A root of 384x384x192 has 4x4x2 cells of 96^3; shown as 96^3 their edges would cut tokens of 16^3, so it is shown
    as 192x192x96, or has its cells at 192^3.
    """
    coarse, middle, fine = full_levels((16, 16, 16))
    wide = Level(name="coarse", footprint=(384, 384, 192), size=(192, 192, 96), mask_ratio=0.5, num_children=4)
    top = Level(name="top", footprint=(384, 384, 192), size=(96, 96, 48), mask_ratio=0.5, num_children=1)
    return [
        Hierarchy("192^3 as 96^3, 4 of 96^3", (coarse, middle, fine)),
        Hierarchy("384x384x192 as 192x192x96, 4 of 96^3", (wide, middle, fine)),
        Hierarchy("384x384x192 as 96x96x48, 192^3 as 96^3, 4 of 96^3", (top, coarse, middle, fine)),
    ]


@dataclass(frozen=True)
class DroppingSampler:
    """A sampler that makes the system forget a scan before its crops are read.

    Attributes:
        sampler: draws the samples.
        files: of each case.
        dropped_s: shared; the seconds that took are added to it.
    """

    sampler: Sampler
    files: Mapping[str, Sequence[Path]]
    dropped_s: Tensor

    def draw(self, scan: CachedScan, rng: np.random.Generator) -> Sample:
        """Draw one sample."""
        self.dropped_s.add_(drop(self.files[scan.case.id]))
        return self.sampler.draw(scan, rng)


def our_batches(
    scans: Sequence[CachedScan],
    files: Mapping[str, Sequence[Path]],
    hierarchy: Hierarchy,
    dropped_s: Tensor,
    backbone: str = "hybrid_base",
) -> Batches:
    """Batches of one sample of mim3d's loader."""
    sampler = MiM(levels=hierarchy.levels).sampler(create_recipe(backbone))

    def start(num_workers: int, cold: bool) -> Iterator[Mapping[str, Any]]:
        drawing = DroppingSampler(sampler, files, dropped_s) if cold else sampler
        loader = Loader(scans, drawing, plan_intensity(scans), batch_size=1, seed=0, num_workers=num_workers)
        return loader.batches(0)

    return start


def published_batches(
    images: Sequence[Path], pickles: Sequence[Path], hierarchy: Hierarchy, dropped_s: Tensor
) -> Batches:
    """Batches of one sample of the published pipeline."""

    def start(num_workers: int, cold: bool) -> Iterator[Mapping[str, Any]]:
        forgotten = pickles if cold else ()
        samples = PublishedSamples(images, pickles[0].parent, hierarchy.root, forgotten, dropped_s)
        # Many epochs in one: another would start its worker anew.
        order = RandomSampler(samples, replacement=True, num_samples=MANY)
        return iter(DataLoader(samples, batch_size=1, sampler=order, num_workers=num_workers))

    return start


def converted(start: Batches, device: torch.device) -> Batches:
    """Batches whose images are float32 on a device: what the training loop does with them first."""

    def start_converted(num_workers: int, cold: bool) -> Iterator[Mapping[str, Any]]:
        batches = start(num_workers, cold)
        try:
            for batch in batches:
                moved = {name: values.to(device) for name, values in batch.items()}
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                yield moved
        finally:
            close(batches)

    return start_converted


def seconds_per_sample(
    starts: Mapping[str, Batches],
    dropped_s: Tensor,
    *,
    num_workers: int,
    cold: bool,
    num_rounds: int,
    num_samples: int,
) -> dict[str, list[float]]:
    """Wall seconds per sample of each loader in each round.

    Each round starts every loader anew, takes a first sample untimed, then times the following ones. What forgetting
    the files took is not counted: exact on one core, where nothing else can run meanwhile. Cold means the voxels: a
    round remembers the metadata and index of a scan that it has met.
    """
    os.sync()
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    for _ in range(num_rounds):
        for name, start in starts.items():
            seconds[name].append(_round_s(start(num_workers, cold), dropped_s, num_samples))
    return seconds


def _round_s(batches: Iterator[Mapping[str, Any]], dropped_s: Tensor, num_samples: int) -> float:
    """Seconds per sample of a loader that was just started; its workers end with the last reference, which is here."""
    next(batches)
    before_s, start_s = dropped_s.item(), time.perf_counter()
    for _ in range(num_samples):
        next(batches)
    seconds = time.perf_counter() - start_s - (dropped_s.item() - before_s)
    close(batches)
    return seconds / num_samples


def close(batches: Iterator[Mapping[str, Any]]) -> None:
    """End the reading processes of a loader."""
    if isinstance(batches, Generator):
        batches.close()
