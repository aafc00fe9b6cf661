"""DICOM series: found in a tree by their headers, told apart, put in order, and read."""

import hashlib
import os
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans import files
from mim3d.scans.dicom.headers import read_header, read_slices
from mim3d.scans.dicom.stacks import Slice, Stack, stack
from mim3d.scans.grids import smallest_integer
from mim3d.scans.itk import simple_itk
from mim3d.scans.voxel_copies import slices_at_once

#: Modalities whose series are scans of the body's inside in parallel slices.
VOLUME_MODALITIES = ("CT", "MR", "PT")

#: Makes a patient's hash useless for a look-up in tables of hashes made elsewhere.
_SALT = b"mim3d patient key"

Series = dict[str, list[Slice]]


def find_series(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Addresses of the image series among files, and a sentence for each series that cannot be stacked.

    Every series left out is told in one warning: scouts, derived series, other objects, copies, refusals.
    """
    series = _group(paths)
    kept, left_out = _choose(series)
    for uid, reason in left_out.items():
        warnings.warn(f"{_folder_of(series[uid])}: DICOM series {_short(uid)} left out, {reason}.", stacklevel=3)
    num_in_folder: dict[str, int] = defaultdict(int)
    for slices in kept.values():
        for folder in {os.path.dirname(item.path) for item in slices}:
            num_in_folder[folder] += 1
    addresses, refused = [], []
    for uid, slices in kept.items():
        folders = {os.path.dirname(item.path) for item in slices}
        alone = len(folders) == 1 and num_in_folder[next(iter(folders))] == 1
        address = _folder_of(slices) if alone else f"{_folder_of(slices)}::{_short(uid)}"
        try:
            _checked_stack(slices, address)
        except DataError as error:
            refused.append(str(error))
            warnings.warn(f"{error} (Left out.)", stacklevel=3)
        else:
            addresses.append(address)
    return addresses, refused


def read_stack(address: str) -> Stack:
    """The slices of one series in order, with their grid; headers only.

    Args:
        address: a folder with one image series (in it, or else below it), or `folder::hash`.

    Raises:
        DataError: no such folder, no image series or several, or a series that cannot be stacked.
    """
    return _checked_stack(_resolve(address), address)


def read_slabs(found: Stack) -> Iterator[npt.NDArray[Any]]:
    """Voxels in stored axis order (column, row, some slices), rescaled (HU for CT), in a buffer used again.

    int16 where the rescaled values are whole and fit, int32 where they are whole, else float32.

    Raises:
        DataError: pixels that cannot be decoded, or that differ in size from their header.
    """
    whole = all(item.slope.is_integer() and item.intercept.is_integer() for item in found.slices)
    columns, rows, num_slices = found.grid.shape
    num_at_once = min(slices_at_once(columns * rows), num_slices)
    buffer: npt.NDArray[Any] = np.empty((num_at_once, rows, columns), dtype=np.int16 if whole else np.float32)
    frames: npt.NDArray[Any] = np.empty((0, rows, columns))
    loaded = ""
    for index, item in enumerate(found.slices):
        if item.path != loaded:
            frames, loaded = _decode(item), item.path
        if whole:
            low, high = int(frames.min()), int(frames.max())
            needed = np.promote_types(buffer.dtype, smallest_integer(low, high))
            buffer = buffer.astype(needed, copy=False)
        place = index % num_at_once
        buffer[place] = frames[item.frame or 0]
        if place == num_at_once - 1 or index == num_slices - 1:
            yield buffer[: place + 1].T


def patient_key(address: str) -> str | None:
    """Salted hash of the patient's identifiers in a series; None where the header names nobody."""
    header, _ = read_header(_resolve(address)[0].path)
    names = ("PatientID", "IssuerOfPatientID") if header.get("PatientID") else ("PatientName", "PatientBirthDate")
    identity = "\n".join(str(header.get(name) or "").strip() for name in names)
    return _hash_identity(identity) if identity.strip() else None


@lru_cache(maxsize=4096)
def _hash_identity(identity: str) -> str:
    # Slow on purpose: short numeric ids must not be found by trying all of them.
    return hashlib.pbkdf2_hmac("sha256", identity.encode(), _SALT, 50_000).hex()[:16]


def _short(uid: str) -> str:
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def _folder_of(slices: Sequence[Slice]) -> str:
    return os.path.commonpath([os.path.dirname(item.path) for item in slices]) if slices else ""


def _group(paths: Iterable[str]) -> Series:
    """Slices by series; a slice that is there twice (a copied folder) counts once."""
    series: Series = defaultdict(list)
    seen: dict[tuple[str, int | None], str] = {}
    copies: dict[tuple[str, str], int] = defaultdict(int)
    for path in paths:
        for item in read_slices(path):
            first = seen.setdefault((item.slice_uid, item.frame), path)
            if first == path:
                series[item.series_uid].append(item)
            else:
                copies[os.path.dirname(path), os.path.dirname(first)] += 1
    for (folder, original), count in copies.items():
        warnings.warn(f"{folder}: {count} DICOM slices left out, copies of those in {original}.", stacklevel=4)
    return series


def _choose(series: Series) -> tuple[Series, dict[str, str]]:
    """The image series to use, and for every other one the reason why not."""
    kept: Series = {}
    left_out: dict[str, str] = {}
    for uid, slices in series.items():
        images = [item for item in slices if "LOCALIZER" not in item.image_type]
        reason = _no_volume(slices[0]) if images else "a scout or localiser"
        if reason:
            left_out[uid] = reason
        else:
            kept[uid] = images
    studies = {item.study_uid for slices in kept.values() for item in slices if "DERIVED" not in item.image_type}
    for uid, slices in list(kept.items()):
        if all("DERIVED" in item.image_type for item in slices) and slices[0].study_uid in studies - {""}:
            address = f"{_folder_of(slices)}::{_short(uid)}"
            left_out[uid] = f"derived from an original series that is here too (name {address} to use it)"
            del kept[uid]
    return kept, left_out


def _no_volume(first: Slice) -> str | None:
    if first.modality not in VOLUME_MODALITIES:
        return f"no scan ({first.modality or 'unknown modality'})"
    if first.secondary_capture or "SECONDARY_CAPTURE" in first.image_type or "SCREEN SAVE" in first.image_type:
        return "a secondary capture"
    if first.rows == 0 or first.columns == 0:
        return "no image"
    return f"a colour image ({first.num_values} values per pixel)" if first.num_values != 1 else None


def _resolve(address: str) -> list[Slice]:
    folder, _, wanted = address.partition("::")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; check the path and that the disk is mounted.")
    direct = (entry.path for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if entry.is_file())
    if wanted:
        found = {uid: slices for uid, slices in _group(files.walk(folder)).items() if _short(uid) == wanted}
        # Named in full, a derived series is what the user wants; scouts and captures stay out.
        kept = {uid: _choose({uid: slices})[0].get(uid, []) for uid, slices in found.items()}
        kept = {uid: slices for uid, slices in kept.items() if slices}
    else:
        kept = _choose(_group(direct))[0] or _choose(_group(files.walk(folder)))[0]
    if not kept:
        what = f"DICOM image series {wanted}" if wanted else "DICOM image series"
        raise DataError(f"{folder}: there is no {what} in this folder; check the path.")
    if len(kept) > 1:
        known = ", ".join(f"{_folder_of(slices)}::{_short(uid)}" for uid, slices in sorted(kept.items()))
        raise DataError(f"{folder}: {len(kept)} DICOM image series are in this folder; name one of {known}.")
    return next(iter(kept.values()))


def _checked_stack(slices: Sequence[Slice], name: str) -> Stack:
    found = stack(slices, name)
    if slices[0].frame is not None and len({(item.slope, item.intercept) for item in slices}) > 1:
        raise DataError(f"{name}: the frames of the DICOM file are rescaled in different ways; export single slices.")
    files.check_memory(name, found.grid.shape, max(item.itemsize for item in slices))
    for item in slices:
        if item.native_bytes is not None:
            files.check_raw(item.path, item.pixel_offset, item.native_bytes)
    return found


def _decode(item: Slice) -> npt.NDArray[Any]:
    """(frame, row, column) of one file; SimpleITK unpacks compressed syntaxes and rescales."""
    sitk = simple_itk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(item.path)
    try:
        pixels: npt.NDArray[Any] = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise DataError(
            f"{item.path}: the pixels cannot be decoded ({reason}); copy the series again from its source."
        ) from error
    frames = pixels.reshape((-1, *pixels.shape[-2:]))
    if frames.shape[-2:] != (item.rows, item.columns):
        raise DataError(f"{item.path}: the pixels differ in size from the header; copy the series again.")
    return frames
