"""Tables of classes: what was predicted of each scan, and what its reference says."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from mim3d.core.errors import DataError, listed
from mim3d.core.settings import nearest
from mim3d.datasets.entries import Entry, unique_ids
from mim3d.datasets.lists import read_table

#: Name of the table that prediction writes into its folder.
TABLE_NAME = "predictions.csv"

#: Columns that may name a case, the first that is there counts; an image is named as cases of a list are.
ID_COLUMNS = ("id", "case", "image")
_PROBABILITY = "probability_"


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A case of both tables.

    Attributes:
        id: what both call it.
        patient: whose case it is; the id where neither table says so.
        true_class: class in the references.
        predicted: class in the predictions.
        probabilities: of each class, in the order of the names.
        baseline: number of the baseline's column, if one was asked for.
    """

    id: str
    patient: str
    true_class: str
    predicted: str
    probabilities: tuple[float, ...]
    baseline: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """What two tables have in common.

    Attributes:
        rows: sorted by id.
        class_names: in the order of the predictions' columns.
        without_reference: ids of predictions that no reference belongs to.
        without_prediction: ids of references that were not predicted.
    """

    rows: tuple[ClassRow, ...]
    class_names: tuple[str, ...]
    without_reference: tuple[str, ...]
    without_prediction: tuple[str, ...]


@dataclass(frozen=True)
class _Table:
    """A CSV file with a header, its rows by the id of their case."""

    path: str
    columns: tuple[str, ...]
    rows: dict[str, dict[str, str]]

    def require(self, column: str) -> None:
        """Refuse a table without this column."""
        if column not in self.columns:
            raise DataError(f"{self.path}: has no column {column!r}.{nearest(column, self.columns)}")


def is_class_table(predictions: str) -> bool:
    """Whether predictions are those of a classifier: a CSV file, or a folder with nothing but such a table."""
    if os.path.isdir(predictions):
        names = [TABLE_NAME, "predictions.json"]
        table, maps = (os.path.isfile(os.path.join(predictions, name)) for name in names)
        return table and not maps
    return predictions.lower().endswith(".csv")


def read_class_tables(
    predictions: str, references: str, *, class_column: str = "class", baseline_column: str | None = None
) -> ClassTable:
    """Match two tables by the ids of their cases.

    Args:
        predictions: a table with the columns id, predicted and a probability_CLASS for each class, or its folder.
        references: a table with a column id, case or image (whose id is that of a case of a list), and a class.
        class_column: column of the references that holds the class.
        baseline_column: column of the references that holds a number to compare with.

    Raises:
        DataError: a table that cannot be read, lacks a column or a value, or names a case twice; a class that was not
            predicted; no case in both.
    """
    path = os.path.join(predictions, TABLE_NAME) if os.path.isdir(predictions) else predictions
    ours, theirs = _read(path), _read(references)
    class_names = tuple(name.removeprefix(_PROBABILITY) for name in ours.columns if name.startswith(_PROBABILITY))
    if len(class_names) < 2:
        raise DataError(f"{path}: needs a column {_PROBABILITY}CLASS for each of two or more classes.")
    for column in (class_column, *([baseline_column] if baseline_column else [])):
        theirs.require(column)
    shared = sorted(ours.rows.keys() & theirs.rows.keys())
    if not shared:
        raise DataError(
            f"{path}: no prediction is named like a reference; the predictions are {listed(sorted(ours.rows))}, the "
            f"references {listed(sorted(theirs.rows))}."
        )
    found = ClassTable(
        rows=tuple(_row(name, ours, theirs, class_names, class_column, baseline_column) for name in shared),
        class_names=class_names,
        without_reference=tuple(sorted(ours.rows.keys() - theirs.rows.keys())),
        without_prediction=tuple(sorted(theirs.rows.keys() - ours.rows.keys())),
    )
    for names, fault in (
        (found.without_reference, "predicted without a reference"),
        (found.without_prediction, "with a reference but no prediction"),
    ):
        if names:
            warnings.warn(f"Not scored, {fault}: {listed(names)}.", stacklevel=2)
    return found


def _read(path: str) -> _Table:
    header, lines = read_table(path)
    key = next((name for name in ID_COLUMNS if name in header), None)
    if key is None or not lines:
        what = "holds no rows" if key else f"has no column {', '.join(ID_COLUMNS[:-1])} or {ID_COLUMNS[-1]}"
        raise DataError(f"{path}: {what}; a table of classes has a header and a row per case.")
    rows: dict[str, dict[str, str]] = {}
    for where, cells in lines:
        if len(cells) != len(header):
            raise DataError(f"{where}: {len(cells)} cells but {len(header)} columns; quote commas.")
        row = dict(zip(header, (cell.strip() for cell in cells), strict=True))
        name = row[key]
        if not name or name in rows:
            raise DataError(f"{where}: the case {name!r} is there twice or has no name; give each its own.")
        rows[name] = row
    names = list(rows)
    if key == "image":
        # Prediction names the images of a list so: channels are separated by ";", paths lie below the list's folder.
        root = os.path.abspath(path)
        channels = [
            tuple(os.path.join(os.path.dirname(root), part.strip()) for part in name.split(";")) for name in rows
        ]
        names = unique_ids([Entry(images=paths) for paths in channels], root)
    return _Table(path, tuple(header), dict(zip(names, rows.values(), strict=True)))


def _row(
    name: str, ours: _Table, theirs: _Table, class_names: Sequence[str], class_column: str, baseline_column: str | None
) -> ClassRow:
    prediction, reference = ours.rows[name], theirs.rows[name]
    true_class = reference[class_column]
    if true_class not in class_names:
        raise DataError(
            f"{theirs.path}: case {name} is of the class {true_class!r}, for which {ours.path} has no probability; "
            f"its classes are {listed(class_names)}."
        )
    probabilities = tuple(_number(prediction[f"{_PROBABILITY}{each}"], ours.path, name) for each in class_names)
    likeliest = class_names[probabilities.index(max(probabilities))]
    predicted = prediction.get("predicted") or likeliest
    if predicted not in class_names:
        raise DataError(f"{ours.path}: case {name} is predicted {predicted!r}, which has no column of probabilities.")
    return ClassRow(
        id=name,
        patient=reference.get("patient") or prediction.get("patient") or name,
        true_class=true_class,
        predicted=predicted,
        probabilities=probabilities,
        baseline=_number(reference[baseline_column], theirs.path, name) if baseline_column else None,
    )


def _number(text: str, path: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: case {name} has {text!r} where a number is needed; correct it or take the row out.")
    return value
