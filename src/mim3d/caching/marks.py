"""What a scan is recognised by without being shown: hashes of small neighbourhoods, without their places.

A mark is a hash of which voxels of a neighbourhood are brighter than which others, around one of the scan's local
extremes. Noise makes such orders unique. They stay what they are when a scan is saved in another type, turned, scaled,
windowed or cut, as orders know neither intensities nor places. Marks are taken twice: of the voxels as they are, and of
the scan smoothed on a grid of whole millimetres in the world, which resampling leaves about as it was.

Of each kind those with the smallest hashes are kept, so that two copies keep the same ones. A published list holds them
salted: two lists cannot be compared with each other, only a scan at hand with a list. And whoever guesses an order from
its hash has learned which voxels of some neighbourhood of 1 cm are brighter than others, not where it lies.
"""

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.types import Spacing

#: Marks of each kind, at most.
NUM_MARKS = 128
#: Comparisons of two voxels that make a mark.
NUM_COMPARISONS = 40
#: Voxels on each side of the middle of a neighbourhood, along X, Y, Z: scans may have few slices.
_AROUND_VOXEL = (2, 2, 1)
_AROUND_PLACE = (2, 2, 2)
#: Grid of the smoothed scan, and the width of what smooths it.
GRID_MM = 2.0
#: Of larger scans their middle is looked at.
MOST_VOXELS = 160
MOST_PLACES = 96
#: A neighbourhood with a larger share of equal pairs shows too little.
_MOST_EQUAL = 0.25
#: Bytes of a mark.
_BYTES = 6
#: Shared marks by which two scans are one: of the voxels, and of the smoothed scan, there also as a share.
LEAST_VOXEL_MARKS = 5
LEAST_PLACE_MARKS = 4
LEAST_PLACE_SHARE = 0.07


@dataclass(frozen=True, eq=False)
class Marks:
    """The marks of a scan.

    Attributes:
        voxels: (N,) uint64 of 48 bits, ascending: those of the voxels as they are.
        places: (M,) uint64 of 48 bits, ascending: those of the smoothed scan.
    """

    voxels: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    places: npt.NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def both(self) -> list[int]:
        """The marks of both kinds."""
        return [*self.voxels.tolist(), *self.places.tolist()]

    @property
    def number(self) -> int:
        """Number of marks of both kinds."""
        return len(self.voxels) + len(self.places)

    def to_text(self) -> str:
        """The marks as base64, 2 kB at most."""
        both = np.concatenate([self.voxels, self.places]).astype("<u8").view(np.uint8).reshape(-1, 8)[:, :_BYTES]
        return base64.b64encode(len(self.voxels).to_bytes(1, "little") + both.tobytes()).decode("ascii")

    @classmethod
    def from_text(cls, text: str) -> "Marks":
        """The marks that ``to_text`` wrote.

        Raises:
            DataError: The text holds no marks.
        """
        try:
            content = base64.b64decode(text, validate=True)
            rows = np.frombuffer(content[1:], np.uint8).reshape(-1, _BYTES)
            number = content[0]
            if not number <= len(rows) <= 2 * NUM_MARKS:
                raise ValueError("their number cannot be")
        except (TypeError, ValueError, IndexError) as error:
            raise DataError(f"{str(text)[:20]!r}... are no marks of a scan ({error}); write the list again.") from error
        whole = np.zeros((len(rows), 8), np.uint8)
        whole[:, :_BYTES] = rows
        values = whole.view("<u8").ravel().astype(np.uint64)
        return cls(values[:number], values[number:])

    def salted(self, salt: str) -> "Marks":
        """The same marks as they stand in a list with a salt."""
        return Marks(*(_salted(values, salt) for values in (self.voxels, self.places)))

    def likeness(self, other: "Marks") -> float:
        """How surely two scans are one: 1 and above where they are taken for one."""
        voxels, places = (
            len(np.intersect1d(one, two)) for one, two in ((self.voxels, other.voxels), (self.places, other.places))
        )
        fewer = min(len(self.places), len(other.places))
        return max(voxels / LEAST_VOXEL_MARKS, places / max(LEAST_PLACE_MARKS, LEAST_PLACE_SHARE * fewer))


def _salted(values: npt.NDArray[np.uint64], salt: str) -> npt.NDArray[np.uint64]:
    prefix = bytes.fromhex(salt)
    hashed = (hashlib.sha256(prefix + int(value).to_bytes(8, "little")).digest()[:_BYTES] for value in values)
    return np.array(sorted(int.from_bytes(one, "little") for one in hashed), np.uint64)


def salted_digest(digest: str, salt: str) -> str:
    """The digest of a scan as it stands in a list with a salt."""
    return hashlib.sha256(bytes.fromhex(salt) + digest.encode()).hexdigest()


def alike(training: Sequence[Marks], held_out: Sequence[Marks]) -> Iterator[tuple[tuple[int, int], float]]:
    """Pairs of scans that share marks, by their places in both sequences, and their distance: at most 1 is one scan."""
    holders: dict[int, set[int]] = defaultdict(set)
    for row, marks in enumerate(training):
        for value in marks.both:
            holders[value].add(row)
    for column, marks in enumerate(held_out):
        shared = Counter(row for value in marks.both for row in holders.get(value, ()))
        for row, number in shared.items():
            if number >= min(LEAST_VOXEL_MARKS, LEAST_PLACE_MARKS):
                yield (row, column), 1 / max(training[row].likeness(marks), 1e-6)


