"""Lists of cases: CSV tables, the columns that they and JSON lists share, and the check of their names."""

import difflib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from mim3d.core.errors import DataError
from mim3d.core.files import read_csv
from mim3d.core.names import printable, unescaped
from mim3d.core.settings import nearest
from mim3d.scans.grids import is_there

#: Columns of a list, and keys of an entry in JSON.
COLUMNS = ("image", "label", "class", "patient", "split", "labels", "id", "fold", "modality")

#: What is declared of one case, by column. Lists within a cell are separated by ";", in JSON they may be lists.
Entry = Mapping[str, Any]

#: Columns in which tables number their rows.
_ROW_NUMBERS = re.compile(r"|index|Unnamed: \d+")


def read_table(path: str) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The column names of a CSV file, and its rows, each with its place in words for messages; blank rows are skipped.

    Raises:
        DataError: The file cannot be read as CSV.
    """
    (_, header), *rows = read_csv(path) or [(0, [])]
    return [name.strip() for name in header], [(f"{path}, line {line}", row) for line, row in rows]


def read_list(path: str) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """The entries of a CSV list by their places, and what is to be said of it.

    Raises:
        DataError: The file cannot be read, a column is missing, twice there or misspelt, or a row is too long.
    """
    header, rows = read_table(path)
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise DataError(f"{path}: its columns are not separated by commas; save it as CSV with commas.")
    unused = check_columns(header, path)
    entries: dict[str, Entry] = {}
    for where, row in rows:
        if len(row) > len(header):
            raise DataError(f"{where}: {len(row)} cells but {len(header)} columns; quote cells that hold a comma.")
        entries[where] = dict(zip(header, row, strict=False))
    if not unused:
        return entries, ()
    names = ", ".join(unused)
    return entries, (
        f"{path}: the column{'s' * (len(unused) > 1)} {names} {'are' if len(unused) > 1 else 'is'} not used by mim3d, "
        f"which knows {', '.join(COLUMNS)}.",
    )


def check_columns(names: Sequence[str], where: str) -> list[str]:
    """The names that are no columns of a list; those that number rows are passed over.

    Raises:
        DataError: There is no image, a column is there twice, or a name is all but that of a column that is missing.
    """
    unused = []
    for name in map(str, names):
        if name in COLUMNS:
            if list(names).count(name) > 1:
                raise DataError(f"{where}: column {name!r} appears twice.")
            continue
        missing = [column for column in COLUMNS if column not in names]
        meant = next((column for column in missing if _is_misspelt(name, column)), None)
        if meant is not None:
            raise DataError(f"{where}: unknown column {name!r}. Did you mean '{meant}'?")
        if "image" not in names and len(names) == 1:
            raise DataError(f"{where}: unknown column {name!r}.{nearest(name, COLUMNS)}")
        if not _ROW_NUMBERS.fullmatch(name):
            unused.append(printable(name))
    if "image" not in names:
        raise DataError(f"{where}: no column 'image'; known columns are {', '.join(COLUMNS)}.")
    return unused


def _is_misspelt(name: str, column: str) -> bool:
    """Whether a name is a column with a letter too many, missing or in another place, or in another spelling."""
    plain = re.sub(r"[\W_]", "", name.lower())
    if plain in (column, f"{column}s", f"{column}id") or sorted(plain) == sorted(column):
        return True
    return len(column) > 2 and difflib.SequenceMatcher(None, plain, column).ratio() > 0.84


def beside(path: str, name: object) -> str:
    """The absolute path of a file that a list or description names relative to its own folder.

    Letters may be composed otherwise there than on this disk, and control characters written as escapes.
    """
    folder, text = os.path.dirname(path), str(name)
    forms = (text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")), unescaped(text))
    places = [os.path.abspath(os.path.join(folder, form)) for form in dict.fromkeys(forms)]
    return next((place for place in places if is_there(place)), places[0])


def channel_names(cell: str, path: str) -> tuple[str, ...]:
    """The images that a cell of a list names; ``;`` separates channels, unless it belongs to the name of a file.

    Args:
        cell: Names of images, relative to the folder of the list.
        path: The list.
    """
    parts, names = cell.split(";"), []
    while parts:
        wholes = [";".join(parts[:count]).strip() for count in range(1, len(parts) + 1)]
        there = (count for count, whole in enumerate(wholes, start=1) if whole and is_there(beside(path, whole)))
        count = next(there, 1)
        names.append(wholes[count - 1])
        parts = parts[count:]
    return tuple(names)
