"""DICOM series: found in a tree by their headers, separated from each other, and opened by their address."""

import hashlib
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

from mim3d.core.errors import DataError
from mim3d.scans.dicom.headers import Slice, read_header, read_slices
from mim3d.scans.dicom.stacks import Stack, stack
from mim3d.scans.files import walk

#: Modalities whose series are scans of the body's inside in parallel slices.
VOLUME_MODALITIES = ("CT", "MR", "PT")

#: Makes a patient's hash useless for a look-up in tables of hashes made elsewhere.
_SALT = b"mim3d patient key"

#: Series instance UID -> slices in any order.
Series = dict[str, list[Slice]]


def find_series(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Find the image series among files.

    One warning each says which series are left out and why: scouts, derived series, other objects, copies, and series
    that cannot be stacked.

    Args:
        paths: Files of any kind.

    Returns:
        The addresses of the image series, and a sentence for each series that cannot be stacked.
    """
    series = _group(paths)
    kept, left_out = _choose(series)
    for uid, reason in left_out.items():
        warnings.warn(f"{_folder_of(series[uid])}: DICOM series {_short(uid)} left out, {reason}.", stacklevel=3)
    folders = {uid: {os.path.dirname(item.path) for item in slices} for uid, slices in kept.items()}
    num_in_folder = Counter(folder for own in folders.values() for folder in own)
    addresses, refused = [], []
    for uid, slices in kept.items():
        alone = len(folders[uid]) == 1 and all(num_in_folder[folder] == 1 for folder in folders[uid])
        address = _folder_of(slices) if alone else _address(uid, slices)
        try:
            stack(slices, address)
        except DataError as error:
            refused.append(str(error))
            warnings.warn(f"{error} (Left out.)", stacklevel=3)
        else:
            addresses.append(address)
    return addresses, refused


def open_series(address: str) -> Stack:
    """The slices of one series in order, with their grid; only headers are read.

    Args:
        address: A folder with one image series (in it, or else below it), or `folder::hash`.

    Raises:
        DataError: There is no such folder, no image series or several, or the series cannot be stacked.
    """
    return stack(_slices_of(address), address)


def patient_key(address: str) -> str | None:
    """Salted hash of the patient's identifiers in a series; None where the header names nobody."""
    header, _ = read_header(_slices_of(address)[0].path)
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
    return os.path.commonpath([os.path.dirname(item.path) for item in slices])


def _address(uid: str, slices: Sequence[Slice]) -> str:
    return f"{_folder_of(slices)}::{_short(uid)}"


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
            address = _address(uid, slices)
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


def _slices_of(address: str) -> list[Slice]:
    """The slices of the one image series that an address names."""
    folder, _, wanted = address.partition("::")
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder; check the path and that the disk is mounted.")
    if wanted:
        found = {uid: slices for uid, slices in _group(walk(folder)).items() if _short(uid) == wanted}
        # Named in full, a derived series is what the user wants; scouts and captures stay out.
        kept = _choose(found)[0]
    else:
        direct = (entry.path for entry in sorted(os.scandir(folder), key=lambda entry: entry.name) if entry.is_file())
        kept = _choose(_group(direct))[0] or _choose(_group(walk(folder)))[0]
    if not kept:
        what = f"DICOM image series {wanted}" if wanted else "DICOM image series"
        raise DataError(f"{folder}: there is no {what} in this folder; check the path.")
    if len(kept) > 1:
        known = ", ".join(_address(uid, slices) for uid, slices in sorted(kept.items()))
        raise DataError(f"{folder}: {len(kept)} DICOM image series are in this folder; name one of {known}.")
    return next(iter(kept.values()))
