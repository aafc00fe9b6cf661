"""What a source declares about each case, and an id for each that can be the name of a file."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from mim3d.core.errors import DataError
from mim3d.scans.volumes import scan_id


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A case as a list or folder declares it, before it has an id and a patient.

    Attributes:
        images: Absolute path of each channel.
        label: Absolute path of the label map, or None.
        class_name: Class of the whole scan, or None.
        patient: Name of the patient, or None where the source does not say.
        split: Declared part, "train", "val" or "test", or None.
        id: Declared id, or None.
        labelled: Labels, by name or value, that the label map has annotations of; None stands for all.
    """

    images: tuple[str, ...]
    label: str | None = None
    class_name: str | None = None
    patient: str | None = None
    split: str | None = None
    id: str | None = None
    labelled: tuple[str, ...] | None = None


def unique_ids(entries: Sequence[Entry], root: str) -> list[str]:
    """An id for each entry: the declared one, or the file name of the scan without suffixes.

    Scans that share an id (``a/ct.nii.gz``, ``b/ct.nii.gz``) get one from their path below ``root`` instead. Upper and
    lower case count as equal, as some file systems ignore the difference.

    Raises:
        DataError: Two entries would still share an id.
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
