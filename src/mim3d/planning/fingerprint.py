"""What a data set looks like, as far as a plan needs it: the headers of all scans, the voxels of some.

In the spirit of nnU-Net's "data fingerprint" (Isensee et al., Nature Methods 2021), in code of our own. Voxels and
labels are looked at in a few scans drawn by a seed: percentiles and typical volumes change little with more of them.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import Statistics, class_counts_of
from mim3d.caching.preprocessing import Preprocessing, prepare
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import load_json, write_json
from mim3d.core.names import number_of
from mim3d.core.progress import counted
from mim3d.core.settings import build_settings, to_mapping
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.scans.components import find_components
from mim3d.scans.files import available_memory_bytes
from mim3d.scans.grids import file_of, orientations
from mim3d.scans.modality import ChannelModality, decide, is_ct_set
from mim3d.scans.volumes import read_grid

if TYPE_CHECKING:
    from mim3d.caching.scan import CachedScan

#: Changes when fingerprints of old no longer say what new ones say.
VERSION = 1

#: Scans whose voxels are looked at where nothing else is asked for.
DEFAULT_VOXEL_SCANS = 24

#: Time that a voxel of one channel takes on one core: unpacking, statistics, components (measured: 3.6e-8 to 5e-8 s).
VOXEL_TIME_S = 5e-8

#: Labelled voxels of each scan whose intensities are looked at: every scan counts alike, whatever its structures' size.
MAX_CLASS_VOXELS = 10_000

#: Bytes held for each voxel of one channel while a scan is measured.
_BYTES_PER_VOXEL = 16

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
        modalities: What each channel is.
        class_voxels: (C, N) float32 intensities of about 10,000 voxels at most, evenly spaced over all that have a
            label above 0; N is 0 without such voxels.
        classes: Label value above 0 -> its measures.
        foreground_ratio: Share of the scan's voxels with a label above 0.
    """

    statistics: tuple[Statistics, ...]
    modalities: tuple[ChannelModality, ...]
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


@dataclass(frozen=True, kw_only=True)
class ChannelValues:
    """Intensities of one channel, in source units, over the scans whose voxels were looked at.

    Attributes:
        num_ct: Number of scans that are CT in HU, see :mod:`mim3d.scans.modality`.
        minimum: Median over the scans of their darkest voxels.
        maximum: Median over the scans of their brightest voxels.
        body_mean: Median over the scans of the foreground's mean.
        body_std: Median over the scans of the foreground's standard deviation.
        class_percentile_00_5: The 0.5 percentile of voxels inside labelled structures, over all scans; None without
            any.
        class_median: Median of the same voxels.
        class_percentile_99_5: The 99.5 percentile of the same voxels.
        decided_by: Who says what the scans are, such as ``voxels``.
    """

    num_ct: int
    minimum: float
    maximum: float
    body_mean: float
    body_std: float
    class_percentile_00_5: float | None = None
    class_median: float | None = None
    class_percentile_99_5: float | None = None
    decided_by: str = "voxels"


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """One structure over the scans whose voxels were looked at.

    Attributes:
        value: Label value.
        name: Declared name, or the value as text.
        num_scans: Number of scans in which it is present; what follows is over those.
        volume_ml: Smallest, median and largest volume.
        num_components: Median number of its parts that do not touch.
        extent_mm: Largest extent along X, Y, Z.
    """

    value: int
    name: str
    num_scans: int
    volume_ml: tuple[float, float, float]
    num_components: float
    extent_mm: Spacing


