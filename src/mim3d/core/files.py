"""Files and folders that appear whole or not at all.

What is written lies in a scratch folder beside its target until it is complete, and is then renamed into place. A kill
leaves at most a scratch folder behind, named ``.*.partial``.
"""

import csv
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from mim3d.core.errors import DataError, Mim3dError
from mim3d.core.names import as_cell, from_cell

#: End of the sentence about a write that failed, where the caller knows no better one.
REMEDY = "nothing was changed. If the folder is full or not writable, choose another."

_SUFFIX = ".partial"

#: What writers in Rust and C++ (safetensors, torch) say of a write that the system refused.
_DISK_FAILED = re.compile(r"\(os error \d+\)|No space left on device|PytorchStreamWriter failed writing|unexpected pos")


@contextmanager
def explained_write(path: str | os.PathLike[str], remedy: str | None = REMEDY) -> Iterator[None]:
    """Turn the error of a failing disk into a sentence: an OSError, or what writers in other languages make of it.

    Args:
        path: File or folder that is being written.
        remedy: End of the sentence. None passes the OSError on as it is.

    Raises:
        DataError: In place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if remedy is None:
            raise
        raise DataError(f"{os.fspath(path)} could not be written ({error.strerror or error}); {remedy}") from error
    except Exception as error:
        if remedy is None or isinstance(error, Mim3dError) or _DISK_FAILED.search(str(error)) is None:
            raise
        number = re.search(r"\(os error (\d+)\)", str(error))
        said = os.strerror(int(number[1])) if number else "No space left on device, or it failed"
        raise DataError(f"{os.fspath(path)} could not be written ({said}); {remedy}") from error


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, durable: bool = False, remedy: str | None = REMEDY) -> Iterator[Path]:
    """Give a path to write to; what is written there takes the place of ``path`` once the block has ended well.

    A format of several files may write them all beside the given path. They are moved before ``path`` itself, so that
    a header never names voxels that are not there.

    Args:
        path: File to be written. Missing folders above it are made.
        durable: Whether the file and its name are on the disk when the block has ended, even if the power fails then.
        remedy: End of the sentence about a failure. None passes an OSError on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
    """
    target = Path(path)
    with explained_write(path, remedy), _scratch_folder(target) as scratch:
        yield scratch / target.name
        parts = sorted(scratch.iterdir(), key=lambda part: part.name == target.name)
        for part in parts if durable else ():
            sync(part)
        for part in parts:
            os.replace(part, target.parent / part.name)
        if durable:
            sync(target.parent)


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, remedy: str | None = REMEDY) -> Iterator[Path]:
    """Give a folder to write into; it takes the place of ``path`` once the block has ended well.

    Args:
        path: Folder to be written. One that is there is replaced as a whole. Missing folders above it are made.
        remedy: End of the sentence about a failure. None passes an OSError on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
    """
    target = Path(path)
    with explained_write(path, remedy), _scratch_folder(target) as scratch:
        new, old = scratch / "new", scratch / "old"
        new.mkdir()
        yield new
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except BaseException:
            if old.exists():
                os.replace(old, target)
            raise


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=".", suffix=_SUFFIX, dir=target.parent, ignore_cleanup_errors=True
        ) as path:
            yield Path(path)
    except BaseException:
        # The nearest first; one that holds something stays, and so do those above it.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Remove what killed processes left unfinished in a folder that no other process writes to."""
    for path in Path(folder).glob(f".*{_SUFFIX}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def plain_text(path: str | os.PathLike[str], encoding: str = "utf-8") -> str:
    """The text of a regular file, its line ends as they are.

    Raises:
        OSError: The file cannot be read, or is a pipe or a device, which may never end.
        UnicodeDecodeError: It is not of this encoding.
    """
    require_regular(path)
    with open(path, encoding=encoding, newline="") as file:
        return file.read()


def require_regular(path: str | os.PathLike[str]) -> None:
    """Refuse a pipe, a device or a folder in the place of a file: opening it may never end.

    Raises:
        OSError: It is there, and no regular file.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError("it is no regular file")


def load_json(path: str | os.PathLike[str], encoding: str = "utf-8") -> Any:
    """The content of a JSON file that anybody may have written.

    Raises:
        OSError: The file cannot be read, or is no regular file.
        ValueError: It is not JSON, or one thing lies in another too many times.
    """
    try:
        return json.loads(plain_text(path, encoding))
    except RecursionError as error:
        raise ValueError("one thing in another too many times") from error


def read_json(path: str) -> Any:
    """Read a JSON file, with or without a byte order mark.

    Raises:
        DataError: The file cannot be read or is not JSON; the sentence names the line.
    """
    try:
        return load_json(path, "utf-8-sig")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}); correct it there.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}).") from error


def write_text(path: str | os.PathLike[str], text: str, *, remedy: str | None = REMEDY) -> None:
    """Write text as UTF-8 so that the file is there whole or not at all, even after a power cut.

    Args:
        path: File to be written.
        text: Its content.
        remedy: End of the sentence about a failure. None passes an OSError on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
    """
    with atomic_file(path, durable=True, remedy=remedy) as part:
        part.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike[str], content: Any, *, indent: int = 2, allow_nan: bool = True, remedy: str | None = REMEDY
) -> None:
    """Write JSON so that the file is there whole or not at all, even after a power cut.

    Args:
        path: File to be written.
        content: Dicts, lists and scalars.
        indent: Number of spaces that each level is indented by.
        allow_nan: Whether numbers that are not finite are written as ``NaN`` and ``Infinity``.
        remedy: End of the sentence about a failure. None passes an OSError on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
        ValueError: A number is not finite, and ``allow_nan`` is false.
    """
    text = json.dumps(content, indent=indent, allow_nan=allow_nan)
    write_text(path, f"{text}\n", remedy=remedy)


def write_csv(
    path: str | os.PathLike[str], head: Sequence[str], rows: Iterable[Sequence[Any]], *, remedy: str | None = REMEDY
) -> None:
    """Write a table as CSV so that the file is there whole or not at all, even after a power cut.

    Args:
        path: File to be written.
        head: Names of the columns.
        rows: Cells of each row. None is written as an empty cell, and text so that no spreadsheet takes it for a
            formula and no terminal for a command (``core/names.py``); ``read_csv`` undoes the former.
        remedy: End of the sentence about a failure. None passes an OSError on as it is.

    Raises:
        DataError: The folder cannot be written to, or the disk is full. Nothing was changed.
    """
    with (
        atomic_file(path, durable=True, remedy=remedy) as part,
        open(part, "w", encoding="utf-8", newline="") as file,
    ):
        _write_rows(file, head, rows)


def csv_text(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The text of the file that ``write_csv`` makes."""
    file = io.StringIO(newline="")
    _write_rows(file, head, rows)
    return file.getvalue()


def _write_rows(file: TextIO, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    table = csv.writer(file)
    table.writerows([as_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in (head, *rows))


def read_csv(path: str | os.PathLike[str]) -> list[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, as ``write_csv`` got them, each with the number of its last line.

    Columns are separated by commas; by ``;`` or tabs where the first line has those alone, as spreadsheets write them.

    Raises:
        DataError: The file cannot be read as CSV.
    """
    try:
        text = plain_text(path, "utf-8-sig")
        first, *_ = text.lstrip().splitlines() or [""]
        mark = next((mark for mark in ",;\t" if mark in first), ",")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=mark)
        rows = ((reader.line_num, [from_cell(cell) for cell in row]) for row in reader)
        return [(line, row) for line, row in rows if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV in UTF-8 ({error}).") from error


def sync(path: str | os.PathLike[str]) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    # Folders cannot be opened on every system.
    if os.path.isdir(path) and not hasattr(os, "O_DIRECTORY"):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: str | os.PathLike[str]) -> None:
    """Make every file and name below a folder survive a power cut."""
    for folder, _, names in os.walk(path):
        for name in names:
            sync(os.path.join(folder, name))
        sync(folder)


@contextmanager
def lock_file(path: str | os.PathLike[str]) -> Iterator[int]:
    """Open a file that processes lock, for as long as the block runs; it is made where it is missing.

    Raises:
        DataError: It cannot be opened, or is no regular file.
    """
    with explained_write(path, "remove it, or choose another folder."):
        require_regular(path)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, patience_s: float = 0.0) -> bool:
    """Try to lock an open file; the system releases it when the process ends, however it ends.

    Args:
        descriptor: The open file.
        patience_s: Seconds to wait for another process to release it.

    Returns:
        False where another process holds it. True where it is locked, and where the file system knows no locks: work
        there is worth more than the guard.
    """
    if os.name == "nt":
        return True
    import fcntl

    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                return False
            time.sleep(0.05)
        except OSError:
            return True
        else:
            return True
