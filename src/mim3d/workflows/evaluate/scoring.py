"""Scoring label maps case by case, in this process or in several."""

import multiprocessing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from mim3d.core.errors import DataError, listed
from mim3d.core.resources import available_memory_bytes, num_cores
from mim3d.core.worker_processes import prepare_worker, without_main_module
from mim3d.datasets.score_pairs import Pair
from mim3d.metrics import LabelScore, LesionSettings, score_regions, values_in
from mim3d.scans.volumes import Volume, read_grid, read_volume

#: Sets of fewer voxels are scored before processes have started.
SMALL_VOXELS = 2**25

#: Memory of a case for each of its voxels at most: both maps, and masks and surfaces of a label as large as the scan.
BYTES_PER_VOXEL = 24


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What is scored, and how.

    Attributes:
        regions: name -> the label values it is made of; empty to score each value that a map holds.
        allowed: values that maps may hold; None for any.
        nsd_tolerance_mm: distance up to which two surfaces agree.
        lesions: when lesions match; None to leave them out.
        lesions_of: names whose lesions are scored; None for all.
    """

    regions: Mapping[str, tuple[int, ...]]
    allowed: frozenset[int] | None
    nsd_tolerance_mm: float
    lesions: LesionSettings | None
    lesions_of: frozenset[str] | None

    def score(self, pair: Pair) -> dict[str, LabelScore]:
        """Scores of one case by name.

        Raises:
            DataError: a map that cannot be read, or holds a value that is not allowed.
        """
        reference = read_volume(pair.reference, label=True, narrow=True)
        volumes = [reference] if pair.prediction is None else [read_volume(pair.prediction, label=True, narrow=True)]
        volumes.append(reference)
        held = set[int]()
        for volume in volumes:
            values = _values(volume)
            if self.allowed is not None and not values <= self.allowed:
                raise DataError(
                    f"{volume.grid.path}: holds label values that are not declared "
                    f"({listed(sorted(values - self.allowed))}; declared are {listed(sorted(self.allowed))}); correct "
                    "the map, or name the labels to score with --labels."
                )
            held |= values
        prediction = np.zeros_like(reference.array) if pair.prediction is None else volumes[0].array
        return score_regions(
            prediction,
            reference.array,
            reference.spacing_mm,
            self.regions or {label_name(value): (value,) for value in sorted(held)},
            nsd_tolerance_mm=self.nsd_tolerance_mm,
            lesions=self.lesions,
            lesions_of=self.lesions_of,
        )


def label_name(value: int) -> str:
    """What a label is called that nobody has named."""
    return f"label_{value}"


def _values(volume: Volume) -> set[int]:
    lowest = int(volume.array.min())
    if lowest < 0:
        raise DataError(f"{volume.grid.path}: holds the label value {lowest}, but labels count from 0.")
    return set(values_in(volume.array))


def processes_for(pairs: Sequence[Pair], num_workers: int | None) -> int:
    """How many processes to score in: those asked for, else one per core as far as work and memory reach."""
    if num_workers is not None:
        return max(1, min(num_workers, len(pairs)))
    sizes = [int(np.prod(read_grid(pair.reference).ras_shape)) for pair in pairs]
    if sum(sizes) < SMALL_VOXELS:
        return 1
    fitting = (available_memory_bytes() or 2**63) // (max(sizes) * BYTES_PER_VOXEL)
    return max(1, min(num_cores(), len(pairs), fitting))


def scored(pairs: Sequence[Pair], scoring: Scoring, num_workers: int) -> Iterator[dict[str, LabelScore]]:
    """Score cases, in their own order whatever the number of processes.

    Args:
        pairs: the cases.
        scoring: what is scored, and how.
        num_workers: processes; 1 works in this one.

    Raises:
        DataError: a case that cannot be scored, or a process that was killed with none beside it.
    """
    if num_workers <= 1 or len(pairs) <= 1:
        yield from map(scoring.score, pairs)
        return
    done = 0
    while done < len(pairs):
        try:
            for score in _in_processes(pairs[done:], scoring, num_workers):
                done += 1
                yield score
        except BrokenProcessPool as error:
            if num_workers == 1:
                raise DataError(
                    f"{pairs[done].reference}: the process that scored it was killed, most likely out of memory; crop "
                    "the maps, or run again where there is more memory."
                ) from error
            num_workers = num_workers // 2
            warnings.warn(
                f"A process was killed while scoring, most likely out of memory; going on with {num_workers}.",
                stacklevel=2,
            )


def _in_processes(pairs: Sequence[Pair], scoring: Scoring, num_workers: int) -> Iterator[dict[str, LabelScore]]:
    # Spawned, not forked: the caller may run threads (torch, progress bars), which a fork would freeze.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=prepare_worker)
    try:
        futures = _submitted(pool, pairs, scoring)
        for future in futures:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor, pairs: Sequence[Pair], scoring: Scoring
) -> list[Future[dict[str, LabelScore]]]:
    try:
        with without_main_module():
            return [pool.submit(scoring.score, pair) for pair in pairs]
    except OSError as error:
        raise DataError(
            f"No process can be started for scoring ({error.strerror or error}); run again with --num_workers 1."
        ) from error
