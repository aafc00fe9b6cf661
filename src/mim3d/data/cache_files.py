"""Where things lie in a cache folder, and how they get there whole.

::

    cache.json     the settings, written first
    index.json     every cached case with its card, written last; a cache without it is unfinished
    failed.json    scans that could not be used, each with the reason
    digests.json   SHA-256 of source files by size and times, so that a second run need not read them
    cases/ID.KEY   one folder per case, KEY being the digest of its sources and settings:
                   image/0, image/1, ... (each resolution), label, locations.npz, card.json
    unfinished/    cases being written; renamed to cases/ when complete
    lock           held while a build runs
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mim3d.errors import DataError

FORMAT = "mim3d-cache"
VERSION = 2
SETTINGS = "cache.json"
INDEX = "index.json"
FAILED = "failed.json"
DIGESTS = "digests.json"
CASES = "cases"
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
    part = f"{path}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
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


def sync_folder(path: str) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(path: str) -> None:
    """Make every file and name below a folder survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            handle = os.open(os.path.join(folder, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(folder)


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
