"""One scan of a cache: its card, which holds everything but the voxels, and its voxels, read crop by crop."""

import base64
import io
import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching import layout
from mim3d.caching.fingerprints import fingerprint_of
from mim3d.caching.foreground import MAX_LOCATIONS, Statistics
from mim3d.caching.layout import ByteSource, open_bytes
from mim3d.caching.preprocessing import Prepared
from mim3d.caching.shards import BLOCK, ShardedArray
from mim3d.caching.stored_voxels import Shown, StoredIntensity, level_shapes
from mim3d.core.errors import DamagedError, DataError
from mim3d.core.types import LARGEST_LABEL, Spacing, Triple
from mim3d.datasets.cases import Case
from mim3d.scans.modality import DARKEST_CT_HU, ChannelModality

#: What is known of a cached case besides its voxels, as plain values for JSON and Parquet.
Card = dict[str, Any]

#: First voxel and number of voxels along X, Y, Z.
Box = tuple[Triple, Triple]


def card_of(
    prepared: Prepared,
    meanings: Sequence[StoredIntensity],
    dtype: np.dtype[Any],
    num_levels: int,
    level_windows: Sequence[tuple[float, float]],
) -> Card:
    """The card of a case, as far as its prepared voxels decide it.

    Args:
        prepared: The case.
        meanings: What the stored numbers mean in each channel.
        dtype: Type in which they are stored.
        num_levels: Number of resolutions stored.
        level_windows: What each channel was clipped to before its reduced levels were made.
    """
    return {
        "shape": list(prepared.image.shape[1:]),
        "spacing_mm": [float(mm) for mm in prepared.spacing_mm],
        "affine": prepared.affine.ravel().tolist(),
        "num_channels": prepared.image.shape[0],
        "dtype": dtype.name,
        "num_levels": num_levels,
        "level_windows": [{"low": float(low), "high": float(high)} for low, high in level_windows],
        "has_label": prepared.label is not None,
        "statistics": [asdict(channel) for channel in prepared.statistics],
        "stored_intensities": [asdict(meaning) for meaning in meanings],
        "body_box": [voxel for corner in prepared.foreground.box for voxel in corner],
        "foreground": base64.b64encode(zlib.compress(prepared.foreground.shares.tobytes())).decode("ascii"),
        "modalities": [asdict(channel) for channel in prepared.modalities],
        "fingerprint": fingerprint_of(
            prepared.image[0], prepared.spacing_mm, prepared.affine, prepared.modalities[0].in_hu
        ).to_text(),
        **({} if prepared.marks is None else {"marks": prepared.marks.to_text()}),
    }


