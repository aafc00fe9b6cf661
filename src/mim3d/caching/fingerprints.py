"""What a scan looks like in a kilobyte, and which held-out scans were learned from.

A fingerprint finds the same scan again after conversion, resampling or windowing. It holds the mean intensity in 10 x
10 x 10 equal cells of the scan, and where the scan lies in millimetres. Of a CT in HU the cells are taken twice, over a
wide and over a narrow window, so that a copy saved through either of them is found. Two fingerprints are compared over
the box that both scans cover, as the correlation of what varies from cell to cell: slow changes, which all bodies
share, weigh least. A scaled, shifted or clipped intensity changes that little.

Where two scans may overlap is not known if a file lost its position. So the scans are laid over each other as their
affines say, and with their centres or any of their sides together (a few slices cut off). Chance fits are likelier in
the second case, which is therefore held to a stricter bound.

What cannot be found out: pieces of a few millimetres resampled to coarser voxels (missed), and scans of one plain
object in noise, in the same place by chance (taken for one).
"""

import base64
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mim3d.caching.marks import Marks, salted_digest
from mim3d.caching.marks import alike as _alike
from mim3d.core.errors import DataError
from mim3d.core.types import Spacing
from mim3d.scans.modality import DARKEST_CT_HU, sign_of

#: Cells along each axis.
CELLS = 10
#: Cells along each axis of the box that two scans share: fewer, as their cells do not fall together.
SHARED_CELLS = 8
#: At most about this many evenly spaced voxels of each axis are looked at.
MAX_SAMPLES = 96
WIDE_HU = (-1000.0, 1000.0)
NARROW_HU = (-175.0, 250.0)
#: Cells within this share of the darkest or the brightest count as saturated ...
SATURATED_RATIO = 0.03
#: ... and a scan with fewer other cells than this share shows too little to be distinguished from others.
LEAST_INFORMATIVE_RATIO = 0.2
#: Scans may be cut by this share of an axis, or by one thick slice, and still be found.
MAX_CUT_RATIO = 0.2
MAX_CUT_MM = 4.5
#: Sides that differ by less than this share are not tried apart from centres.
SAME_EXTENT_RATIO = 0.02
#: Largest distance of one scan to itself, laid over each other as the affines say.
IN_PLACE_DISTANCE = 0.08
#: The same where centres or sides are put together.
MOVED_DISTANCE = 0.025
#: Training scans that are compared in full with each held-out scan.
NEAREST = 5
#: Scans correlate at least this well in their coarse features where they may be the same one; measured: 0.70.
LEAST_CORRELATION = 0.6
#: Held-out scans that are compared with all others at a time.
_CHUNK = 256
#: Pairs of fingerprints that are compared in full at a time.
_PAIRS = 512

