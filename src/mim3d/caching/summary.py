"""What a cache was understood to hold: a few lines for people, and the same facts in its ``summary.json``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mim3d.caching.cache import Cache
from mim3d.core.names import number_of
from mim3d.core.types import Spacing, Triple

#: Labels and classes that a line names; the file has them all.
MAX_NAMES = 8


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """One label over all scans.

    Attributes:
        value: Label value.
        name: Its name.
        num_cases: Number of scans that hold it.
        num_voxels: Number of its voxels in all of them.
    """

    value: int
    name: str
    num_cases: int
    num_voxels: int


@dataclass(frozen=True, kw_only=True)
class CacheSummary:
    """What a cache was understood to hold.

    Attributes:
        num_cases: Number of scans.
        num_patients: Number of patients that they are of.
        num_left_out: Number of scans that could not be used.
        channels: Modality -> number of scans, for each channel; ``unknown`` where nobody says it.
        spacing_mm: Smallest and largest voxel size along X, Y, Z, in millimetres.
        shape: Smallest and largest number of voxels along X, Y, Z.
        labels: Labels by value, without the background.
        classes: Class -> number of scans.
        splits: Declared part, ``train``, ``val`` or ``test`` -> number of scans.
        assumed: Case id -> what its file leaves open, each with what is assumed.
    """

    num_cases: int
    num_patients: int
    num_left_out: int
    channels: tuple[dict[str, int], ...]
    spacing_mm: tuple[Spacing, Spacing]
    shape: tuple[Triple, Triple]
    labels: tuple[LabelSummary, ...]
    classes: dict[str, int]
    splits: dict[str, int]
    assumed: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, cache: Cache) -> "CacheSummary":
        """From the cards of all scans; a cache holds one at least."""
        kinds = [Counter[str]() for _ in range(max(scan.num_channels for scan in cache))]
        for scan in cache:
            for kind, channel in zip(kinds, scan.modalities, strict=False):
                kind[channel.name or "unknown"] += 1
        held = [scan.num_voxels for scan in cache if scan.has_label]
        return cls(
            num_cases=len(cache),
            num_patients=len({scan.case.patient for scan in cache}),
            num_left_out=len(cache.failed),
            channels=tuple(_sorted(kind) for kind in kinds),
            spacing_mm=_ends([scan.spacing_mm for scan in cache]),
            shape=_ends([scan.shape for scan in cache]),
            labels=tuple(
                LabelSummary(
                    value=value,
                    name=name,
                    num_cases=sum(voxels.get(value, 0) > 0 for voxels in held),
                    num_voxels=sum(voxels.get(value, 0) for voxels in held),
                )
                for value, name in sorted(cache.labels.items())
                if value != 0 and held
            ),
            classes=_sorted(Counter(scan.case.class_name for scan in cache if scan.case.class_name)),
            splits=_sorted(Counter(scan.case.split for scan in cache if scan.case.split)),
            assumed={scan.case.id: scan.assumed for scan in cache if scan.assumed},
        )

    def lines(self) -> list[str]:
        """All of it for people."""
        spacings = [" x ".join(f"{mm:.4g}" for mm in end) for end in self.spacing_mm]
        shapes = [" x ".join(map(str, end)) for end in self.shape]
        found = [
            f"understood: {self.short()}",
            f"  voxels of {_to(spacings)} mm, {_to(shapes)} voxels",
        ]
        if self.labels:
            names = [f"{label.value} {label.name} in {label.num_cases}" for label in self.labels]
            found.append(f"  labels: {_some(names)} of {number_of(self.num_cases, 'scan')}")
        if self.classes:
            found.append(f"  classes: {_some([f'{name} {count}' for name, count in self.classes.items()])}")
        if self.splits:
            found.append(f"  declared: {_some([f'{name} {count}' for name, count in self.splits.items()])}")
        if self.assumed:
            scans = number_of(len(self.assumed), "scan")
            found.append(f"  assumed of what files leave open: {scans} ({_some(list(self.assumed))})")
        return found

    def short(self) -> str:
        """The number of cases and what they are, in one line."""
        kinds = [
            " and ".join(kind if len(each) == 1 else f"{count} {kind}" for kind, count in each.items())
            for each in self.channels
        ]
        channels = kinds[0] if len(kinds) == 1 else f"{len(kinds)} channels ({', '.join(kinds)})"
        parts = [
            f"{number_of(self.num_cases, 'scan')} of {number_of(self.num_patients, 'patient')}",
            f"modality {channels}",
        ]
        parts += [number_of(len(self.labels), "label")] if self.labels else []
        parts += [number_of(len(self.classes), "class")] if self.classes else []
        return ", ".join([*parts, f"{self.num_left_out} left out"])


def cohort_of(cache: Cache) -> dict[str, Any]:
    """Counts of what the scans of a cache are, for the manifest of a run: nothing in it names a patient or a scan.

    ``spacing_mm`` holds the smallest, median and largest voxel size of the files, before any resampling.
    """
    held, spacings = CacheSummary.of(cache), [scan.source_spacing_mm or scan.spacing_mm for scan in cache]
    low, high = _ends(spacings)
    return {
        "num_scans": held.num_cases,
        "num_patients": held.num_patients,
        "modalities": list(held.channels),
        "spacing_mm": [low, tuple(median(axis) for axis in zip(*spacings, strict=True)), high],
        "labels": {label.name: label.num_cases for label in held.labels},
        "classes": held.classes,
        "scanners": _sorted(Counter(scan.scanner for scan in cache if scan.scanner)),
    }


def _sorted(counts: Counter[Any]) -> dict[str, int]:
    return {str(name): counts[name] for name in sorted(counts)}


def _ends(rows: Sequence[Any]) -> Any:
    """The smallest and the largest of each axis."""
    axes = list(zip(*rows, strict=True))
    return tuple(min(axis) for axis in axes), tuple(max(axis) for axis in axes)


def _to(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMES
    return ", ".join([*names[:MAX_NAMES], *([f"and {more} more"] if more > 0 else [])])