@dataclass(frozen=True, kw_only=True)
class DatasetFingerprint:
    """What a plan follows from.

    Attributes:
        key: Digest of the files (path, size, time of change) and of what was asked about them.
        scans: Headers of all scans that could be read.
        voxel_scans: Ids of the scans whose voxels were looked at.
        channels: Intensities of each channel; empty where no voxels were looked at.
        classes: Structures by rising label value.
        foreground_ratio: Median share of a scan's voxels that carry a label above 0.
    """

    key: str
    scans: tuple[ScanGrid, ...]
    voxel_scans: tuple[str, ...]
    channels: tuple[ChannelValues, ...]
    classes: tuple[ClassFacts, ...]
    foreground_ratio: float

    @property
    def is_ct(self) -> bool:
        """Whether every channel is CT in most scans."""
        return bool(self.channels) and all(2 * channel.num_ct > len(self.voxel_scans) for channel in self.channels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON that :meth:`load` reads; the file appears whole or not at all."""
        write_json(path, {"version": VERSION, **to_mapping(self)}, indent=1)

    @classmethod
    def load(cls, path: str | os.PathLike[str], key: str) -> "DatasetFingerprint | None":
        """A fingerprint saved earlier; None when there is none, or it is of other files or of another version."""
        try:
            content = load_json(path)
            if content.pop("version") != VERSION or content["key"] != key:
                return None
            return build_settings(cls, content, str(path))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, ConfigError):
            # A fingerprint only saves time: a damaged one is made again.
            return None


def fingerprint_key(sources: Sequence[ScanSource], learned: Sequence[str], num_voxel_scans: int, seed: int) -> str:
    """Digest of everything that a fingerprint depends on, from names, sizes and times of change alone."""
    state = [[source.id, *source.state] for source in sources]
    text = json.dumps([VERSION, state, sorted(learned), num_voxel_scans, seed])
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of(
    sources: Sequence[ScanSource],
    labels: Mapping[int, str],
    *,
    learned: Sequence[str] | None = None,
    num_voxel_scans: int = DEFAULT_VOXEL_SCANS,
    seed: int = 0,
    num_workers: int = 1,
) -> DatasetFingerprint:
    """Look at the headers of all scans and at the voxels of some; progress is shown on stderr.

    Scans that cannot be used are passed over with a warning, as the cache will leave them out too.

    Args:
        sources: The scans.
        labels: Declared label value -> name; empty where nothing is declared.
        learned: Ids of the scans whose voxels may be looked at, those trained on; None for all.
        num_voxel_scans: Number of scans whose voxels are looked at, drawn by ``seed``; 0 for headers alone.
        seed: Seed of that draw.
        num_workers: Number of threads; fewer are used where scans are large for the memory available.

    Raises:
        DataError: No scan can be used, or cases have different numbers of channels.
    """
    ids = [source.id for source in sources] if learned is None else learned
    headers = inspect_scans(sources, lambda source: source.grid(), num_workers)
    grids = {source.id: grid for source, grid in counted(headers, len(sources), "headers") if grid is not None}
    if not grids:
        raise DataError("No scan of the data set can be read; the warnings above say why.")
    first, *others = grids.values()
    for grid in others:
        if grid.num_channels != first.num_channels:
            raise DataError(
                f"case {grid.id} has {number_of(grid.num_channels, 'image')}, but case {first.id} has "
                f"{first.num_channels}; list the same images for every case."
            )
    candidates = [source for source in sources if source.id in grids and source.id in set(ids)]
    places = np.random.default_rng(seed).permutation(len(candidates))[:num_voxel_scans]
    chosen = [candidates[place] for place in sorted(places)]
    chosen_grids = [grids[source.id] for source in chosen]
    largest = max((math.prod(grid.shape) * grid.num_channels for grid in chosen_grids), default=1)
    num_threads = max(1, min(num_workers, available_memory_bytes() // (_BYTES_PER_VOXEL * largest)))
    seconds = voxel_time_s(chosen_grids)
    duration = f"about {max(1, round(seconds))} s" if seconds < 90 else f"about {round(seconds / 60)} min"
    voxels = inspect_scans(chosen, lambda source: source.measure(), num_threads)
    shown = counted(voxels, len(chosen), f"voxels ({duration} of one core)")
    measured = {source.id: measures for source, measures in shown if measures is not None}
    if num_voxel_scans and not measured:
        raise DataError("No scan that training may learn from can be read; the warnings above say why.")
    return DatasetFingerprint(
        key=fingerprint_key(sources, ids, num_voxel_scans, seed),
        scans=tuple(grids.values()),
        voxel_scans=tuple(measured),
        channels=_channel_values(list(measured.values())),
        classes=_class_facts(list(measured.values()), labels),
        foreground_ratio=float(np.median([measures.foreground_ratio for measures in measured.values()] or [0.0])),
    )


def voxel_time_s(grids: Sequence[ScanGrid]) -> float:
    """About how long looking at the voxels of scans takes on one core, seconds."""
    return VOXEL_TIME_S * sum(math.prod(grid.shape) * grid.num_channels for grid in grids)


def _channel_values(measured: Sequence[ScanMeasures]) -> tuple[ChannelValues, ...]:
    values = []
    for channel in range(len(measured[0].statistics) if measured else 0):
        statistics = [scan.statistics[channel] for scan in measured]
        modalities = [scan.modalities[channel] for scan in measured]
        is_ct = is_ct_set(modalities)
        modalities = [decide(own.sign, set_in_hu=is_ct) if own.by == "nobody" else own for own in modalities]
        # Scans of a CT set that are not in HU say nothing of its window.
        counted_in = [scan for scan, own in zip(measured, modalities, strict=True) if own.in_hu or not is_ct]
        voxels = np.concatenate([scan.class_voxels[channel] for scan in counted_in])
        low, middle, high = (
            (float(value) for value in np.percentile(voxels, (0.5, 50, 99.5))) if len(voxels) else (None, None, None)
        )
        values.append(
            ChannelValues(
                num_ct=sum(own.in_hu for own in modalities),
                minimum=float(np.median([stats.minimum for stats in statistics])),
                maximum=float(np.median([stats.maximum for stats in statistics])),
                body_mean=float(np.median([stats.mean for stats in statistics])),
                body_std=float(np.median([stats.std for stats in statistics])),
                class_percentile_00_5=low,
                class_median=middle,
                class_percentile_99_5=high,
                decided_by=", ".join(sorted({own.by for own in modalities})),
            )
        )
    return tuple(values)


def _class_facts(measured: Sequence[ScanMeasures], labels: Mapping[int, str]) -> tuple[ClassFacts, ...]:
    found: dict[int, list[ClassMeasures]] = {}
    for scan in measured:
        for value, measures in scan.classes.items():
            found.setdefault(value, []).append(measures)
    facts = []
    for value, measures_of in sorted(found.items()):
        volumes = [measures.volume_ml for measures in measures_of]
        x, y, z = (max(measures.extent_mm[axis] for measures in measures_of) for axis in range(3))
        facts.append(
            ClassFacts(
                value=value,
                name=labels.get(value, str(value)),
                num_scans=len(measures_of),
                volume_ml=(min(volumes), float(np.median(volumes)), max(volumes)),
                num_components=float(np.median([measures.num_components for measures in measures_of])),
                extent_mm=(x, y, z),
            )
        )
    return tuple(facts)


def file_sources(cases: Sequence[Case], labels: Mapping[int, str], ignore_label: int | None = None) -> list[ScanSource]:
    """Cases that lie in files.

    Args:
        cases: The cases.
        labels: Declared label values. Others are refused when voxels are read; empty allows all.
        ignore_label: Value of voxels that belong to no structure.
    """

    def source_of(case: Case) -> ScanSource:
        def read_header() -> ScanGrid:
            grid = read_grid(case.images[0])
            return ScanGrid(
                id=case.id,
                shape=grid.ras_shape,
                spacing_mm=grid.spacing_mm,
                num_channels=len(case.images),
                orientation="".join(str(code) for code in orientations.ornt2axcodes(grid.orientation)),
            )

        def measure() -> ScanMeasures:
            prepared = prepare(case, Preprocessing(), labels=labels)
            return measure_scan(
                prepared.image,
                prepared.label,
                prepared.spacing_mm,
                prepared.statistics,
                prepared.modalities,
                ignore_label,
            )

        paths = (*case.images, *([case.label] if case.label else []))
        return ScanSource(id=case.id, state=tuple(map(_state_of, paths)), grid=read_header, measure=measure)

    return [source_of(case) for case in cases]


def _state_of(path: str) -> str:
    """Path, size and time of change of a file (of the folder of a DICOM series)."""
    try:
        state = os.stat(file_of(path))
    except OSError:
        return path
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def cached_sources(scans: Sequence["CachedScan"], ignore_label: int | None = None) -> list[ScanSource]:
    """Scans of a cache; ``ignore_label`` as in :func:`file_sources`."""

    def source_of(scan: "CachedScan") -> ScanSource:
        def read_header() -> ScanGrid:
            return ScanGrid(
                id=scan.case.id,
                shape=scan.shape,
                spacing_mm=scan.spacing_mm,
                num_channels=scan.num_channels,
                orientation="RAS",
            )

        def measure() -> ScanMeasures:
            image = scan.to_values(scan.read((0, 0, 0), scan.shape))
            label = scan.read_label((0, 0, 0), scan.shape) if scan.has_label else None
            return measure_scan(image, label, scan.spacing_mm, scan.statistics, scan.modalities, ignore_label)

        return ScanSource(id=scan.case.id, state=(scan.digest,), grid=read_header, measure=measure)

    return [source_of(scan) for scan in scans]


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
    modalities: Sequence[ChannelModality],
    ignore_label: int | None = None,
) -> ScanMeasures:
    """Measure a scan on its RAS+ grid.

    Args:
        image_CXYZ: (C, X, Y, Z) in source units.
        label_XYZ: (X, Y, Z) label values; None for a scan without.
        spacing_mm: Voxel size along X, Y, Z.
        statistics: Statistics of each channel.
        modalities: What each channel is.
        ignore_label: Value of voxels that belong to no structure.
    """
    if label_XYZ is None:
        nothing = np.empty((len(image_CXYZ), 0), dtype=np.float32)
        return ScanMeasures(
            statistics=tuple(statistics),
            modalities=tuple(modalities),
            class_voxels=nothing,
            classes={},
            foreground_ratio=0.0,
        )
    if ignore_label is not None:
        label_XYZ = np.where(label_XYZ == ignore_label, 0, label_XYZ)
    from scipy.ndimage import find_objects

    num_voxels = class_counts_of(label_XYZ).sum(axis=0)
    classes = {}
    for value, box in enumerate(find_objects(label_XYZ), start=1):
        if box is not None:
            _, num_components = find_components(label_XYZ[box] == value)
            x, y, z = ((axis.stop - axis.start) * mm for axis, mm in zip(box, spacing_mm, strict=True))
            classes[value] = ClassMeasures(
                volume_ml=int(num_voxels[value]) * math.prod(spacing_mm) / 1000,
                num_components=num_components,
                extent_mm=(x, y, z),
            )
    places = np.flatnonzero(label_XYZ)
    kept = places[:: max(1, len(places) // MAX_CLASS_VOXELS)]
    return ScanMeasures(
        statistics=tuple(statistics),
        modalities=tuple(modalities),
        class_voxels=np.stack([channel.ravel()[kept] for channel in image_CXYZ]).astype(np.float32),
        classes=classes,
        foreground_ratio=len(places) / label_XYZ.size,
    )
