"""DICOM series: stacked and read, found in a tree by their headers, and separated from each other.

A series is one volume where its slices are evenly spaced and upright; any other is refused with the reason.
"""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.names import printable
from mim3d.core.warned import silenced
from mim3d.scans import files
from mim3d.scans.dicom.headers import Slice, name_form, read_header, read_identity, read_slices, read_stray
from mim3d.scans.grids import LPS_TO_RAS, Grid, check_affine, smallest_integer, split_series, times
from mim3d.scans.reading_process import read_apart

#: Letters of the name of a scanner at most, strength that no field has, and words that stand for no name.
_MOST_LETTERS, _MOST_TESLA, _NOTHING = 80, 30.0, ("", "none", "unknown", "anonymized", "n/a")

#: Modalities whose series are scans of the body's inside in parallel slices.
VOLUME_MODALITIES = ("CT", "MR", "PT")

#: Makes a patient's hash useless for a look-up in tables of hashes made elsewhere.
_SALT = b"mim3d patient key"

#: Series instance UID -> slices in any order.
Series = dict[str, list[Slice]]

#: A stack leaning by more than this is tilted: rounded positions in a header stay below.
MAX_TILT_DEGREES = 0.1

#: Slices may lie this many pixels beside the line through the stack.
MAX_SIDEWAYS_PIXELS = 0.1

#: Even a slice of air alone, compressed to next to nothing, is believed to be this large.
_ALWAYS_PLAUSIBLE_BYTES = 2**27

_REMEDY = "convert it with dcm2niix, which separates and straightens such series, and use that file, or leave it out"


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """A DICOM series whose slices make one volume.

    Attributes:
        grid: Grid of the scan; stored axes are (column, row, slice).
        slices: Slices in order along their normal.
    """

    grid: Grid
    slices: tuple[Slice, ...]

    def read_slabs(self) -> Iterator[npt.NDArray[Any]]:
        """Voxels in stored axis order (column, row, some slices), rescaled (HU for CT), in a buffer used again.

        They are int16 where the rescaled values are whole and fit, int32 where they are whole, else float32.

        Raises:
            DataError: Pixels cannot be decoded, or differ in size from their header.
        """
        whole = all(item.slope.is_integer() and item.intercept.is_integer() for item in self.slices)
        columns, rows, _ = self.grid.shape
        slabs = list(self.grid.slabs())
        dtype = np.int16 if whole else np.float32
        buffer: npt.NDArray[Any] = np.empty((slabs[0].stop, rows, columns), dtype=dtype)
        frames: npt.NDArray[Any] = np.empty((0, rows, columns))
        loaded = ""
        for slab in slabs:
            for place, item in enumerate(self.slices[slab]):
                if item.path != loaded:
                    frames, loaded = _decode(item), item.path
                    if item.inverted_from is not None:
                        # The decoder shows black as white; what is measured is as it is stored.
                        frames = item.slope * item.inverted_from + 2 * item.intercept - frames
                if whole:
                    needed = smallest_integer(int(frames.min()), int(frames.max()))
                    buffer = buffer.astype(np.promote_types(buffer.dtype, needed), copy=False)
                buffer[place] = frames[item.frame or 0]
            yield buffer[: slab.stop - slab.start].T


def _decode(item: Slice) -> npt.NDArray[Any]:
    """(frame, row, column) of one file; SimpleITK unpacks compressed syntaxes and rescales, in a process of its own."""
    size_bytes = item.rows * item.columns * item.num_values * item.num_frames * max(item.itemsize, 4)
    try:
        pixels = read_apart(item.path, "GDCMImageIO", size_bytes)
    except DataError as error:
        raise DataError(f"{error} Copy the series again from its source.") from error
    frames = pixels.reshape((-1, *pixels.shape[-2:])) if pixels.ndim > 1 else pixels.reshape((1, 1, -1))
    if frames.shape != (item.num_frames, item.rows, item.columns):
        raise DataError(f"{item.path}: the pixels differ in size from the header; copy the series again.")
    return frames


