"""SHA-256 of a scan's source files, computed once per file: what makes a changed file change its cache entry."""

import hashlib
import os
from collections.abc import Iterable

from mim3d.core.errors import DataError
from mim3d.scans.files import check_file
from mim3d.scans.grids import split_channel
from mim3d.scans.image_stacks import is_slice_folder, slice_paths

#: What distinguishes a file from a later one under the same path: size, mtime, ctime (ns) and inode.
Stamp = tuple[int, int, int, int]

#: Path -> stamp and SHA-256 of the file as it was then.
DigestMemo = dict[str, tuple[Stamp, str]]


def source_files(path: str) -> list[str]:
    """Every file a scan is read from: itself, the voxels of a detached header, or the slices of a series.

    Raises:
        DataError: A file or series is missing.
    """
    path, _ = split_channel(path)
    if "::" not in path and is_slice_folder(path):
        return slice_paths(path)
    if "::" in path or os.path.isdir(path):
        from mim3d.scans.dicom.series import open_series

        return sorted({item.path for item in open_series(path).slices})
    check_file(path)
    lower = path.lower()
    if lower.endswith(".nhdr"):
        return [path, *_detached(path, ("data file:", "datafile:"))]
    if lower.endswith(".mhd"):
        return [path, *_detached(path, ("elementdatafile",))]
    return [path]


def _detached(path: str, keys: tuple[str, ...]) -> list[str]:
    """Files that a text header points at; all files beside it where it names a list or a pattern."""
    folder = os.path.dirname(path)
    with open(path, encoding="latin-1") as lines:
        for line in lines:
            if line.lower().startswith(keys):
                name = line[len(next(key for key in keys if line.lower().startswith(key))) :].strip(" =\t\r\n")
                target = os.path.join(folder, name)
                if os.path.isfile(target):
                    return [target]
                beside = (os.path.join(folder, other) for other in sorted(os.listdir(folder)))
                return [other for other in beside if other != path and os.path.isfile(other)]
    return []


def stamp_of(path: str) -> Stamp:
    """The stamp of a file as it is now."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def digest_files(paths: Iterable[str], memo: DigestMemo) -> tuple[str, DigestMemo]:
    """One SHA-256 over the contents of files, in order; files whose stamp stands in ``memo`` are not read.

    Returns:
        The digest, and the memo entries of these files.
    """
    whole = hashlib.sha256()
    entries: DigestMemo = {}
    for path in paths:
        stamp = stamp_of(path)
        known = memo.get(path)
        if known is None or known[0] != stamp:
            with open(path, "rb") as file:
                known = (stamp, hashlib.file_digest(file, "sha256").hexdigest())
        entries[path] = known
        whole.update(known[1].encode())
    return whole.hexdigest(), entries


def require_unchanged(entries: DigestMemo) -> None:
    """Refuse files that changed since their digest was taken.

    Raises:
        DataError: A file changed; the sentence names it.
    """
    for path, (stamp, _) in entries.items():
        if stamp_of(path) != stamp:
            raise DataError(f"{path}: changed while it was being read; run again once it is complete.")
