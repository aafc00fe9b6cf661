"""Lists of cases: CSV tables, the columns that they and JSON lists share, and the check of their names."""

import contextlib
import difflib
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mim3d.core.errors import DataError, listed
from mim3d.core.files import plain_text, read_csv
from mim3d.core.names import printable, unescaped
from mim3d.core.settings import nearest
from mim3d.scans.grids import is_there
from mim3d.scans.volumes import suffix_of

#: Columns of a list, and keys of an entry in JSON.
COLUMNS = ("image", "label", "class", "patient", "split", "labels", "id", "fold", "modality")

#: Other names of columns, for lists that lack the column itself.
_OTHER_NAMES = {
    **dict.fromkeys("img imagepath imagefile imagefilename filename filepath path scan volume".split(), "image"),
    **dict.fromkeys("mask seg segmentation labelmap labelpath labelfile maskpath annotation".split(), "label"),
    **dict.fromkeys("patientid subject subjectid participantid".split(), "patient"),
}

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
    """The entries of a list by their places, and what is to be said of it; a ``.txt`` holds an image in each line.

    Raises:
        DataError: The file cannot be read, a column is missing, twice there or misspelt, or a row is too long.
    """
    if path.lower().endswith(".txt"):
        lines = enumerate(plain_text(path, "utf-8-sig").splitlines(), start=1)
        return {f"{path}, line {number}": {"image": line} for number, line in lines if line.strip()}, ()
    header, rows = read_table(path)
    found = read_columns(header, path)
    names = [found.columns.get(name, "") for name in header]
    entries: dict[str, Entry] = {}
    for where, row in rows:
        if len(row) > len(header):
            raise DataError(f"{where}: {len(row)} cells but {len(header)} columns; quote cells that hold a separator.")
        entries[where] = {name: cell for name, cell in zip(names, row, strict=False) if name}
    unused = ", ".join(found.unused)
    said = [said_of_guesses(path, found.guessed)] if found.guessed else []
    if unused:
        columns, are = ("columns", "are") if len(found.unused) > 1 else ("column", "is")
        said.append(f"{path}: the {columns} {unused} {are} not used by mim3d, which knows {', '.join(COLUMNS)}.")
    return entries, tuple(said)


def said_of_guesses(path: str, guessed: Mapping[str, str]) -> str:
    """The sentence that says which columns are read by another name than their own."""
    names = ", ".join(f"{name} as {column}" for name, column in guessed.items())
    return f"{path}: columns are read by what they are called elsewhere: {names}; rename them if that is wrong."


@dataclass(frozen=True, kw_only=True)
class ListColumns:
    """The columns of a list, or the keys of an entry.

    Attributes:
        columns: Name there -> column that it stands for; capitals and ``_`` make no difference.
        guessed: Those of them that have another name, such as "mask" -> "label".
        unused: Names that nothing uses; those that number rows are passed over.
    """

    columns: dict[str, str]
    guessed: dict[str, str]
    unused: list[str]