def stack(slices: Sequence[Slice], name: str) -> Stack:
    """Order the slices of one series along their normal, derive the grid, and check that its pixels are there.

    Args:
        slices: Every slice of one series, in any order.
        name: Name of the series in messages.

    Raises:
        DataError: A slice is damaged, there is one slice only, the geometry is missing, slices differ in size,
            orientation or rescaling, several lie in one place, the gantry was tilted, gaps are uneven, or a file or the
            memory is too small; the sentence names angle, gaps and remedy.
    """
    _check_each(slices, name)
    rows, columns = _common_size(slices, name)
    across, down, spacing = _common_plane(slices, name)
    normal = np.cross(across, down)
    positions = np.array([item.position for item in slices], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    heights = positions @ normal
    tilt = _tilt(positions, normal, slices[0], float(min(spacing)))
    gaps = _gaps(heights)
    complaints = [complaint for complaint in (tilt, gaps) if complaint]
    if complaints:
        remedy = "copy all of it again from its source" if not tilt and "missing" in str(gaps) else _REMEDY
        raise DataError(f"{name}: the DICOM series cannot be stacked: {' and '.join(complaints)}; {remedy}.")
    affine = np.eye(4)
    affine[:3, 0] = across * spacing[1]
    affine[:3, 1] = down * spacing[0]
    affine[:3, 2] = normal * (heights[-1] - heights[0]) / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    affine = LPS_TO_RAS @ affine
    check_affine(affine, (columns, rows, len(slices)), name)
    assumed: tuple[str, ...] = ()
    if slices[0].modality == "CT" and not any("Rescale" in keyword for item in slices for keyword in item.present):
        assumed = ("its headers have no RescaleSlope and no RescaleIntercept, so stored values count as HU",)
        files.warn_of_assumptions(name, assumed)
    if slices[0].frame is not None and len({(item.slope, item.intercept) for item in slices}) > 1:
        raise DataError(f"{name}: the frames of the DICOM file are rescaled in different ways; export single slices.")
    grid = Grid(shape=(columns, rows, len(slices)), affine=affine, path=name, assumed=assumed)
    for item in slices:
        if item.native_bytes is not None:
            files.check_raw(item.path, item.pixel_offset, item.native_bytes)
        else:
            _check_packed(item)
    files.check_memory(name, grid.shape, max(item.itemsize for item in slices))
    return Stack(grid=grid, slices=tuple(slices[index] for index in order))


def _check_packed(item: Slice) -> None:
    """Refuse a compressed file that claims much more than so few bytes can hold, before memory is taken for it."""
    claimed, held = item.rows * item.columns * item.num_frames * item.itemsize, os.path.getsize(item.path)
    if claimed > _ALWAYS_PLAUSIBLE_BYTES + files.MAX_DEFLATE_RATIO * held:
        raise DataError(
            f"{item.path}: the DICOM header claims {times((item.columns, item.rows, item.num_frames))} pixels, which "
            f"{held} compressed bytes cannot hold; copy the file again from its source."
        )


def _check_each(slices: Sequence[Slice], name: str) -> None:
    """Refuse a series with a slice that cannot be used by itself."""
    faults = {item.path: item.fault for item in slices if item.fault}
    if faults:
        more = f" {len(faults) - 1} more files of the series cannot be used either." if len(faults) > 1 else ""
        raise DataError(next(iter(faults.values())) + more)
    odd = next((item for item in slices if _no_volume(item)), None)
    if odd is not None:
        raise DataError(
            f"{odd.path}: among the slices of the DICOM series {name} this one is {_no_volume(odd)}; take it out, or "
            "export the series again where the file is damaged."
        )
    for keyword in sorted(frozenset().union(*(item.present for item in slices))):
        without = [item.path for item in slices if keyword not in item.present]
        if without:
            raise DataError(
                f"{without[0]}: the DICOM header has no {keyword}, but those of {len(slices) - len(without)} other "
                f"slices of the series {name} have; it may be damaged, so export the series again."
            )


def _common_size(slices: Sequence[Slice], name: str) -> tuple[int, int]:
    sizes = {(item.rows, item.columns): os.path.basename(item.path) for item in reversed(slices)}
    if len(sizes) > 1:
        shown = ", ".join(f"{times(size)} in {file}" for size, file in sorted(sizes.items()))
        raise DataError(f"{name}: the slices of the DICOM series differ in size ({shown}); separate them first.")
    if len(slices) < 2:
        raise DataError(f"{name}: the DICOM series has one slice, and a volume needs two or more; copy all of it.")
    for item in slices:
        geometry = {
            "ImagePositionPatient": item.position,
            "ImageOrientationPatient": item.orientation,
            "PixelSpacing": item.pixel_spacing,
        }
        if lacking := [keyword for keyword, value in geometry.items() if value is None]:
            raise DataError(
                f"{item.path}: the DICOM header has no {' and no '.join(lacking)}, so the series cannot be stacked; "
                "export the original series."
            )
    return slices[0].rows, slices[0].columns


def _common_plane(
    slices: Sequence[Slice], name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors along a row and down a column, and the pixel spacing, that all slices share."""
    planes = np.array([item.orientation for item in slices], dtype=np.float64)
    spacings = np.array([item.pixel_spacing for item in slices], dtype=np.float64)
    turned, stretched = np.abs(planes - planes[0]).max(axis=1), np.abs(spacings - spacings[0]).max(axis=1)
    if turned.max() > 1e-3:
        num_planes = max(2, len({tuple(plane) for plane in planes.round(2).tolist()}))
        raise DataError(
            f"{name}: the slices of the DICOM series lie in {num_planes} orientations, as in a localiser "
            f"({_unlike(slices, turned, planes)}); give a series of parallel slices."
        )
    if stretched.max() > 1e-3 * spacings[0].min():
        raise DataError(
            f"{name}: the slices of the DICOM series differ in pixel spacing "
            f"({_unlike(slices, stretched, spacings)}); split them first."
        )
    across, down = planes[0, :3] / np.linalg.norm(planes[0, :3]), planes[0, 3:]
    down = down - across * (across @ down)
    return across, down / np.linalg.norm(down), spacings[0]


def _unlike(slices: Sequence[Slice], distances: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> str:
    """The values of the slice that is furthest from the first one, and of the first one, with their files."""
    shown = (
        f"{', '.join(f'{value:.6g}' for value in values[index])} in {os.path.basename(slices[index].path)}"
        for index in (int(distances.argmax()), 0)
    )
    return " and ".join(shown)


def _tilt(
    positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], first: Slice, pixel_mm: float
) -> str | None:
    """Complaint about slices that do not lie straight above one another, or None."""
    steps = positions - positions[0]
    up = steps @ normal
    sideways = np.linalg.norm(steps - np.outer(up, normal), axis=1)
    if sideways.max() > MAX_SIDEWAYS_PIXELS * pixel_mm:
        angle = float(np.degrees(np.arctan2(sideways[-1], up[-1])))
        if angle > MAX_TILT_DEGREES:
            return f"it is tilted by {angle:.1f} degrees (gantry tilt)"
        if sideways[-1] < 0.5 * sideways.max():
            return f"slices are shifted sideways by up to {sideways.max():.2f} mm"
    # A header whose slices look upright though the gantry was tilted has lost the tilt.
    if abs(first.tilt_degrees) > 0.5 and np.abs(normal).max() > np.cos(np.radians(MAX_TILT_DEGREES)):
        return f"the gantry was tilted by {abs(first.tilt_degrees):.1f} degrees, but the slices lie upright"
    return None


def _gaps(heights: npt.NDArray[np.float64]) -> str | None:
    """Complaint about slices that share a place, are missing, or are unevenly spaced, or None."""
    gaps = np.diff(heights)
    typical = float(np.median(gaps))
    shared = int(np.count_nonzero(gaps < max(1e-3, 0.02 * typical)))
    if shared:
        return (
            f"{shared} of its {len(heights)} slices lie in the place of another (several phases, echoes or "
            "reconstructions in one series)"
        )
    even = heights[0] + np.arange(len(heights)) * (heights[-1] - heights[0]) / len(gaps)
    if np.abs(heights - even).max() <= min(max(0.05 * typical, 0.1), 0.25 * typical):
        return None
    ratios = gaps / typical
    missing = int(np.rint(ratios).sum()) - len(gaps)
    # More than there are were rather never made: two stacks in one series.
    if 0 < missing <= len(gaps) and np.abs(ratios - np.rint(ratios)).max() < 0.1:
        after = ", ".join(str(index + 1) for index in np.flatnonzero(np.rint(ratios) > 1)[:5])
        return (
            f"{missing} slice{'s are' if missing > 1 else ' is'} missing (gaps up to {gaps.max():.2f} mm, "
            f"where {typical:.2f} mm is the rule, after slice {after})"
        )
    values, counts = np.unique(gaps.round(2), return_counts=True)
    most = np.sort(np.argsort(-counts, kind="stable")[:4])
    shown = ", ".join(f"{counts[index]} of {values[index]:.2f} mm" for index in most)
    return f"its slices are unevenly spaced (gaps: {shown}{', ...' if len(values) > 4 else ''})"


def find_series(paths: Iterable[str]) -> list[str]:
    """Find the image series among files.

    A series that cannot be read or stacked is found too: whoever opens it is told why. One warning each says which
    series are left out as no volumes: scouts, derived series, other objects, copies, and single slices or slices in
    several orientations beside a series of the same study.

    Args:
        paths: Files of any kind.

    Returns:
        The addresses of the image series: its folder where it is the only one there, its file where it is one among
        others, else `folder::hash`.
    """
    series = _group(paths)
    kept, left_out = _choose(series)
    for uid, reason in left_out.items():
        warnings.warn(f"{_folder_of(series[uid])}: DICOM series {_short(uid)} left out, {reason}.", stacklevel=3)
    for uid in kept:
        beside = Counter(what for what in map(_beside_slices, series[uid]) if what)
        for what, number in beside.items():
            of = f"{number} of the {len(series[uid])} images of DICOM series {_short(uid)}"
            warnings.warn(f"{_folder_of(series[uid])}: {of} left out, {what}.", stacklevel=3)
    folders = {uid: {os.path.dirname(item.path) for item in slices} for uid, slices in kept.items()}
    num_in_folder = Counter(folder for own in folders.values() for folder in own)
    addresses: list[str] = []
    surveys: dict[str, tuple[Slice, str]] = {}
    volumes: set[tuple[object, ...]] = set()
    for uid, slices in kept.items():
        alone = len(folders[uid]) == 1 and all(num_in_folder[folder] == 1 for folder in folders[uid])
        paths = {item.path for item in slices}
        if alone:
            address = _folder_of(slices)
        elif len(paths) == 1 and read_slices(slices[0].path):
            address = slices[0].path
        else:
            address = _address(uid, slices)
        try:
            stack(slices, address)
            volumes.update(map(_look, slices))
        except DataError as error:
            if _is_survey(slices):
                surveys[address] = slices[0], str(error)
                continue
        addresses.append(address)
    studies = {look[0] for look in volumes} - {""}
    for address, (first, reason) in surveys.items():
        # A slice that looks like those beside it is rather one that they lost.
        if first.study_uid in studies and _look(first) not in volumes:
            warnings.warn(f"{reason} (Left out.)", stacklevel=3)
        else:
            addresses.append(address)
    return addresses


def _look(item: Slice) -> tuple[object, ...]:
    """What the slices of a volume share: study, folder, size and plane."""
    return (
        item.study_uid, os.path.dirname(item.path), item.rows, item.columns, item.pixel_spacing, item.orientation,
    )  # fmt: skip


def _is_survey(slices: Sequence[Slice]) -> bool:
    """Whether slices are sound by themselves, but so few or so turned as those that a scan is planned on."""
    planes = {tuple(round(value, 2) for value in item.orientation or ()) for item in slices}
    return not any(item.fault for item in slices) and (len(slices) == 1 or len(planes) > 1)


def open_series(address: str) -> Stack:
    """The slices of one series in order, with their grid; only headers are read.

    Args:
        address: A folder with one image series (in it, or else below it), `folder::hash`, or a file of many frames.

    Raises:
        DataError: There is no such folder, no image series or several, or the series cannot be stacked.
    """
    slices = _slices_of(address)
    first = slices[0]
    if first.path == address:
        reason = _no_volume(first) if first.modality or not first.fault else None
        if reason is None and len(slices) == 1 and not first.fault:
            reason = "one slice, and a volume needs all slices of its series"
        if reason:
            raise DataError(f"{address}: this DICOM file is {reason}; give a folder with the whole series.")
    return stack(slices, address)


def patient_key(address: str) -> str | None:
    """Salted hash of the patient's identifiers in a series; None where the header names nobody."""
    identity = "\n".join(read_identity(_sound_slice(address)))
    return _hash_identity(identity) if identity.strip() else None


def scanner(address: str) -> str | None:
    """Maker, model and field strength of the scanner of a series, such as ``SIEMENS Avanto, 1.5 T``.

    Returns:
        A short text; None where the header says nothing of it.
    """
    header, *_ = read_header(_sound_slice(address))
    try:
        with silenced():
            names = [str(header.get(name) or "") for name in ("Manufacturer", "ManufacturerModelName")]
            tesla = float(header.get("MagneticFieldStrength") or 0)
    except Exception:  # Values are converted when they are asked for, and raise anything; a scan is as good without.
        return None
    said = " ".join(text for text in names if text.strip().lower() not in _NOTHING)
    name = " ".join(printable(said).split())[:_MOST_LETTERS].rstrip()
    return ", ".join(filter(None, (name, f"{tesla:.2g} T" if 0 < tesla < _MOST_TESLA else ""))) or None


def _sound_slice(address: str) -> str:
    """The file of a series whose header tells of all: the first without a fault, or else the first."""
    slices = _slices_of(address)
    return next((item for item in slices if not item.fault), slices[0]).path


@lru_cache(maxsize=4096)
def _hash_identity(identity: str) -> str:
    # Slow on purpose: short numeric ids must not be found by trying all of them.
    return hashlib.pbkdf2_hmac("sha256", identity.encode(errors="surrogateescape"), _SALT, 50_000).hex()[:16]


def _short(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def _folder_of(slices: Sequence[Slice]) -> str:
    return os.path.commonpath([os.path.dirname(item.path) for item in slices])


def _address(uid: str, slices: Sequence[Slice]) -> str:
    return f"{_folder_of(slices)}::{_short(uid)}"


def _group(paths: Iterable[str]) -> Series:
    """Slices by series; a slice that is there twice (a copied folder) counts once.

    Files whose series is not known, as they cannot be read, are grouped by their folder.
    """
    series: Series = defaultdict(list)
    seen: dict[tuple[object, ...], Slice] = {}
    copies: dict[tuple[str, str], list[tuple[Slice, Slice]]] = defaultdict(list)
    unknown = []
    for path in paths:
        slices = read_slices(path)
        if not slices:
            unknown.append(path)
        for item in slices:
            first = seen.setdefault((item.series_uid, item.slice_uid, item.frame, item.position), item)
            if first.path == path:
                series[item.series_uid or os.path.realpath(os.path.dirname(path))].append(item)
            else:
                copies[os.path.dirname(path), os.path.dirname(first.path)].append((item, first))
    for (folder, original), pairs in copies.items():
        num = f"{len(pairs)} DICOM slice{'s' if len(pairs) > 1 else ''} left out"
        if any(_differ(*pair) for pair in (pairs[0], pairs[len(pairs) // 2])):
            files.warn_once(
                f"{folder}: {num}: by their UIDs they are those in {original}, but their pixels differ; give them UIDs "
                "of their own, or take away those that are not meant."
            )
        else:
            files.warn_once(
                f"{folder}: {num}, {'copies of those' if len(pairs) > 1 else 'a copy of one'} in {original}."
            )
    # What is named as slices beside it are is one, whatever is left of it: without it a series would seem whole.
    forms = {name_form(item.path) for slices in series.values() for item in slices} if unknown else set()
    for path in unknown:
        if name_form(path) in forms and (stray := read_stray(path)) is not None:
            series[os.path.realpath(os.path.dirname(path))].append(stray)
    return series


def _differ(one: Slice, other: Slice) -> bool:
    """Whether the pixels of two slices differ for certain; packed ones may differ in their packing alone."""
    if one.native_bytes is None or one.native_bytes != other.native_bytes or one.fault or other.fault:
        return False
    pixels = []
    for item in (one, other):
        try:
            with open(item.path, "rb") as stream:
                stream.seek(item.pixel_offset)
                pixels.append(stream.read(item.native_bytes or 0))
        except OSError:
            return False
    return pixels[0] != pixels[1]


def _choose(series: Series) -> tuple[Series, dict[str, str]]:
    """The image series to use, and for every other one the reason why not."""
    kept: Series = {}
    left_out: dict[str, str] = {}
    for uid, slices in series.items():
        images = [item for item in slices if _beside_slices(item) is None]
        # Of a file that cannot be read, the modality may not be known.
        known = [item for item in images if item.modality or not item.fault]
        reasons = [_no_volume(item) for item in known]
        if not images:
            left_out[uid] = _no_volume(slices[0]) or "a scout or localiser"
        elif reasons and all(reasons):
            left_out[uid] = str(reasons[0])
        else:
            kept[uid] = images
    studies = {item.study_uid for slices in kept.values() for item in slices if "DERIVED" not in item.image_type}
    for uid, slices in list(kept.items()):
        if all("DERIVED" in item.image_type for item in slices) and slices[0].study_uid in studies - {""}:
            address = _address(uid, slices)
            left_out[uid] = f"derived from an original series that is here too (name {address} to use it)"
            del kept[uid]
    _join_unknown(kept)
    return kept, left_out


def _join_unknown(kept: Series) -> None:
    """Give files that cannot be read to the series that they are named like, else to the one series in their folder.

    It may lack them, and must not seem whole.
    """
    unknown = {uid: kept.pop(uid) for uid in list(kept) if not kept[uid][0].series_uid}
    if not unknown:
        return
    folders = {uid: {os.path.dirname(item.path) for item in slices} for uid, slices in kept.items()}
    forms = {uid: {name_form(item.path) for item in slices} for uid, slices in kept.items()}
    for key, lost in unknown.items():
        left = []
        for item in lost:
            beside = [uid for uid, own in folders.items() if os.path.dirname(item.path) in own]
            alike = [uid for uid in beside if name_form(item.path) in forms[uid]] or beside
            if len(alike) == 1:
                kept[alike[0]].append(item)
            elif beside or not item.doubtful:
                left.append(item)
        if left:
            kept[key] = left


def _beside_slices(item: Slice) -> str | None:
    """What an object is that belongs to a series, but is none of its slices; None for a slice."""
    if "LOCALIZER" in item.image_type:
        return "a scout or localiser"
    # A slice that lost its size is at fault; reports and raw data have none.
    return None if item.rows or item.fault else f"an object without pixels ({item.modality or 'unknown modality'})"


def _no_volume(first: Slice) -> str | None:
    if first.modality not in VOLUME_MODALITIES:
        return f"no scan ({first.modality or 'unknown modality'})"
    if first.secondary_capture or "SECONDARY_CAPTURE" in first.image_type or "SCREEN SAVE" in first.image_type:
        return "a secondary capture"
    if not first.fault and (first.rows == 0 or first.columns == 0):
        return "no image"
    if "MOSAIC" in first.image_type:
        return "a mosaic, all slices of a volume as tiles of one image"
    if not first.colours.startswith("MONOCHROME") and first.num_values == 1:
        return f"a colour image ({first.colours})"
    return f"a colour image ({first.num_values} values per pixel)" if first.num_values != 1 else None


def _slices_of(address: str) -> list[Slice]:
    """The slices of the one image series that an address names."""
    folder, wanted = split_series(address)
    if os.path.isfile(address):
        return list(read_slices(address))
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; check the path and that the disk is mounted.")
    if wanted:
        series = _group(files.walk(folder))
        found = {uid: slices for uid, slices in series.items() if _short(uid) == wanted}
        # Named in full, a derived series is what the user wants; scouts and captures stay out.
        kept = {uid: slices for uid, slices in _choose(series)[0].items() if uid in found} or _choose(found)[0]
    else:
        try:
            names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be read ({error.strerror}).") from error
        direct = [path for path in (os.path.join(folder, name) for name in names) if not os.path.isdir(path)]
        kept = _choose(_group(direct))[0] or _choose(_group(files.walk(folder)))[0]
    if not kept:
        what = f"DICOM image series {wanted}" if wanted else "DICOM image series"
        raise DataError(f"{folder}: there is no {what} in this folder; check the path.")
    if len(kept) > 1:
        known = ", ".join(_address(uid, slices) for uid, slices in sorted(kept.items()))
        raise DataError(f"{folder}: {len(kept)} DICOM image series are in this folder; name one of {known}.")
    return next(iter(kept.values()))
