"""A finished cache: preprocessed scans that are read crop by crop without touching their files again."""

import csv
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

from mim3d.caching import layout
from mim3d.caching.manifest import read_fingerprints, read_manifest
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.scan import CachedScan
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case


class Cache(Sequence[CachedScan]):
    """The scans of one cache, in the order of the data set.

    Args:
        path: The cache folder.
        scans: Scans of the cache that this object shows.
        labels: Label value -> name with background 0; values found where none were declared; empty without labels.
        preprocessing: How the scans were prepared; its ``intensities`` are never ``auto``.
        failed: Scans that could not be used, by ``id``, ``images``, ``label`` and ``reason``.
    """

    def __init__(
        self,
        *,
        path: str,
        scans: Sequence[CachedScan],
        labels: dict[int, str],
        preprocessing: Preprocessing,
        failed: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.path = path
        self.labels = labels
        self.preprocessing = preprocessing
        self.failed = tuple(failed)
        self._scans = tuple(scans)

    @overload
    def __getitem__(self, index: int) -> CachedScan: ...
    @overload
    def __getitem__(self, index: slice) -> "Cache": ...
    def __getitem__(self, index: int | slice) -> "CachedScan | Cache":
        """One scan, or a cache of a range of them."""
        return self._showing(self._scans[index]) if isinstance(index, slice) else self._scans[index]

    def __len__(self) -> int:
        return len(self._scans)

    def __iter__(self) -> Iterator[CachedScan]:
        return iter(self._scans)

    @property
    def cases(self) -> tuple[Case, ...]:
        """The case behind each scan."""
        return tuple(scan.case for scan in self._scans)

    @property
    def digest(self) -> str:
        """SHA-256 of what the scans hold: the same wherever the cache and its sources lie."""
        rows = []
        for scan in self._scans:
            case = scan.case
            rows.append([case.id, scan.digest, case.class_name, case.patient, case.split, *(case.labelled or ())])
        content = {"labels": {str(value): name for value, name in self.labels.items()}, "scans": sorted(rows)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of the stored scans on disk."""
        return sum(scan.size_bytes for scan in self._scans)

    @property
    def source_bytes(self) -> int:
        """Size of the files they were made from."""
        return sum(scan.source_bytes for scan in self._scans)

    def fingerprints(self) -> dict[str, str]:
        """Case id -> fingerprint as text, of all scans in the folder; read when asked for.

        Raises:
            DataError: The manifest is missing or damaged.
        """
        return read_fingerprints(os.path.join(self.path, layout.MANIFEST))

    def subset(self, cases: Iterable[Case]) -> "Cache":
        """The scans with the ids of ``cases``; ids that are not in the cache (bad scans) are passed over.

        Raises:
            DataError: None of them is in the cache.
        """
        wanted = {case.id for case in cases}
        kept = [scan for scan in self._scans if scan.case.id in wanted]
        if wanted and not kept:
            raise DataError(f"{self.path}: none of the {len(wanted)} cases asked for is in this cache; build it again.")
        return self._showing(kept)

    def _showing(self, scans: Sequence[CachedScan]) -> "Cache":
        return Cache(
            path=self.path, scans=scans, labels=self.labels, preprocessing=self.preprocessing, failed=self.failed
        )


def is_cache(path: str | Path) -> bool:
    """Whether a folder is a mim3d cache, finished or not."""
    settings = os.path.join(path, layout.SETTINGS)
    if not os.path.isfile(settings):
        return False
    try:
        content = layout.read_json(settings)
    except DataError:
        return False
    return isinstance(content, dict) and content.get("format") == layout.FORMAT


def open_cache(path: str | Path) -> Cache:
    """Open a finished cache; no voxel is read.

    Raises:
        DataError: The folder is no cache, or one that is unfinished, damaged, or of another version.
    """
    root = os.path.abspath(path)
    if not is_cache(root):
        raise DataError(f"{path}: not a mim3d cache; make one with `mim3d cache DATA --out {path}`.")
    settings = layout.read_json(os.path.join(root, layout.SETTINGS))
    if settings.get("version") != layout.VERSION:
        raise DataError(
            f"{path}: a cache of version {settings.get('version')}, but this mim3d reads version {layout.VERSION}; "
            "build it again in a new folder."
        )
    if not os.path.exists(os.path.join(root, layout.MANIFEST)):
        raise DataError(f"{path}: this cache is not finished; run the same `mim3d cache` command again to go on.")
    try:
        row = settings["preprocessing"]
        spacing_mm = None if row["spacing_mm"] is None else tuple(row["spacing_mm"])
        preprocessing = Preprocessing(**(row | {"spacing_mm": spacing_mm, "window": tuple(row["window"])}))
    except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
        raise DataError(f"{root}: its {layout.SETTINGS} is damaged ({error!r}); run `mim3d cache` again.") from error
    scans, labels = read_manifest(os.path.join(root, layout.MANIFEST))
    found = sorted({value for scan in scans for value in scan.num_voxels} - {0})
    if found and not labels:
        labels = {0: "background", **{value: f"label_{value}" for value in found}}
    return Cache(path=root, scans=scans, labels=labels, preprocessing=preprocessing, failed=_read_failed(root))


def _read_failed(root: str) -> list[dict[str, str]]:
    path = os.path.join(root, layout.FAILED)
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return [{name: row[name] for name in layout.FAILED_COLUMNS} for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise DataError(f"{path}: missing or damaged ({error!r}); run `mim3d cache` again to rebuild it.") from error
