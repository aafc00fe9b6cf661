"""Cases from a list a user writes: CSV or JSON with the columns image, label, class, patient, split, labels, id."""

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mim3d.core.errors import DataError
from mim3d.core.settings import nearest
from mim3d.datasets.entries import Entry

COLUMNS = ("image", "label", "class", "patient", "split", "labels", "id")
SPLITS = ("train", "val", "test")


def read_table(path: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The column names of a CSV file, and its rows, each with its place in words for messages; blank rows are skipped.

    Raises:
        DataError: The file cannot be read as CSV.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}).") from error
    return header, rows


def read_csv(path: str) -> list[Entry]:
    """Cases of a CSV list; paths are relative to the list's folder, ``;`` separates channels.

    Raises:
        DataError: The file cannot be read, has no rows, an unknown or missing column or a row without an image, or an
            id is there twice or cannot be the name of a file.
    """
    header, rows = read_table(path)
    _check_columns(header, path)
    entries = {}
    for where, row in rows:
        if len(row) > len(header):
            raise DataError(f"{where}: {len(row)} cells but {len(header)} columns; quote cells that hold a comma.")
        entries[where] = _entry(dict(zip(header, row, strict=False)), where, path)
    return _checked(entries, path)


def read_json_list(items: Sequence[Any], path: str) -> list[Entry]:
    """Cases of a JSON list of objects with the same keys as the CSV columns; ``image`` may be a list.

    Raises:
        DataError: An entry is no object, has an unknown key or no image, or an id is as in ``read_csv``.
    """
    entries = {}
    for number, item in enumerate(items, start=1):
        where = f"{path}, entry {number}"
        if not isinstance(item, dict):
            raise DataError(f'{where}: must be an object like {{"image": "scan.nii.gz"}}.')
        _check_columns(list(item), where)
        entries[where] = _entry(item, where, path)
    return _checked(entries, path)


def _check_columns(names: Sequence[str], where: str) -> None:
    for name in names:
        if name not in COLUMNS:
            raise DataError(f"{where}: unknown column {name!r}.{nearest(name, COLUMNS)}")
        if names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} appears twice.")
    if "image" not in names:
        raise DataError(f"{where}: no column 'image'; known columns are {', '.join(COLUMNS)}.")


def _entry(row: Mapping[str, Any], where: str, path: str) -> Entry:
    """One row; lists within a cell are separated by ``;``, in JSON they may be lists."""

    def text(column: str) -> str | None:
        value = row.get(column)
        return None if value is None else str(value).strip() or None

    def texts(column: str) -> list[str]:
        value = row.get(column) or ""
        return [str(name).strip() for name in (value if isinstance(value, list) else str(value).split(";"))]

    folder = os.path.dirname(path)
    images, label, split = texts("image"), text("label"), text("split")
    if not all(images):
        raise DataError(f"{where}: no image; every case needs one.")
    if split is not None and split not in SPLITS:
        raise DataError(f"{where}: unknown split {split!r}.{nearest(split, SPLITS)}")
    return Entry(
        images=tuple(os.path.abspath(os.path.join(folder, name)) for name in images),
        label=os.path.abspath(os.path.join(folder, label)) if label else None,
        class_name=text("class"),
        patient=text("patient"),
        split=split,
        id=text("id"),
        labelled=tuple(name for name in texts("labels") if name) or None,
    )


def _checked(entries: Mapping[str, Entry], path: str) -> list[Entry]:
    """The entries, of which there must be some, with declared ids that can be names of files of their own."""
    if not entries:
        raise DataError(f"{path}: lists no cases; add at least one row with an image.")
    first: dict[str, str] = {}
    for where, entry in entries.items():
        if entry.id is None:
            continue
        if entry.id.startswith(".") or any(mark in entry.id for mark in '/\\:*?"<>|'):
            raise DataError(f"{where}: the id {entry.id!r} cannot be the name of a file; use letters, digits, _ and -.")
        # Case is ignored, as some file systems do.
        if entry.id.casefold() in first:
            raise DataError(
                f"{where}: the id {entry.id!r} is that of an earlier row ({first[entry.id.casefold()]}); give every "
                "case its own."
            )
        first[entry.id.casefold()] = entry.id
    return list(entries.values())
