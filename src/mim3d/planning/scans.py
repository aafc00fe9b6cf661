"""Scans as a plan looks at them, whether they lie in files or in a cache: the headers of all, the voxels of some."""

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import Statistics, class_counts_of
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import DataError
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.scans.components import find_components
from mim3d.scans.grids import orientations
from mim3d.scans.volumes import read_grid

if TYPE_CHECKING:
    from mim3d.caching.scan import CachedScan

#: Labelled voxels of each scan whose intensities are looked at: every scan counts alike, whatever its structures' size.
MAX_CLASS_VOXELS = 10_000

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class ScanGrid:
    """A scan by its header.

    Attributes:
        id: Id of its case.
        shape: Voxels along X, Y, Z (RAS+).
        spacing_mm: Voxel size along X, Y, Z.
        num_channels: Number of images of the case.
        orientation: Orientation of the stored axes, such as ``LPS``.
    """

    id: str
    shape: Triple
    spacing_mm: Spacing
    num_channels: int
    orientation: str


@dataclass(frozen=True, kw_only=True)
class ClassMeasures:
    """One structure in one scan.

    Attributes:
        volume_ml: Volume of all of its voxels.
        num_components: Number of its parts that do not touch, not even at a corner.
        extent_mm: Size of the box around all of it, along X, Y, Z.
    """

    volume_ml: float
    num_components: int
    extent_mm: Spacing


@dataclass(frozen=True, kw_only=True, eq=False)
class ScanMeasures:
    """What was measured in one scan.

    Attributes:
        statistics: Statistics of each channel.
        class_voxels: (C, N) float32 intensities of about 10,000 voxels at most, evenly spaced over all that have a
            label above 0; N is 0 without such voxels.
        classes: Label value above 0 -> its measures.
        foreground_ratio: Share of the scan's voxels with a label above 0.
    """

    statistics: tuple[Statistics, ...]
    class_voxels: npt.NDArray[np.float32]
    classes: dict[int, ClassMeasures]
    foreground_ratio: float


@dataclass(frozen=True, kw_only=True)
class ScanSource:
    """A scan to be looked at, wherever it lies.

    Attributes:
        id: Id of its case.
        state: Texts that change when its content does.
        grid: Reads its header.
        measure: Reads and measures its voxels.
    """

    id: str
    state: tuple[str, ...]
    grid: Callable[[], ScanGrid]
    measure: Callable[[], ScanMeasures]


def file_sources(cases: Sequence[Case], labels: Mapping[int, str], ignore_label: int | None = None) -> list[ScanSource]:
    """Cases that lie in files.

    Args:
        cases: The cases.
        labels: Declared label values. Others are refused when voxels are read; empty allows all.
        ignore_label: Value of voxels that belong to no structure.
    """

    def grid_of(case: Case) -> ScanGrid:
        grid = read_grid(case.images[0])
        return ScanGrid(
            id=case.id,
            shape=grid.ras_shape,
            spacing_mm=grid.spacing_mm,
            num_channels=len(case.images),
            orientation="".join(str(code) for code in orientations.ornt2axcodes(grid.orientation)),
        )

    def measure(case: Case) -> ScanMeasures:
        prepared = prepare(case, Preprocessing(), labels=labels)
        return measure_scan(prepared.image, prepared.label, prepared.spacing_mm, prepared.statistics, ignore_label)

    def state_of(path: str) -> str:
        """Path, size and time of change of a file (of the folder of a DICOM series)."""
        try:
            state = os.stat(path.split("::")[0])
        except OSError:
            return path
        return f"{path} {state.st_size} {state.st_mtime_ns}"

    return [
        ScanSource(
            id=case.id,
            state=tuple(state_of(path) for path in (*case.images, *([case.label] if case.label else []))),
            grid=partial(grid_of, case),
            measure=partial(measure, case),
        )
        for case in cases
    ]


def cached_sources(scans: Sequence["CachedScan"], ignore_label: int | None = None) -> list[ScanSource]:
    """Scans of a cache; ``ignore_label`` as in :func:`file_sources`."""

    def grid_of(scan: "CachedScan") -> ScanGrid:
        return ScanGrid(
            id=scan.case.id,
            shape=scan.shape,
            spacing_mm=scan.spacing_mm,
            num_channels=scan.num_channels,
            orientation="RAS",
        )

    def measure(scan: "CachedScan") -> ScanMeasures:
        image = scan.to_values(scan.read((0, 0, 0), scan.shape))
        label = scan.read_label((0, 0, 0), scan.shape) if scan.has_label else None
        return measure_scan(image, label, scan.spacing_mm, scan.statistics, ignore_label)

    return [
        ScanSource(id=scan.case.id, state=(scan.digest,), grid=partial(grid_of, scan), measure=partial(measure, scan))
        for scan in scans
    ]


def inspect_scans(
    sources: Sequence[ScanSource], inspect: Callable[[ScanSource], Result], num_threads: int
) -> Iterator[tuple[ScanSource, Result | None]]:
    """What ``inspect`` finds in each scan, in their order; None, with a warning, for one that cannot be used.

    Threads are enough: unpacking and NumPy release the interpreter's lock.
    """

    def attempt(source: ScanSource) -> Result | DataError:
        try:
            return inspect(source)
        except DataError as error:
            return error

    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for source, result in zip(sources, pool.map(attempt, sources), strict=True):
            if isinstance(result, DataError):
                warnings.warn(f"passed over in planning: {result}", stacklevel=2)
                yield source, None
            else:
                yield source, result


def measure_scan(
    image_CXYZ: npt.NDArray[Any],
    label_XYZ: npt.NDArray[Any] | None,
    spacing_mm: Spacing,
    statistics: Sequence[Statistics],
    ignore_label: int | None = None,
) -> ScanMeasures:
    """Measure a scan on its RAS+ grid.

    Args:
        image_CXYZ: (C, X, Y, Z) in source units.
        label_XYZ: (X, Y, Z) label values; None for a scan without.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Statistics of each channel.
        ignore_label: Value of voxels that belong to no structure.
    """
    if label_XYZ is None:
        nothing = np.empty((len(image_CXYZ), 0), dtype=np.float32)
        return ScanMeasures(statistics=tuple(statistics), class_voxels=nothing, classes={}, foreground_ratio=0.0)
    if ignore_label is not None:
        label_XYZ = np.where(label_XYZ == ignore_label, 0, label_XYZ)
    places = np.flatnonzero(label_XYZ)
    kept = places[:: max(1, len(places) // MAX_CLASS_VOXELS)]
    return ScanMeasures(
        statistics=tuple(statistics),
        class_voxels=np.stack([channel.ravel()[kept] for channel in image_CXYZ]).astype(np.float32),
        classes=_measure_classes(label_XYZ, spacing_mm),
        foreground_ratio=len(places) / label_XYZ.size,
    )


def _measure_classes(label_XYZ: npt.NDArray[Any], spacing_mm: Spacing) -> dict[int, ClassMeasures]:
    from scipy.ndimage import find_objects

    num_voxels = class_counts_of(label_XYZ).sum(axis=0)
    measures = {}
    for value, box in enumerate(find_objects(label_XYZ), start=1):
        if box is None:
            continue
        _, num_components = find_components(label_XYZ[box] == value)
        x, y, z = ((axis.stop - axis.start) * mm for axis, mm in zip(box, spacing_mm, strict=True))
        measures[value] = ClassMeasures(
            volume_ml=int(num_voxels[value]) * math.prod(spacing_mm) / 1000,
            num_components=num_components,
            extent_mm=(x, y, z),
        )
    return measures
