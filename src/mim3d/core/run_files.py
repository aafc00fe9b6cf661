"""The files of a run folder: JSON that appears whole, lines that survive a kill, and a lock."""

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mim3d.core.errors import ConfigError, Mim3dError

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
_LEAST_FREE_BYTES = 50 * 2**20
_LOCK_PATIENCE_S = 3.0
_PICTURES = re.compile(r"step_(\d{8})\.npz")


def is_first_process() -> bool:
    """Whether no launcher says that this is a further process of a distributed run."""
    ranks = [os.environ.get(name, "0") for name in _RANKS]
    return not any(rank.isdigit() and int(rank) > 0 for rank in ranks)


def picture_files(path: Path) -> dict[int, Path]:
    """The picture files of a run folder by step, first to last."""
    matches = [(_PICTURES.fullmatch(file.name), file) for file in (path / "pictures").glob("step_*.npz")]
    return dict(sorted((int(match[1]), file) for match, file in matches if match))


def try_lock(descriptor: int) -> bool:
    """Try to lock an open file; the system lets go of it when the process ends, however it ends.

    The readers of a trainer that was killed end a moment after it, and hold its lock until then: that is waited for.
    """
    if os.name == "nt":
        return True
    import fcntl

    end = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        except OSError:
            # Some network file systems know no locks; a run there is worth more than the guard.
            return True
        else:
            return True


def require_usable(path: Path) -> None:
    """Make the folder ``path`` and prove that it can be written to.

    Raises:
        ConfigError: when it is a file, holds something else than a run, cannot be written to, or its disk is full.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; choose a folder as --out.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        # A kill while a run was being made leaves at most hidden files.
        visible = any(not entry.name.startswith(".") for entry in path.iterdir())
        foreign = visible and not (path / "manifest.json").is_file()
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe"):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written to ({error.strerror}); choose another --out.") from error
    if foreign:
        raise ConfigError(f"{path} is not empty and holds no run; choose another --out, or an empty folder.")
    free = shutil.disk_usage(path).free
    if free < _LEAST_FREE_BYTES:
        raise ConfigError(
            f"{path} has {free / 2**20:.0f} MiB of free space, less than the "
            f"{_LEAST_FREE_BYTES / 2**20:.0f} MiB that any run needs; free some, or choose another --out."
        )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failing disk into a sentence.

    Raises:
        Mim3dError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise Mim3dError(
            f"{path} could not be written ({error.strerror}); what is there is kept. Free some space, or repair "
            "the disk, and go on with --resume true."
        ) from error


def finite_or_none(value: float) -> float | None:
    """A number that JSON knows; None for one that is not finite."""
    number = float(value)
    return number if np.isfinite(number) else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a run.

    Raises:
        ConfigError: when it cannot be read, or was written by something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {"command", "settings", "inputs"} <= content.keys():
        raise ConfigError(f"{path} is no manifest of a run of mim3d; choose another folder.")
    return content


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last one that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON; the file appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text; the file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
