"""Folders that appear whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mim3d.core.errors import ConfigError, DataError

#: Of each format a file, below its folder, by which an earlier export is known.
MARKS = ("card.json", "metadata.json", "configs/metadata.json")


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds anything else, before any work begins.

    Raises:
        ConfigError: a file, or a folder that is not empty: an earlier export without ``overwrite``, or other things.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; choose another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in MARKS) or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds other things than an export; choose another --out.")
    if not overwrite:
        raise ConfigError(f"{folder} holds an export already; choose another --out, or use --overwrite true.")


@contextmanager
def written_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; it takes the place of ``folder`` once all is written, or nothing changes.

    Raises:
        DataError: the disk is full or may not be written to.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(f"{folder} cannot be written to ({error.strerror}); choose another --out.") from None
    new = scratch / "new"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, scratch / "old")
        try:
            os.replace(new, folder)
        except OSError:
            if (scratch / "old").exists():
                os.replace(scratch / "old", folder)
            raise
    except OSError as error:
        raise DataError(f"{folder}: writing failed ({error.strerror or error}); nothing was changed.") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def require_packages(names: Sequence[str], what: str, extra: str) -> None:
    """Refuse where packages are not installed.

    Raises:
        ConfigError: naming them, and how to install them.
    """
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}; install with: "
            f"pip install 'mim3d[{extra}]'."
        )