def marks_of(image_XYZ: npt.NDArray[np.generic], spacing_mm: Spacing, affine: npt.NDArray[np.float64]) -> Marks:
    """Marks of one channel of a scan.

    Args:
        image_XYZ: Voxels along RAS+ axes, in any unit, as they were stored.
        spacing_mm: Voxel size along X, Y, Z.
        affine: (4, 4) voxel index to RAS millimetres.
    """
    middle, _ = _middle(image_XYZ, [MOST_VOXELS] * 3)
    places, start = _middle(image_XYZ, [max(1, round(MOST_PLACES * GRID_MM / edge)) for edge in spacing_mm])
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    origin_mm = axes.T @ affine[:3, 3] + start * np.asarray(spacing_mm)
    smooth = _in_the_world(places.astype(np.float32), spacing_mm, origin_mm)
    return Marks(_marks(middle, _AROUND_VOXEL), _marks(smooth, _AROUND_PLACE))


def _middle(image_XYZ: npt.NDArray[np.generic], most: Sequence[int]) -> tuple[npt.NDArray[np.generic], np.ndarray]:
    """The middle of a scan, at most so many voxels along each axis, and its first voxel."""
    start = np.array([max(0, (size - limit) // 2) for size, limit in zip(image_XYZ.shape, most, strict=True)])
    kept = tuple(slice(first, first + limit) for first, limit in zip(start, most, strict=True))
    return image_XYZ[kept], start


def _in_the_world(
    image_XYZ: npt.NDArray[np.float32], spacing_mm: Spacing, origin_mm: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """The scan smoothed, at the places whose coordinates along its axes are whole multiples of the grid."""
    from scipy.ndimage import gaussian_filter1d

    for axis, (edge, origin) in enumerate(zip(spacing_mm, origin_mm, strict=True)):
        image_XYZ = gaussian_filter1d(image_XYZ, GRID_MM / edge, axis=axis, mode="nearest", truncate=3)
        last = origin + (image_XYZ.shape[axis] - 1) * edge
        grid_mm = np.arange(np.ceil(origin / GRID_MM), np.floor(last / GRID_MM) + 1) * GRID_MM
        places = np.clip((grid_mm - origin) / edge, 0, image_XYZ.shape[axis] - 1)
        before = np.floor(places).astype(int)
        after = np.minimum(before + 1, image_XYZ.shape[axis] - 1)
        share = (places - before).astype(np.float32).reshape([-1 if one == axis else 1 for one in range(3)])
        image_XYZ = image_XYZ.take(before, axis) * (1 - share) + image_XYZ.take(after, axis) * share
    return image_XYZ


@lru_cache
def _comparisons(around: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets (N, 3) of a neighbourhood, and the pairs of them that are compared; part of the format."""
    offsets = np.stack(np.meshgrid(*(np.arange(-edge, edge + 1) for edge in around), indexing="ij"), -1).reshape(-1, 3)
    # A plain sequence of numbers, which no version of numpy changes (Lehmer's generator).
    drawn: list[tuple[int, int]] = []
    state = seed
    while len(drawn) < NUM_COMPARISONS:
        state = state * 48271 % 2147483647
        first, second = divmod(state % len(offsets) ** 2, len(offsets))
        if first != second:
            drawn.append((first, second))
    return offsets, *np.array(drawn).T


def _marks(image_XYZ: npt.NDArray[np.generic], around: tuple[int, int, int]) -> npt.NDArray[np.uint64]:
    """Ascending marks of the local maxima and minima of an image, the smallest ones."""
    from scipy.ndimage import maximum_filter, minimum_filter

    inner = tuple(slice(edge, size - edge) for edge, size in zip(around, image_XYZ.shape, strict=True))
    if any(span.stop <= span.start for span in inner):
        return np.zeros(0, np.uint64)
    flat = np.ascontiguousarray(image_XYZ).ravel()
    found = []
    for seed, extreme in ((11, maximum_filter), (13, minimum_filter)):
        offsets, first, second = _comparisons(around, seed)
        peaks = np.zeros(image_XYZ.shape, bool)
        peaks[inner] = (extreme(image_XYZ, 3) == image_XYZ)[inner]
        steps = offsets @ np.array([image_XYZ.shape[1] * image_XYZ.shape[2], image_XYZ.shape[2], 1])
        for part in np.array_split(np.flatnonzero(peaks), max(1, int(peaks.sum()) // 50_000)):
            one, two = flat[part[:, None] + steps[first]], flat[part[:, None] + steps[second]]
            shown = (one == two).mean(1) <= _MOST_EQUAL
            bits = np.where(one[shown] > two[shown], np.uint64(1) << np.arange(NUM_COMPARISONS, dtype=np.uint64), 0)
            found.append(bits.sum(1, dtype=np.uint64) + np.uint64(seed << 48))
    return np.unique(_mixed(np.unique(np.concatenate(found))))[:NUM_MARKS]


def _mixed(codes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Codes spread evenly over 48 bits (Stafford's variant 13 of a 64-bit finaliser)."""
    codes = codes ^ (codes >> np.uint64(30))
    codes = codes * np.uint64(0xBF58476D1CE4E5B9)
    codes = codes ^ (codes >> np.uint64(27))
    codes = codes * np.uint64(0x94D049BB133111EB)
    return (codes ^ (codes >> np.uint64(31))) >> np.uint64(16)
