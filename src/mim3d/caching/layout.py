"""Where things lie in a cache folder, and how they get there whole.

::

    cache.json        the settings, written first
    manifest.parquet  every cached case with its card and its place, written last; a cache without it is unfinished
    failed.csv        scans that could not be used, each with the reason
    digests.json      SHA-256 of source files by size and times, so that a second run need not read them
    cases/ID.KEY/     one folder per case, KEY being the digest of its sources and settings: a zarr group of
                      image/0, image/1, ... (each resolution) and label, with locations.npz and card.json
    packs/            instead of cases/ where asked for: such folders in files of some GB, see mim3d.caching.packs
    unfinished/       cases and packs being written; renamed into place when complete
    lock              held while a build runs
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mim3d.core.errors import DataError

FORMAT = "mim3d-cache"
VERSION = 3
SETTINGS = "cache.json"
MANIFEST = "manifest.parquet"
FAILED = "failed.csv"
FAILED_COLUMNS = ("id", "images", "label", "reason")
DIGESTS = "digests.json"
CASES = "cases"
PACKS = "packs"
UNFINISHED = "unfinished"
IMAGE = "image"
LABEL = "label"
LOCATIONS = "locations.npz"
CARD = "card.json"
LOCK = "lock"


def write_json(path: str, content: Any) -> None:
    """Write a JSON file so that it is there whole or not at all, also after a power cut.

    Raises:
        OSError: The disk is full or not writable.
    """
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    with durably_written(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text + "\n")


@contextmanager
def durably_written(path: str) -> Iterator[str]:
    """A name to write a file under that becomes ``path`` once all of it is on the disk; nothing is left of a failure.

    Raises:
        OSError: The disk is full or not writable.
    """
    part = f"{path}.part"
    try:
        yield part
        sync_file(part)
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.remove(part)
        raise
    sync_folder(os.path.dirname(path))


def read_json(path: str) -> Any:
    """Read one of the cache's own JSON files.

    Raises:
        DataError: Missing or damaged.
    """
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged ({error}); run `mim3d cache` again to rebuild it.") from error


def sync_file(path: str) -> None:
    """Bring a file's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: str) -> None:
    """Make the names in a folder survive a power cut."""
    sync_file(path)


def sync_tree(path: str) -> None:
    """Make every file and name below a folder survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(os.path.join(folder, name))
        sync_folder(folder)


def remove_case(path: str) -> None:
    """Remove a case's folder; what is left of it after a power cut does not pass for finished."""
    with suppress(OSError):
        os.remove(os.path.join(path, CARD))
    shutil.rmtree(path, ignore_errors=True)


def size_bytes(path: str) -> int:
    """Bytes of all files below a folder."""
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)


@contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold a cache folder for one build; the lock falls with the process, however it ends.

    Raises:
        DataError: Another build holds it.
    """
    import fcntl

    handle = os.open(os.path.join(path, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems know no locks; without one a build still writes nothing by halves.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise DataError(f"{path}: another process is building this cache; wait for it to end.") from error
        yield
    finally:
        os.close(handle)
