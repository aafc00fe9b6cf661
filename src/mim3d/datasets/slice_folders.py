"""Trees of scans published as pictures, one folder per scan, as cases with their class and patient."""

import os
import re
from collections.abc import Iterator

from mim3d.core.errors import DataError
from mim3d.datasets.ids import Entry, to_cases
from mim3d.datasets.records import CaseSet
from mim3d.scans.image_stacks import SLICE_SUFFIXES, is_slice, natural


def read_slice_folders(root: str | os.PathLike[str]) -> CaseSet:
    """Cases of a tree of pictures, ``class/patient/scan/1.png`` or ``class/scan/1.png``, as CC-CCII is published.

    The first folder below ``root`` names the class, the second the patient; ids are made of all of them. No picture is
    opened.

    Raises:
        DataError: no such folder, pictures that lie in no folder of a class, or no folder of pictures at all.
    """
    top = os.path.abspath(root)
    if not os.path.isdir(top):
        raise DataError(f"{top}: no such folder; check the path and that the disk is mounted.")
    entries = [_entry(folder, top) for folder in _slice_folders(top)]
    if not entries:
        raise DataError(
            f"{top}: no folder of slices; expected pictures ({', '.join(SLICE_SUFFIXES)}) as class/patient/scan/1.png."
        )
    return CaseSet(root=top, form="slices", cases=to_cases(entries, top), labels={})


def _slice_folders(root: str) -> Iterator[str]:
    """Every folder of pictures below ``root``, in natural order; hidden ones are not entered."""
    for folder, names, found in os.walk(root):
        names[:] = sorted((name for name in names if not name.startswith(".")), key=natural)
        if any(is_slice(name) for name in found):
            yield folder


def _entry(folder: str, root: str) -> Entry:
    parts = os.path.relpath(folder, root).split(os.sep)
    if len(parts) < 2:
        raise DataError(
            f"{folder}: pictures lie here, but a scan needs a folder of its own in that of its class "
            "(class/patient/scan/1.png); move them, or give the folder above."
        )
    name = re.sub(r"[^\w.-]+", "-", "_".join(parts))
    return Entry(images=(folder,), class_name=parts[0], patient=parts[1], id=name)