def modalities_of(card: Mapping[str, Any]) -> tuple[ChannelModality, ...]:
    """What each channel of a case is by its card.

    Earlier versions wrote nothing of it: they took for CT what has one voxel below -200.

    Raises:
        KeyError, TypeError: The card is damaged.
    """
    if card.get("modalities") is not None:
        return tuple(ChannelModality(**channel) for channel in card["modalities"])
    dark = [bool(stats["minimum"] < DARKEST_CT_HU) for stats in card["statistics"]]
    return tuple(
        ChannelModality(
            name="CT" if is_ct else None, by="earlier version", in_hu=is_ct, sign="HU" if is_ct else "unlike"
        )
        for is_ct in dark
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class CachedScan:
    """A preprocessed scan on disk; may be pickled and used in any process.

    Attributes:
        case: Case that the scan comes from.
        source: Where its files lie: a folder, or ranges of a pack.
        shape: Voxels along X, Y, Z.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) float64, voxel index to RAS millimetres.
        num_channels: Number of channels of the image.
        statistics: Statistics of each channel.
        dtype: Name of the type in which the image is stored.
        digest: SHA-256 of source files and settings. The same digest means the same voxels.
        source_digest: SHA-256 of the images' files alone. The same digest means the same scan.
        body_box: Box of the foreground, first voxel and first voxel behind it.
        foreground: (ceil(X / 32), ceil(Y / 32), ceil(Z / 32)) uint8, share of foreground voxels in each block of 32
            voxels a side, from 0 for none to 255 for all.
        has_label: Whether a label map is stored.
        num_voxels: Label value -> number of its voxels.
        source_bytes: Size of the source files.
        size_bytes: Size of what is stored.
        stored_intensities: What the stored numbers of each channel mean.
        num_levels: Number of resolutions stored, full resolution first, each half the one before.
        level_windows: Range in source units to which each channel was clipped before its reduced levels were made. None
            in caches made before levels were averages of what is shown: theirs are averages of the stored numbers, and
            at odd edges of those inside the scan alone.
        modalities: What each channel is.
        source_spacing_mm: Voxel size along X, Y, Z before it was resampled; None where it was not, or in older caches.
        assumed: What its file leaves open, each with what is assumed.
        scanner: What made it, where a DICOM header says so.
    """

    case: Case
    source: ByteSource
    shape: Triple
    spacing_mm: Spacing
    affine: npt.NDArray[np.float64]
    num_channels: int
    statistics: tuple[Statistics, ...]
    dtype: str
    digest: str
    source_digest: str
    body_box: tuple[Triple, Triple]
    foreground: npt.NDArray[np.uint8]
    has_label: bool
    num_voxels: Mapping[int, int]
    source_bytes: int
    size_bytes: int
    stored_intensities: tuple[StoredIntensity, ...] = ()
    num_levels: int = 1
    level_windows: tuple[tuple[float, float], ...] | None = None
    modalities: tuple[ChannelModality, ...] = ()
    source_spacing_mm: Spacing | None = None
    assumed: tuple[str, ...] = ()
    scanner: str | None = None

    @classmethod
    def from_card(cls, card: Mapping[str, Any], case: Case, source: ByteSource) -> "CachedScan":
        """The scan behind a card.

        Raises:
            KeyError, TypeError, ValueError, IndexError, zlib.error: The card is damaged.
        """
        x, y, z = (int(voxels) for voxels in card["shape"])
        sx, sy, sz = (float(mm) for mm in card["spacing_mm"])
        edges = card.get("source_spacing_mm")
        box = [int(voxel) for voxel in card["body_box"]]
        blocks = [-(-voxels // BLOCK) for voxels in (x, y, z)]
        packed = base64.b64decode(card["foreground"], validate=True)
        foreground = zlib.decompressobj().decompress(packed, math.prod(blocks))
        return cls(
            case=case,
            source=source,
            shape=(x, y, z),
            spacing_mm=(sx, sy, sz),
            affine=np.array(card["affine"], dtype=np.float64).reshape(4, 4),
            num_channels=int(card["num_channels"]),
            dtype=np.dtype(card["dtype"]).name,
            statistics=tuple(Statistics(**channel) for channel in card["statistics"]),
            digest=str(card["digest"]),
            source_digest=str(card["source_digest"]),
            body_box=((box[0], box[1], box[2]), (box[3], box[4], box[5])),
            foreground=np.frombuffer(foreground, dtype=np.uint8).reshape(blocks),
            has_label=bool(card["has_label"]),
            num_voxels={int(item["value"]): int(item["count"]) for item in card["num_voxels"]},
            source_bytes=int(card["source_bytes"]),
            size_bytes=int(card["size_bytes"]),
            stored_intensities=tuple(StoredIntensity(**meaning) for meaning in card["stored_intensities"]),
            num_levels=int(card["num_levels"]),
            level_windows=_level_windows(card.get("level_windows")),
            modalities=modalities_of(card),
            source_spacing_mm=None if edges is None else (float(edges[0]), float(edges[1]), float(edges[2])),
            assumed=tuple(map(str, card.get("assumed") or ())),
            scanner=card.get("scanner"),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Only the card travels to another process: class locations are read again there."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @cached_property
    def class_locations(self) -> dict[int, npt.NDArray[np.int32]]:
        """Label value above 0 -> (N, 3) voxel coordinates, at most 2000, evenly drawn from the class."""
        if not self.has_label:
            return {}
        try:
            rows = self._location_rows()
        except (OSError, ValueError, LookupError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedError(
                f"{self.case.id}: its {layout.LOCATIONS} is missing or damaged ({error}); delete {self.source} and run "
                "`mim3d cache` again."
            ) from error
        return {int(value): np.ascontiguousarray(rows[rows[:, 0] == value, 1:]) for value in np.unique(rows[:, 0])}

    def _location_rows(self) -> npt.NDArray[np.int32]:
        """Label value and voxel (N, 4) of each place, unpacked into no more memory than so many labels can take."""
        stored = open_bytes(self.source, layout.LOCATIONS)
        most_bytes = 4096 + 4 * 8 * MAX_LOCATIONS * len(self.num_voxels)
        if stored.size > most_bytes:
            raise ValueError(f"{stored.size} bytes")
        content = io.BytesIO(stored.pread(0, stored.size))
        with zipfile.ZipFile(content) as members:
            if any(member.file_size > most_bytes for member in members.infolist()):
                raise ValueError("it unpacks to more than places of each label")
        content.seek(0)
        with np.load(content, allow_pickle=False) as file:
            rows = file["rows"].T
        limits = (LARGEST_LABEL + 1, *self.shape)
        if rows.dtype.kind not in "iu" or rows.ndim != 2 or rows.shape[1] != len(limits):
            raise ValueError(f"{rows.dtype} {rows.shape}")
        if (rows < 0).any() or (rows >= limits).any():
            raise ValueError("places outside the scan")
        return rows

    @property
    def level_shapes(self) -> tuple[Triple, ...]:
        """Voxels along X, Y, Z of each level."""
        return level_shapes(self.shape, self.num_levels)

    def shows(self, level: int, box: Box, bounds: tuple[float, float]) -> bool:
        """Whether a crop of a reduced level is the average of what full resolution shows there.

        Args:
            level: The level.
            box: Origin and size of the crop, in voxels of the level.
            bounds: Range to which a network's intensities are clipped, in source units; infinite where they are not.
        """
        if level == 0:
            return True
        if self.level_windows is None:
            ends = zip(*box, self.shape, self.level_shapes[level], strict=True)
            if any(size % 2**level and first < last <= first + length for first, length, size, last in ends):
                return False
        return self.clips_like(bounds)

    def clips_like(self, bounds: tuple[float, float]) -> bool:
        """Whether reduced levels are averages of intensities clipped to ``bounds``, to half a stored step."""
        windows = self.level_windows or ((-math.inf, math.inf),) * self.num_channels
        limits = np.iinfo(self.dtype)
        for window, meaning, stats in zip(windows, self.stored_intensities, self.statistics, strict=True):
            for extreme in (stats.minimum, stats.maximum):
                # Two ranges clip all values alike where they do so with the least and the greatest that are stored.
                value = meaning.nearest(extreme, limits.dtype) * meaning.scale + meaning.offset
                made, wanted = (min(max(value, low), high) for low, high in (window, bounds))
                if abs(made - wanted) > meaning.scale / 2:
                    return False
        return True

    def foreground_ratio(self, origin: Triple, size: Triple) -> float:
        """Share of foreground in a box, from the stored map alone; outside the scan there is none.

        Args:
            origin: First voxel in full resolution; may lie outside the scan.
            size: Voxels along X, Y, Z.
        """
        inside = []
        for first, length, limit in zip(origin, size, self.shape, strict=True):
            edges = np.minimum(np.arange(0, limit + BLOCK, BLOCK), limit).clip(first, max(first, first + length))
            inside.append(np.diff(edges).astype(np.float32))
        x, y, z = inside
        return float(x @ (self.foreground @ z @ y)) / (255 * math.prod(size))

    @property
    def damage(self) -> str | None:
        """What is wrong with what is stored of the scan, found by reading all of it; None where it is sound."""
        try:
            for level, shape in enumerate(self.level_shapes):
                self.read((0, 0, 0), shape, level)
            if self.has_label:
                self.read_label((0, 0, 0), self.shape)
            _ = self.class_locations
        except DamagedError as error:
            return str(error)
        return None

    def read(self, origin: Triple, size: Triple, level: int = 0) -> npt.NDArray[Any]:
        """Read a crop of the image.

        Args:
            origin: First voxel, counted in voxels of the level; may lie outside the scan.
            size: Voxels of the level along X, Y, Z.
            level: 0 for full resolution; each level halves the one before.

        Returns:
            (C, X, Y, Z) in the stored type, see ``to_values``. Outside the scan it holds the number nearest to each
            channel's ``low``, in reduced levels as it is shown.

        Raises:
            DataError: There is no such level, or the stored voxels are missing or damaged.
        """
        return self.read_crops([(origin, size)], level)[0]

    def read_crops(self, boxes: Sequence[Box], level: int = 0) -> list[npt.NDArray[Any]]:
        """Read several crops of one level at once: blocks that they share are read and unpacked once.

        Args:
            boxes: Origin and size of each crop, see ``read``.
            level: Level of all of them.

        Raises:
            DataError: There is no such level, or the stored voxels are missing or damaged.
        """
        array, shape = self._array(level), self.level_shapes[level]
        dtype = self._checked_type(array, (self.num_channels, *shape))
        crops = []
        for origin, size in boxes:
            crop = np.empty((self.num_channels, *size), dtype=dtype)
            if any(
                first < 0 or first + length > limit for first, length, limit in zip(origin, size, shape, strict=True)
            ):
                for channel, outside in zip(crop, self._outside(level, dtype), strict=True):
                    channel[...] = outside
            crops.append(crop)
        array.read_crops([((0, *origin), crop) for (origin, _), crop in zip(boxes, crops, strict=True)])
        return crops

    def _outside(self, level: int, dtype: np.dtype[Any]) -> list[int]:
        """The number that stands for each channel outside the scan."""
        channels = zip(self.stored_intensities, self.statistics, strict=True)
        if level == 0 or self.level_windows is None:
            return [meaning.nearest(stats.low, dtype) for meaning, stats in channels]
        return [
            Shown.within(window, meaning, stats, dtype).outside
            for window, (meaning, stats) in zip(self.level_windows, channels, strict=True)
        ]

    def will_need(self, boxes: Sequence[Box], level: int = 0) -> None:
        """Let the disk begin with crops that are read soon. Missing or damaged files raise only when they are read."""
        self._array(level).will_need([((0, *origin), (self.num_channels, *size)) for origin, size in boxes])

    def _array(self, level: int) -> ShardedArray:
        if not 0 <= level < self.num_levels:
            raise DataError(
                f"{self.case.id}: the cache holds no level {level} of it, only 0 to {self.num_levels - 1}; build it "
                f"with --num_levels {level + 1}."
            )
        return ShardedArray(self.source, f"{layout.IMAGE}/{level}")

    def to_values(self, stored_CXYZ: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Stored numbers as float32 in source units (HU for CT)."""
        values = np.empty(stored_CXYZ.shape, dtype=np.float32)
        for channel, stored, meaning in zip(values, stored_CXYZ, self.stored_intensities, strict=True):
            np.multiply(stored, np.float32(meaning.scale), out=channel, dtype=np.float32, casting="unsafe")
            channel += np.float32(meaning.offset)
        return values

    def read_label(self, origin: Triple, size: Triple) -> npt.NDArray[Any]:
        """Read a crop of the label map, (X, Y, Z) in the stored type; outside the scan it is 0.

        Raises:
            DataError: There is no label, or it is missing or damaged on disk.
        """
        if not self.has_label:
            raise DataError(f"{self.case.id}: no label in the cache; give a data set with labels.")
        array = ShardedArray(self.source, layout.LABEL)
        crop = np.zeros(size, dtype=self._checked_type(array, self.shape))
        array.read_crops([(origin, crop)])
        return crop

    def _checked_type(self, array: ShardedArray, shape: tuple[int, ...]) -> np.dtype[Any]:
        """Type of an array, whose shape must be what the card says."""
        found = array.layout
        if found.shape != shape:
            raise DamagedError(
                f"{self.case.id}: {array.name} in {self.source} holds {found.shape} voxels where its card says "
                f"{shape}; delete that and run `mim3d cache` again."
            )
        return found.dtype


def _level_windows(windows: Any) -> tuple[tuple[float, float], ...] | None:
    """The column of a card; absent in caches made before there was one."""
    return None if windows is None else tuple((float(window["low"]), float(window["high"])) for window in windows)
