"""From paths to cases: unique, file-name-safe ids and the patient behind each scan."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mim3d.core.errors import DataError
from mim3d.datasets.records import Case
from mim3d.scans.volumes import patient_of, scan_id


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A case before it has an id: absolute paths, and what the source declares about it."""

    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str | None = None
    split: str | None = None
    id: str | None = None
    labelled: tuple[str, ...] | None = None


def to_cases(entries: Sequence[Entry], root: str) -> tuple[Case, ...]:
    """Give every entry its id and patient.

    An id is the scan's file name without suffixes; scans that share one (``a/ct.nii.gz``, ``b/ct.nii.gz``)
    are told apart by their path below ``root``. The patient is the declared one, else the salted hash of a
    DICOM series, else the id.

    Raises:
        DataError: The same image is listed twice.
    """
    _refuse_repeated_images(entries, root)
    ids = unique_ids(entries, root)
    return tuple(
        Case(
            id=case_id,
            images=entry.images,
            label=entry.label,
            class_name=entry.class_name,
            patient=entry.patient or _dicom_patient(entry.images[0]) or case_id,
            split=entry.split,
            labelled=entry.labelled,
        )
        for case_id, entry in zip(ids, entries, strict=True)
    )


def _refuse_repeated_images(entries: Sequence[Entry], root: str) -> None:
    first_row: dict[tuple[str, ...], int] = {}
    for row, entry in enumerate(entries, start=1):
        if entry.images in first_row:
            raise DataError(
                f"{root}: entries {first_row[entry.images]} and {row} are the same image {entry.images[0]}; "
                "list every image once."
            )
        first_row[entry.images] = row


def unique_ids(entries: Sequence[Entry], root: str) -> list[str]:
    """File-name ids; clashing ones (case is ignored, as some file systems do) become path ids.

    Raises:
        DataError: Two entries that would still share an id.
    """
    ids = [entry.id or scan_id(entry.images[0]) for entry in entries]
    rows = defaultdict(list)
    for row, name in enumerate(ids):
        rows[name.casefold()].append(row)
    for clashing in rows.values():
        if len(clashing) > 1:
            for row in clashing:
                ids[row] = _path_id(entries[row].images[0], root)
    first: dict[str, int] = {}
    for row, name in enumerate(ids):
        if name.casefold() in first:
            other = entries[first[name.casefold()]].images[0]
            raise DataError(f"{root}: {other} and {entries[row].images[0]} would both get the id {name!r}; rename one.")
        first[name.casefold()] = row
    return ids


def _path_id(path: str, root: str) -> str:
    base = root if os.path.isdir(root) else os.path.dirname(root)
    folder = os.path.dirname(os.path.relpath(path, base))
    parts = [part for part in folder.split(os.sep) if part not in ("", ".", "..")]
    return re.sub(r"[^\w.-]+", "-", "_".join([*parts, scan_id(path)]))


def _dicom_patient(path: str) -> str | None:
    """The hashed patient of a DICOM series; other files hold no patient worth opening them for."""
    if "::" in path or os.path.isdir(path):
        try:
            return patient_of(path)
        except DataError:
            return None
    return None
