"""Scans as a plan looks at them, whether they lie in files or in a cache: headers first, voxels of some."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import DataError
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.planning.measures import ScanMeasures, measure_scan
from mim3d.scans.grids import orientations
from mim3d.scans.volumes import read_grid

if TYPE_CHECKING:
    from mim3d.caching.scan import CachedScan

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ScanGrid:
    """A scan by its header.

    Attributes:
        id: Of its case.
        shape: Voxels along X, Y, Z (RAS+).
        spacing_mm: Voxel size along X, Y, Z.
        num_channels: Images of the case.
        orientation: Of the stored axes, such as ``LPS``.
    """

    id: str
    shape: Triple
    spacing_mm: Spacing
    num_channels: int
    orientation: str


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """A scan to be looked at, wherever it lies.

    Attributes:
        id: Of its case.
        state: What changes when its content does.
        grid: Reads its header.
        measure: Reads its voxels.
    """

    id: str
    state: tuple[str, ...]
    grid: Callable[[], ScanGrid]
    measure: Callable[[], ScanMeasures]


def file_sources(cases: Sequence[Case], labels: Mapping[int, str], ignore_label: int | None = None) -> list[ScanSource]:
    """Cases by their files.

    Args:
        cases: The cases.
        labels: Declared values, others are refused when voxels are read; empty allows all.
        ignore_label: Value of voxels that belong to no structure.
    """
    return [
        ScanSource(
            id=case.id,
            state=tuple(_file_state(path) for path in (*case.images, *([case.label] if case.label else []))),
            grid=partial(_file_grid, case),
            measure=partial(_measure_files, case, labels, ignore_label),
        )
        for case in cases
    ]


def cached_sources(scans: Sequence["CachedScan"], ignore_label: int | None = None) -> list[ScanSource]:
    """Scans of a cache; ``ignore_label`` as in :func:`file_sources`."""
    return [
        ScanSource(
            id=scan.case.id,
            state=(scan.digest,),
            grid=partial(_cached_grid, scan),
            measure=partial(_measure_cached, scan, ignore_label),
        )
        for scan in scans
    ]


def looked_at(
    sources: Sequence[ScanSource], look: Callable[[ScanSource], Result], num_threads: int
) -> Iterator[tuple[ScanSource, Result | None]]:
    """What each scan shows, in their order; None, with a warning, for one that cannot be used.

    Threads are enough: unpacking and NumPy let go of the interpreter.
    """

    def attempt(source: ScanSource) -> Result | DataError:
        try:
            return look(source)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for source, result in zip(sources, pool.map(attempt, sources), strict=True):
            if isinstance(result, DataError):
                warnings.warn(f"passed over in planning: {result}", stacklevel=2)
                yield source, None
            else:
                yield source, result


def _file_state(path: str) -> str:
    """Path, size and time of change of a file (of the folder of a DICOM series)."""
    name = path.split("::")[0]
    try:
        state = os.stat(name)
    except OSError:
        return path
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _file_grid(case: Case) -> ScanGrid:
    grid = read_grid(case.images[0])
    codes = orientations.ornt2axcodes(grid.orientation)
    return ScanGrid(
        id=case.id,
        shape=grid.ras_shape,
        spacing_mm=grid.spacing_mm,
        num_channels=len(case.images),
        orientation="".join(str(code) for code in codes),
    )


def _measure_files(case: Case, labels: Mapping[int, str], ignore_label: int | None) -> ScanMeasures:
    prepared = prepare(case, Preprocessing(), labels=labels)
    return measure_scan(prepared.image, prepared.label, prepared.spacing_mm, prepared.statistics, ignore_label)


def _cached_grid(scan: "CachedScan") -> ScanGrid:
    return ScanGrid(
        id=scan.case.id,
        shape=scan.shape,
        spacing_mm=scan.spacing_mm,
        num_channels=scan.num_channels,
        orientation="RAS",
    )


def _measure_cached(scan: "CachedScan", ignore_label: int | None) -> ScanMeasures:
    start = (0, 0, 0)
    image = scan.to_values(scan.read(start, scan.shape))
    label = scan.read_label(start, scan.shape) if scan.has_label else None
    return measure_scan(image, label, scan.spacing_mm, scan.statistics, ignore_label)