def read_columns(names: Sequence[str], where: str) -> ListColumns:
    """Find the columns of a list.

    Raises:
        DataError: There is no image, a column is there twice, or a name is all but that of a column that is missing.
    """
    columns: dict[str, str] = {}
    for name in map(str, names):
        if name in COLUMNS and list(names).count(name) > 1:
            raise DataError(f"{where}: column {name!r} appears twice.")
    guessed: dict[str, str] = {}
    # The name itself goes before another spelling, which goes before another name.
    for column_of in (lambda name: name, _plain, lambda name: _OTHER_NAMES.get(_plain(name))):
        for name in map(str, names):
            column = column_of(name)
            if name not in columns and column in COLUMNS and column not in columns.values():
                columns[name] = column
                if _plain(name) != column:
                    guessed[printable(name)] = column
    unused = []
    for name in (name for name in map(str, names) if name not in columns):
        missing = [column for column in COLUMNS if column not in columns.values()]
        is_known = _plain(name) in columns.values()
        meant = next((column for column in missing if not is_known and _is_misspelt(name, column)), None)
        if meant is not None:
            raise DataError(f"{where}: unknown column {name!r}. Did you mean '{meant}'?")
        if "image" in missing and len(names) == 1:
            raise DataError(f"{where}: unknown column {name!r}.{nearest(name, COLUMNS)}")
        if not _ROW_NUMBERS.fullmatch(name):
            unused.append(printable(name))
    if "image" not in columns.values():
        there = f"; there are {listed(unused, 12)}" if unused else ""
        raise DataError(f"{where}: no column 'image'{there}; known columns are {', '.join(COLUMNS)}.")
    return ListColumns(columns=columns, guessed=guessed, unused=unused)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def tables_not_read(folder: str) -> tuple[str, ...]:
    """What is said of tables in a folder of scans that say whose scans these are, of what class or in which part.

    Of each table the first line is read; one of other columns, such as ages, is passed over.
    """
    said = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if not name.lower().endswith((".csv", ".tsv")) or not os.path.isfile(path):
            continue
        with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8-sig") as file:
            columns = [cell.strip().strip('"') for cell in re.split(r"[,;\t]", file.readline(10_000))]
            # In BIDS that is the name of a folder.
            plain = {_OTHER_NAMES.get(_plain(cell), _plain(cell)): cell for cell in columns if cell != "participant_id"}
            known = [plain[column] for column in ("patient", "class", "split", "fold", "modality") if column in plain]
            if known:
                said.append(f"{name} ({', '.join(map(printable, known))})")
    if not said:
        return ()
    return (
        f"{folder}: tables beside the scans are not read: {listed(said)}; to use what they say, add a column image "
        "with the path of each scan and give the table as DATA.",
    )


def told_classes(
    entries: Mapping[str, Entry], path: str, names: Mapping[int, str] | None = None
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Entries whose label is a class where no label of the list is a file, as lists of MONAI have it; and what is said.

    Args:
        entries: Where an entry stands -> what it declares.
        path: The list.
        names: Names of numbered classes.
    """
    # MONAI may give the one label map of a case as a list.
    one = {
        where: {**entry, "label": _only(entry["label"])} if "label" in entry else entry
        for where, entry in entries.items()
    }
    labels = [entry["label"] for entry in one.values() if entry.get("label") not in (None, "")]
    values = set(map(str, labels))
    are_numbers = all(re.fullmatch(r"\d{1,4}", value.strip()) for value in values)
    are_few = len(values) <= max(2, len(labels) // 2) and not any(isinstance(label, (list, dict)) for label in labels)
    if (
        not labels
        or any(entry.get("class") for entry in one.values())
        or not (are_numbers or are_few)
        or any(suffix_of(value) or is_there(beside(path, value)) for value in values)
    ):
        return one, ()
    found: dict[str, Entry] = {}
    for where, entry in one.items():
        value = "" if entry.get("label") is None else str(entry["label"]).strip()
        name = (names or {}).get(int(value), value) if value.isdigit() else value
        found[where] = {**{key: each for key, each in entry.items() if key != "label"}, "class": name}
    return found, (f'{path}: "label" names no files, so its {len(values)} values are taken for classes of the scans.',)


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _is_misspelt(name: str, column: str) -> bool:
    """Whether a name is a column with a letter too many, missing or in another place, or in another spelling."""
    plain = _plain(name)
    if plain in (column, f"{column}s", f"{column}id") or sorted(plain) == sorted(column):
        return True
    return len(column) > 2 and difflib.SequenceMatcher(None, plain, column).ratio() > 0.84


def beside(path: str, name: object) -> str:
    """The absolute path of a file that a list or description names relative to its own folder.

    Letters may be composed otherwise there than on this disk, and control characters written as escapes.
    """
    folder, text = os.path.dirname(path), str(name)
    forms = [text, *(unicodedata.normalize(form, text) for form in ("NFC", "NFD")), unescaped(text)]
    # Windows writes folders so.
    forms.append(text.replace("\\", "/"))
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