How = Literal["identical", "the same scan, converted"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Fingerprint:
    """A scan at a glance.

    Attributes:
        cells: (1 or 2, 10, 10, 10) uint8, means from the darkest (0) to the brightest (255) cell; a second channel, the
            narrow window, where the scan is a CT in HU.
        extent_mm: (3,) size along the axes of the scan.
        centre_mm: (3,) middle of the scan, along its own axes.
    """

    cells: npt.NDArray[np.uint8]
    extent_mm: npt.NDArray[np.float32]
    centre_mm: npt.NDArray[np.float32]

    @cached_property
    def is_informative(self) -> tuple[bool, bool]:
        """Whether the wide and the narrow cells show enough to distinguish the scan from others."""
        margin = 255 * SATURATED_RATIO
        wide, narrow = (float(np.mean((cells > margin) & (cells < 255 - margin))) for cells in self.cells[[0, -1]])
        return wide >= LEAST_INFORMATIVE_RATIO, narrow >= LEAST_INFORMATIVE_RATIO

    def to_text(self) -> str:
        """The fingerprint as base64, 1.4 or 2.7 kB."""
        place = np.concatenate([self.extent_mm, self.centre_mm]).astype("<f4")
        return base64.b64encode(place.tobytes() + self.cells.tobytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> "Fingerprint":
        """The fingerprint that ``to_text`` wrote.

        Raises:
            DataError: The text is no fingerprint.
        """
        try:
            content = base64.b64decode(text, validate=True)
            place = np.frombuffer(content[:24], dtype="<f4").astype(np.float32)
            cells = np.frombuffer(content[24:], dtype=np.uint8).reshape(-1, CELLS, CELLS, CELLS)
        except (TypeError, ValueError) as error:
            raise DataError(f"{str(text)[:20]!r}... is no fingerprint ({error}); write the list again.") from error
        if len(cells) not in (1, 2) or not np.isfinite(place).all() or (place[:3] <= 0).any():
            raise DataError(f"{text[:20]!r}... is no fingerprint of this version of mim3d; write the list again.")
        return cls(cells=cells, extent_mm=place[:3], centre_mm=place[3:])


def fingerprint_of(
    image_XYZ: npt.NDArray[Any], spacing_mm: Spacing, affine: npt.NDArray[np.float64], in_hu: bool | None = None
) -> Fingerprint:
    """Fingerprint of one channel of a scan.

    Args:
        image_XYZ: Voxels along RAS+ axes, in any unit.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) voxel index to RAS millimetres.
        in_hu: Whether they are HU; None where the voxels decide.
    """
    shape = image_XYZ.shape
    steps = [max(1, size // MAX_SAMPLES) for size in shape]
    # The middle voxel of each step.
    samples = image_XYZ[tuple(slice((step - 1) // 2, None, step) for step in steps)]
    means = [_cell_means(size, step) for size, step in zip(shape, steps, strict=True)]
    # A crop of soft tissue has no use for two windows.
    is_hu = (sign_of(image_XYZ) == "HU" if in_hu is None else in_hu) and float(samples.min()) < DARKEST_CT_HU
    windows: Sequence[tuple[float, float] | None] = (WIDE_HU, NARROW_HU) if is_hu else (None,)
    channels = []
    for window in windows:
        cells = samples.astype(np.float32)
        if window is not None:
            np.clip(cells, *window, out=cells)
        for axis, mean in enumerate(means):
            cells = np.moveaxis(np.tensordot(mean, cells, axes=(1, axis)), 0, axis)
        low, high = float(cells.min()), float(cells.max())
        # Rounding alone must not be taken for contrast; the inverse of a smaller range is beyond single precision.
        range_ = high - low if high - low > max(1e-5 * max(abs(low), abs(high)), 1e-30) else np.inf
        channels.append(np.rint((cells - low) * (255 / range_)).astype(np.uint8))
    middle = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return Fingerprint(
        cells=np.ascontiguousarray(np.stack(channels)),
        extent_mm=(np.array(shape) * spacing_mm).astype(np.float32),
        centre_mm=(axes.T @ middle).astype(np.float32),
    )


def _cell_means(size: int, step: int) -> npt.NDArray[np.float32]:
    """(10, samples) weights of an axis's samples in each cell: how much of the cell each represents."""
    starts = np.arange(len(range((step - 1) // 2, size, step))) * step
    weight = _overlaps(np.arange(CELLS + 1) * (size / CELLS), starts, np.minimum(starts + step, size))
    # A cell that lies wholly behind the last sample of an unfinished step takes that sample.
    weight[weight.sum(axis=1) == 0, -1] = 1
    return (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)


def _overlaps(edges: npt.NDArray[Any], starts: npt.NDArray[Any], stops: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(..., parts, stretches) how much of each stretch lies between each two neighbouring edges (..., parts + 1)."""
    shared = np.minimum(edges[..., 1:, None], stops) - np.maximum(edges[..., :-1, None], starts)
    return np.clip(shared, 0, None)


class _Stack:
    """Many fingerprints as arrays of N rows."""

    def __init__(self, prints: Sequence[Fingerprint]) -> None:
        # (N, 2, 10, 10, 10); a scan that is not in HU has its cells twice.
        cells = [np.broadcast_to(print_.cells, (2, CELLS, CELLS, CELLS)) for print_ in prints]
        self.cells = np.stack(cells).astype(np.float32)
        self.is_hu = np.array([len(print_.cells) == 2 for print_ in prints])
        self.extent_mm = np.stack([print_.extent_mm for print_ in prints])
        self.centre_mm = np.stack([print_.centre_mm for print_ in prints])
        self.is_informative = np.array([print_.is_informative for print_ in prints])

    def features(
        self, rows: Any, bases: Sequence[npt.NDArray[np.float32]], weight: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Weighted waves of the cells in some rows as unit vectors (N, 2, F); all 0 for what is not informative.

        Args:
            rows: Index of the rows.
            bases: For each axis (K, 10), or (N, K, 10) of each scan.
            weight: (K, K, K).
        """
        waves = self.cells[rows]
        for axis, base in enumerate(bases):
            if base.ndim == 3:
                base = base[:, None, None]
            # The axis is moved to the last but one place, so that the same product serves all axes.
            moved = np.moveaxis(waves, 2 + axis, -2)
            waves = np.moveaxis(base @ moved, -2, 2 + axis)
        flat = (waves * weight).reshape(len(waves), 2, -1)
        flat /= np.linalg.norm(flat, axis=2, keepdims=True) + np.float32(1e-3)
        flat[~self.is_informative[rows]] = 0
        return flat


def distances(pairs: Sequence[tuple[Fingerprint, Fingerprint]]) -> npt.NDArray[np.float32]:
    """Distance of each pair in units of the largest that one scan may have to itself: at most 1 is the same scan.

    Returns:
        (len(pairs),) float32; infinite where the sizes do not fit, large where a scan shows too little.
    """
    best = np.full(len(pairs), np.inf, dtype=np.float32)
    for start in range(0, len(pairs), _PAIRS):
        first, second = (_Stack(side) for side in zip(*pairs[start : start + _PAIRS], strict=True))
        larger_mm = np.maximum(first.extent_mm, second.extent_mm)
        for offset_mm, tried, bound in _placements(first, second):
            low, high = _shared_box(first.extent_mm, second.extent_mm, offset_mm)
            rows = np.flatnonzero(tried & _covers(high - low, larger_mm))
            found = (1 - _correlations(first, second, rows, offset_mm[rows])) / bound
            best[start + rows] = np.minimum(best[start + rows], found)
    return best


def _placements(first: _Stack, second: _Stack) -> Iterator[tuple[npt.NDArray[Any], Any, float]]:
    """Centre of the second scan from that of the first (P, 3), the pairs where that is worth a try, the bound."""
    yield second.centre_mm - first.centre_mm, True, IN_PLACE_DISTANCE
    half = (first.extent_mm - second.extent_mm) / 2
    alike = np.abs(2 * half) < SAME_EXTENT_RATIO * np.maximum(first.extent_mm, second.extent_mm)
    for sides in itertools.product((0, -1, 1), repeat=3):
        yield half * sides, ~(alike & (np.array(sides) != 0)).any(axis=1), MOVED_DISTANCE


def _shared_box(
    first_mm: npt.NDArray[Any], second_mm: npt.NDArray[Any], offset_mm: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Lower and upper corner of what two scans of some extents cover, from the centre of the first."""
    return np.maximum(-first_mm / 2, offset_mm - second_mm / 2), np.minimum(first_mm / 2, offset_mm + second_mm / 2)


def _covers(shared_mm: npt.NDArray[Any], whole_mm: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether what two scans share (..., 3) is enough of the larger one along every axis to compare them."""
    enough = (shared_mm >= (1 - MAX_CUT_RATIO) * whole_mm) | (shared_mm >= whole_mm - MAX_CUT_MM)
    return np.asarray((enough & (shared_mm > 0)).all(axis=-1))


def _correlations(
    first: _Stack, second: _Stack, rows: npt.NDArray[Any], offset_mm: npt.NDArray[Any]
) -> npt.NDArray[np.float32]:
    """Correlation of both scans of the pairs in some rows over what they share."""
    if not len(rows):
        return np.zeros(0, dtype=np.float32)
    low, high = _shared_box(first.extent_mm[rows], second.extent_mm[rows], offset_mm)
    cell = np.arange(CELLS)
    features = []
    for side, centre in ((first, 0), (second, offset_mm)):
        extent_mm = side.extent_mm[rows]
        start, stop = ((end - centre + extent_mm / 2) * (CELLS / extent_mm) for end in (low, high))
        bases = []
        for axis in range(3):
            # (P, 8, 10) weights that average the cells of the axis between its two ends into 8 equal parts.
            edges = start[:, axis, None] + (stop - start)[:, axis, None] * np.arange(SHARED_CELLS + 1) / SHARED_CELLS
            weight = _overlaps(edges, cell, cell + 1)
            means = weight / np.maximum(weight.sum(axis=2, keepdims=True), 1e-6)
            bases.append(_SHARED @ means.astype(np.float32))
        features.append(side.features(rows, bases, _SHARED_WEIGHT))
    wide, narrow, other = (
        np.einsum("pf,pf->p", features[0][:, one], features[1][:, two]) for one, two in ((0, 0), (1, 0), (0, 1))
    )
    mixed = first.is_hu[rows] != second.is_hu[rows]
    return np.where(mixed, np.maximum(wide, np.maximum(narrow, other)), wide)


def _waves(size: int, kept: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The first cosines of an orthonormal transform (kept, size), and the weight of each wave (kept, kept, kept).

    That is its wave number, so that fine structure counts as much as the outline of a body.
    """
    order, place = np.arange(kept)[:, None], np.arange(size)[None]
    cosines = np.cos(np.pi * (place + 0.5) * order / size) * np.sqrt(2 / size)
    cosines[0] /= np.sqrt(2)
    x, y, z = np.meshgrid(*[np.arange(kept)] * 3, indexing="ij")
    return cosines.astype(np.float32), np.sqrt(x**2 + y**2 + z**2).astype(np.float32)


_COARSE, _COARSE_WEIGHT = _waves(CELLS, 6)
_SHARED, _SHARED_WEIGHT = _waves(SHARED_CELLS, SHARED_CELLS)


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanIdentity:
    """What a scan is known by.

    Attributes:
        id: Id of the case; empty where it is not to be known.
        digest: SHA-256 of its content. The same digest means the same scan.
        fingerprint: What it looks like; None in a published list, which holds no images.
        marks: What it is recognised by in published lists; none in lists of earlier versions.
        salt: Hexadecimal digits with which digest and marks were hashed again; empty where they were not.
    """

    id: str
    digest: str
    fingerprint: Fingerprint | None
    marks: Marks = field(default_factory=Marks)
    salt: str = ""

    def salted(self, salt: str) -> "ScanIdentity":
        """The scan as it stands in a published list with a salt."""
        return replace(
            self, digest=salted_digest(self.digest, salt), fingerprint=None, marks=self.marks.salted(salt), salt=salt
        )


@dataclass(frozen=True, kw_only=True)
class Leak:
    """A held-out scan that was learned from.

    Attributes:
        training: Id of the scan that was learned from.
        held_out: Id of the scan that is held out.
        how: Whether the contents are the same, or look the same.
        distance: Distance of the fingerprints, from 0; at most 1 counts as the same scan.
    """

    training: str
    held_out: str
    how: How
    distance: float


def find_leaks(training: Sequence[ScanIdentity], held_out: Sequence[ScanIdentity]) -> list[Leak]:
    """Held-out scans that are among the training scans, in the order of the held-out ones.

    A held-out scan is named once for each training scan of the same content, and for each of the nearest few that look
    the same.
    """
    leaks: list[tuple[int, float, int, How]] = []
    for salt in {scan.salt for scan in training}:
        rows = [row for row, scan in enumerate(training) if scan.salt == salt]
        others = [scan.salted(salt) for scan in held_out] if salt else held_out
        found = _found([training[row] for row in rows], others)
        leaks += [(column, distance, rows[row], how) for column, distance, row, how in found]
    return [
        Leak(training=training[row].id, held_out=held_out[column].id, how=how, distance=distance)
        for column, distance, row, how in sorted(leaks)
    ]


def _found(training: Sequence[ScanIdentity], held_out: Sequence[ScanIdentity]) -> Iterator[tuple[int, float, int, How]]:
    """Leaks among scans of one salt: place of the held-out scan, distance, place of the training scan, and how."""
    if not training or not held_out:
        return
    places = defaultdict(list)
    for row, scan in enumerate(training):
        places[scan.digest].append(row)
    identical = {(row, column) for column, scan in enumerate(held_out) for row in places.get(scan.digest, ())}
    yield from ((column, 0.0, row, "identical") for row, column in identical)
    if training[0].salt:
        near = _alike([scan.marks for scan in training], [scan.marks for scan in held_out])
    else:
        pairs = [pair for pair in _candidates(training, held_out) if pair not in identical]
        prints = [(_print_of(training[row]), _print_of(held_out[column])) for row, column in pairs]
        near = zip(pairs, map(float, distances(prints)), strict=True)
    for (row, column), distance in near:
        if distance <= 1 and (row, column) not in identical:
            yield column, distance, row, "the same scan, converted"


def _print_of(scan: ScanIdentity) -> Fingerprint:
    assert scan.fingerprint is not None, "only published lists have none"
    return scan.fingerprint


def _candidates(training: Sequence[ScanIdentity], held_out: Sequence[ScanIdentity]) -> Iterator[tuple[int, int]]:
    """For each held-out scan the training scans that resemble it most, as places in both sequences."""
    own = _Stack([_print_of(scan) for scan in training])
    # Coarse features (N, 2, 216), whose products are good enough for a first choice.
    features = own.features(slice(None), [_COARSE] * 3, _COARSE_WEIGHT)
    for start in range(0, len(held_out), _CHUNK):
        other = _Stack([_print_of(scan) for scan in held_out[start : start + _CHUNK]])
        others = other.features(slice(None), [_COARSE] * 3, _COARSE_WEIGHT)
        alike = others[:, 0] @ features[:, 0].T
        # Where one of both scans alone is in HU, the other may have been saved through either of its windows.
        narrow = np.maximum(others[:, 1] @ features[:, 0].T, others[:, 0] @ features[:, 1].T)
        alike = np.where(other.is_hu[:, None] != own.is_hu, np.maximum(alike, narrow), alike)
        extents = other.extent_mm[:, None], own.extent_mm
        alike[~_covers(np.minimum(*extents), np.maximum(*extents))] = -1
        kept = min(NEAREST, len(training))
        best = np.argpartition(-alike, kept - 1, axis=1)[:, :kept]
        for column, rows in enumerate(best):
            yield from ((int(row), start + column) for row in rows if alike[column, row] >= LEAST_CORRELATION)
