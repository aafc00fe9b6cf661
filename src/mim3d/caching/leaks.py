"""Scans that are in two places: in what was learned from and in what is held out, or twice in one set."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.fingerprints import Fingerprint, coarse_features, correlation, distances, may_overlap

__all__ = ["Labelled", "Leak", "find_duplicates", "find_leaks"]

#: Scans of the other set that are compared in full with each one.
NEAREST = 5
#: Scans correlate at least this well in their coarse features where they may be the same one; measured: 0.70.
LEAST_CORRELATION = 0.6
#: Held-out scans that are compared with all others at a time.
BLOCK = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Labelled:
    """A scan by what it holds.

    Attributes:
        id: Of the case; empty where it is not to be known.
        digest: SHA-256 of its content: the same digest means the same scan.
        fingerprint: What it looks like.
    """

    id: str
    digest: str
    fingerprint: Fingerprint


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One scan found in two places.

    Attributes:
        training: Id of the scan that was learned from; of the earlier one among duplicates of a set.
        held_out: Id of the scan that is held out; of the later one among duplicates of a set.
        how: Whether the contents are the same, or look the same.
        distance: Of the fingerprints, from 0; at most 1 counts as the same scan.
    """

    training: str
    held_out: str
    how: Literal["identical", "the same scan, converted"]
    distance: float


def find_leaks(training: Sequence[Labelled], held_out: Sequence[Labelled]) -> list[Leak]:
    """Held-out scans that are among the training scans, in the order of the held-out ones.

    A held-out scan is named once for each training scan of the same content, and for each of the nearest few that look
    the same.
    """
    return [
        Leak(training=training[row].id, held_out=held_out[column].id, how=how, distance=distance)
        for row, column, how, distance in _matches(training, held_out, own=False)
    ]


def find_duplicates(entries: Sequence[Labelled]) -> list[Leak]:
    """Scans that are in a set more than once; each is paired with the earlier ones that it repeats."""
    return [
        Leak(training=entries[row].id, held_out=entries[column].id, how=how, distance=distance)
        for row, column, how, distance in _matches(entries, entries, own=True)
    ]


def _matches(
    first: Sequence[Labelled], second: Sequence[Labelled], *, own: bool
) -> list[tuple[int, int, Literal["identical", "the same scan, converted"], float]]:
    """Places in both sequences of the same scan, how and how near; within one set (``own``) each pair once."""
    if not first or not second:
        return []
    places = defaultdict(list)
    for row, entry in enumerate(first):
        places[entry.digest].append(row)
    identical = {
        (row, column)
        for column, entry in enumerate(second)
        for row in places.get(entry.digest, ())
        if not own or row < column
    }
    near = [pair for pair in _candidates(first, second, own=own) if pair not in identical]
    apart = distances([(first[row].fingerprint, second[column].fingerprint) for row, column in near])
    found: list[tuple[int, int, Literal["identical", "the same scan, converted"], float]] = []
    found += [(row, column, "identical", 0.0) for row, column in identical]
    found += [
        (row, column, "the same scan, converted", float(distance))
        for (row, column), distance in zip(near, apart, strict=True)
        if distance <= 1
    ]
    return sorted(found, key=lambda match: (match[1], match[3], match[0]))


def _candidates(first: Sequence[Labelled], second: Sequence[Labelled], *, own: bool) -> Iterator[tuple[int, int]]:
    """For each scan of the second sequence those of the first that resemble it most, as places in both."""
    features, extent, in_hu = _described(first)
    for start in range(0, len(second), BLOCK):
        others, other_extent, other_in_hu = _described(second[start : start + BLOCK])
        mixed = other_in_hu[:, None] != in_hu
        alike = correlation(others, features, mixed)
        alike[~may_overlap(other_extent[:, None], extent)] = -1
        if own:
            alike[np.arange(len(first)) >= start + np.arange(len(others))[:, None]] = -1
        kept = min(NEAREST, len(first))
        best = np.argpartition(-alike, kept - 1, axis=1)[:, :kept]
        for column, rows in enumerate(best):
            yield from ((int(row), start + column) for row in rows if alike[column, row] >= LEAST_CORRELATION)


def _described(
    entries: Sequence[Labelled],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Coarse features, extents in mm, and which are in HU."""
    prints = [entry.fingerprint for entry in entries]
    extent = np.stack([print_.extent_mm for print_ in prints])
    return coarse_features(prints), extent, np.array([len(print_.cells) == 2 for print_ in prints])
