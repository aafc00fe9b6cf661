"""Tables of classes: the class predicted for each scan, and the class in its reference."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from mim3d.core.errors import DataError, listed
from mim3d.core.settings import nearest
from mim3d.datasets.entries import Entry, unique_ids
from mim3d.datasets.lists import read_table

#: Name of the table that prediction writes into its folder.
TABLE_NAME = "predictions.csv"

#: Columns that may name a case; the first that is there counts. An image is named as cases of a list are.
ID_COLUMNS = ("id", "case", "image")
_PROBABILITY = "probability_"


@dataclass(frozen=True, kw_only=True)
class ClassRow:
    """A case of both tables.

    Attributes:
        id: Name of the case in both tables.
        patient: Name of the patient; the id where neither table has one.
        true_class: Class in the references.
        predicted: Class in the predictions.
        probabilities: Probability of each class, in the order of the names.
        baseline: Number in the baseline's column, if one was asked for.
    """

    id: str
    patient: str
    true_class: str
    predicted: str
    probabilities: tuple[float, ...]
    baseline: float | None = None


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The cases of a table of predictions and a table of references.

    Attributes:
        rows: Cases of both tables, sorted by id.
        class_names: Names of the classes, in the order of the predictions' columns.
        without_reference: Ids of predictions that no reference belongs to.
        without_prediction: Ids of references that were not predicted.
    """

    rows: tuple[ClassRow, ...]
    class_names: tuple[str, ...]
    without_reference: tuple[str, ...]
    without_prediction: tuple[str, ...]


def is_class_table(predictions: str) -> bool:
    """Whether predictions are those of a classifier: a CSV file, or a folder with nothing but such a table."""
    if os.path.isdir(predictions):
        table, maps = (os.path.isfile(os.path.join(predictions, name)) for name in (TABLE_NAME, "predictions.json"))
        return table and not maps
    return predictions.lower().endswith(".csv")


def read_class_tables(
    predictions: str, references: str, *, class_column: str = "class", baseline_column: str | None = None
) -> ClassTable:
    """Match two tables by the ids of their cases.

    Args:
        predictions: Table with the columns id, predicted and a probability_CLASS for each class, or its folder.
        references: Table with a column id, case or image (whose id is that of a case of a list), and a class.
        class_column: Column of the references that holds the class.
        baseline_column: Column of the references that holds a number to compare with.

    Raises:
        DataError: A table cannot be read, lacks a column or a value, or names a case twice; a class was not predicted;
            or no case is in both.
    """
    path = os.path.join(predictions, TABLE_NAME) if os.path.isdir(predictions) else predictions
    ours, theirs = _read(path), _read(references)
    columns = next(iter(ours.values()))
    class_names = tuple(name.removeprefix(_PROBABILITY) for name in columns if name.startswith(_PROBABILITY))
    if len(class_names) < 2:
        raise DataError(f"{path}: needs a column {_PROBABILITY}CLASS for each of two or more classes.")
    their_columns = next(iter(theirs.values()))
    for column in (class_column, *([baseline_column] if baseline_column else [])):
        if column not in their_columns:
            raise DataError(f"{references}: has no column {column!r}.{nearest(column, their_columns)}")
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise DataError(
            f"{path}: no prediction is named like a reference; the predictions are {listed(sorted(ours))}, the "
            f"references {listed(sorted(theirs))}."
        )
    rows = []
    for name in shared:
        prediction, reference = ours[name], theirs[name]
        if reference[class_column] not in class_names:
            raise DataError(
                f"{references}: case {name} is of the class {reference[class_column]!r}, for which {path} has no "
                f"probability; its classes are {listed(class_names)}."
            )
        probabilities = tuple(_number(prediction[f"{_PROBABILITY}{each}"], path, name) for each in class_names)
        predicted = prediction.get("predicted") or class_names[probabilities.index(max(probabilities))]
        if predicted not in class_names:
            raise DataError(f"{path}: case {name} is predicted {predicted!r}, which has no column of probabilities.")
        row = ClassRow(
            id=name,
            patient=reference.get("patient") or prediction.get("patient") or name,
            true_class=reference[class_column],
            predicted=predicted,
            probabilities=probabilities,
            baseline=_number(reference[baseline_column], references, name) if baseline_column else None,
        )
        rows.append(row)
    unmatched = (tuple(sorted(ours.keys() - theirs.keys())), tuple(sorted(theirs.keys() - ours.keys())))
    for names, fault in zip(
        unmatched, ("predicted without a reference", "with a reference but no prediction"), strict=True
    ):
        if names:
            warnings.warn(f"Not scored, {fault}: {listed(names)}.", stacklevel=2)
    return ClassTable(
        rows=tuple(rows), class_names=class_names, without_reference=unmatched[0], without_prediction=unmatched[1]
    )


def _read(path: str) -> dict[str, Mapping[str, str]]:
    """Rows of a table by the id of their case; every row has all columns."""
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
    return dict(zip(names, rows.values(), strict=True))


def _number(text: str, path: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}: case {name} has {text!r} where a number is needed; correct it or take the row out.")
    return value
