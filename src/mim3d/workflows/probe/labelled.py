"""Rows of tables of features and what a table of labels says of them: targets, patients, parts, numbers to compare."""

import math
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError, listed
from mim3d.core.names import cut, number_of, printable, verb_of
from mim3d.core.settings import nearest
from mim3d.datasets.cases import Case
from mim3d.datasets.ids import matched_ids
from mim3d.datasets.lists import beside, channel_names, read_table
from mim3d.datasets.references import ID_COLUMNS
from mim3d.probing.items import Floats, Ints
from mim3d.scans.grids import resolved
from mim3d.workflows.shared.feature_tables import WHOLE_SCAN, FeatureTable

#: Columns of a table of labels that are no label and no number to compare with.
OF_CASES = ("patient", "split", "fold", "region", "image", "label")

#: Names of columns that hold the label where none is named.
USUAL_COLUMNS = ("class", "label", "target", "diagnosis")

#: What programs write, in lower case, where a value is missing.
_MISSING = ("", "nan", "na", "n/a", "<na>", "null")

#: Whole numbers of more values than this are taken for numbers, not for classes.
MOST_CLASSES = 10

Kind = Literal["classes", "numbers"]

#: What the column split may say.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


@dataclass(frozen=True, kw_only=True)
class LabelledRows:
    """Rows that heads learn from and are scored on, the same ones in every table of features.

    Attributes:
        places: Place of each row in each table, (tables, N).
        cases: Case of each row: its id, patient, class and declared part.
        names: K classes in the order of their numbers; None where the labels are numbers.
        targets_N: Class of each row, or its number.
        columns: Numbers of the table of labels that every row has, by the name of their column.
        label_column: Column of the label.
    """

    places: tuple[Ints, ...]
    cases: tuple[Case, ...]
    names: tuple[str, ...] | None
    targets_N: npt.NDArray[np.float64] | Ints
    columns: Mapping[str, Floats]
    label_column: str

    @property
    def patients(self) -> tuple[str, ...]:
        """Whose row each is."""
        return tuple(case.patient for case in self.cases)


def labelled_rows(
    tables: Mapping[str, FeatureTable], labels: str, label_column: str | None, kind: Kind | None, region: str | None
) -> LabelledRows:
    """Match rows of features with a table of labels; what has no label or no features is told and left out.

    Args:
        tables: Tables of features by their paths, one at least; rows that one of them lacks are left out.
        labels: The table of labels (CSV), by id, case or image, and region where it has such a column.
        label_column: Its column; None takes the one that it can only be.
        kind: Whether labels are classes or numbers; None goes by what they look like.
        region: Which rows of features; None takes whole scans, or the only region of each.

    Raises:
        DataError: A table lacks what is needed, or too little belongs together.
    """
    header, lines = read_table(labels)
    key = next((name for name in ID_COLUMNS if name in header), None)
    if key is None or not lines:
        what = "holds no rows" if key else f"has no column {', '.join(ID_COLUMNS[:-1])} or {ID_COLUMNS[-1]}"
        raise DataError(f"{labels}: {what}; a table of labels has a header, an id for each scan and its label.")
    short = next((where for where, cells in lines if len(cells) != len(header)), None)
    if short is not None:
        raise DataError(f"{short}: another number of cells than columns; quote commas.")
    rows = [dict(zip(header, (cell.strip() for cell in cells), strict=True)) for _, cells in lines]
    column = _label_column(labels, header, rows, key, label_column)
    by_region = "region" in header and column != "region"
    places = [_places_of(path, table, region, by_region) for path, table in tables.items()]
    first_path, first = next(iter(tables.items()))
    row_of = _rows_of_features(labels, rows, key, by_region, first, places[0])
    common = [name for name in places[0] if name in row_of and all(name in each for each in places[1:])]
    unlabelled = [name[0] for name in places[0] if name not in row_of]
    empty = [name[0] for name in common if row_of[name][column].lower() in _MISSING]
    common = [name for name in common if row_of[name][column].lower() not in _MISSING]
    for names, said in (
        (unlabelled, f"a label in {labels}"),
        (empty, f"a value in the column {column} of {labels}"),
    ):
        if names:
            which = f"{number_of(len(names), 'row')} of {first_path} {verb_of(len(names), 'are')}"
            warnings.warn(f"{which} left out for want of {said}: {listed(names)}.", stacklevel=3)
    if without := len(rows) - len(row_of):
        which = f"{number_of(without, 'row', of=len(rows))} of {labels} {verb_of(without, 'have')}"
        warnings.warn(f"{which} no features in {first_path}.", stacklevel=3)
    common = _with_whole_features(tables, places, common)
    if not common:
        raise DataError(f"{labels}: no row of it belongs to features of {first_path}; compare their ids.")
    return _assembled(labels, tables, places, common, row_of, column, kind)


def _label_column(
    path: str, header: Sequence[str], rows: Sequence[Mapping[str, str]], key: str, asked: str | None
) -> str:
    """The column of the label.

    Raises:
        DataError: The one that is asked for is not there; or none is, and several could be meant.
    """
    if asked is not None:
        if asked not in header:
            raise DataError(f"{path}: has no column {asked!r}.{nearest(asked, header)}")
        return asked
    free = [name for name in header if name not in (key, *ID_COLUMNS, *OF_CASES[:4])]
    usual = [name for name in USUAL_COLUMNS if name in free]
    if usual or len(free) == 1:
        return (usual or free)[0]
    raise DataError(f"{path}: which column holds the label? Name it with --label_column; there are {listed(free, 12)}.")


def _places_of(path: str, table: FeatureTable, region: str | None, by_region: bool) -> dict[tuple[str, str], int]:
    """Row of each scan and region that is meant, by both.

    Raises:
        DataError: Several rows of a scan could be meant, or none.
    """
    pairs = list(zip(table.keys["id"], table.keys["region"], strict=True))
    regions = list(dict.fromkeys(table.keys["region"]))
    if not by_region:
        if region is None and WHOLE_SCAN in regions:
            region = WHOLE_SCAN
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if region is None and twice:
            raise DataError(
                f"{path}: {twice[0]} has several rows; say which by --region, one of {listed(regions, 12)}, or give "
                "the table of labels a column region."
            )
    if region is not None:
        if region not in regions:
            raise DataError(f"{path}: has no region {region!r}.{nearest(region, regions)}")
        if len(regions) > 1:
            others = [name for name in regions if name != region]
            warnings.warn(f"{path}: rows of the region {region} alone are used, not {listed(others)}.", stacklevel=4)
        pairs = [pair for pair in pairs if pair[1] == region]
    again = next((pair for pair, count in Counter(pairs).items() if count > 1), None)
    if again is not None:
        raise DataError(f"{path}: {again[0]} has several rows of the region {again[1]}; leave one of them.")
    places = {pair: place for place, pair in enumerate(zip(table.keys["id"], table.keys["region"], strict=True))}
    return {pair if by_region else (pair[0], ""): places[pair] for pair in pairs}


def _rows_of_features(
    path: str,
    rows: Sequence[Mapping[str, str]],
    key: str,
    by_region: bool,
    table: FeatureTable,
    places: Mapping[tuple[str, str], int],
) -> dict[tuple[str, str], Mapping[str, str]]:
    """Row of labels of each row of features that has one.

    Raises:
        DataError: A scan has two rows of labels.
    """
    ids = list(dict.fromkeys(name for name, _ in places))
    if key == "image":
        files = {
            resolved(tuple(image.split(";"))): name
            for name, image in zip(table.keys["id"], table.keys["image"], strict=True)
        }
        images = [tuple(beside(os.path.abspath(path), part) for part in channel_names(row[key], path)) for row in rows]
        names = [files.get(resolved(found), "") for found in images]
    else:
        own = list(dict.fromkeys(row[key] for row in rows))
        matched = matched_ids(own, ids, ("the labels", "the features"))
        names = [matched.get(row[key], "") for row in rows]
    found: dict[tuple[str, str], Mapping[str, str]] = {}
    for name, row in zip(names, rows, strict=True):
        where = (name, row["region"] if by_region else "")
        if where in found:
            raise DataError(f"{path}: {row[key]} is there twice; give each scan one row, or a column region.")
        if where in places:
            found[where] = row
    return found


def _with_whole_features(
    tables: Mapping[str, FeatureTable],
    places: Sequence[Mapping[tuple[str, str], int]],
    names: Sequence[tuple[str, str]],
) -> list[tuple[str, str]]:
    """The rows all of whose features are numbers; others are told."""
    kept = [
        name
        for name in names
        if all(np.isfinite(table.values[at[name]]).all() for table, at in zip(tables.values(), places, strict=True))
    ]
    if len(kept) < len(names):
        lost = number_of(len(names) - len(kept), "row", "are")
        warnings.warn(f"{lost} left out, whose features are not all numbers.", stacklevel=4)
    return kept


def _assembled(
    path: str,
    tables: Mapping[str, FeatureTable],
    places: Sequence[Mapping[tuple[str, str], int]],
    names: Sequence[tuple[str, str]],
    row_of: Mapping[tuple[str, str], Mapping[str, str]],
    column: str,
    kind: Kind | None,
) -> LabelledRows:
    """Targets, cases and numbers of the rows that are left."""
    cells = [row_of[name][column] for name in names]
    numbers = [_number(cell) for cell in cells]
    are_numbers = all(value is not None for value in numbers)
    if kind == "numbers" and not are_numbers:
        odd = cells[numbers.index(None)]
        raise DataError(f"{path}: column {column} holds {odd!r} where a number is needed; correct it, or use classes.")
    kinds = {value for value in numbers if value is not None}
    if kind is None and not are_numbers and len(kinds) > MOST_CLASSES:
        bad = [cell for cell, value in zip(cells, numbers, strict=True) if value is None]
        raise DataError(
            f"{path}: column {column} holds numbers, but {listed([cut(repr(cell)) for cell in dict.fromkeys(bad)])} in "
            f"{number_of(len(bad), 'row', of=len(cells))}; correct it, or say --label_kind classes."
        )
    whole = all(value is not None and value.is_integer() for value in numbers)
    found: Kind = kind or ("numbers" if are_numbers and not (whole and len(set(cells)) <= MOST_CLASSES) else "classes")
    classes = tuple(sorted(set(cells))) if found == "classes" else None
    if len(set(cells)) < 2:
        raise DataError(
            f"{path}: column {column} is {cells[0]!r} in every row that has features; there is nothing to tell apart."
        )
    first = next(iter(tables.values()))
    cases = []
    for name in names:
        row, at = row_of[name], places[0][name]
        fold, part = row.get("fold", ""), row.get("split", "")
        if part.lower() not in (*_SPLITS, *_MISSING) or not (fold.isdigit() or fold.lower() in _MISSING):
            is_part = part.lower() not in (*_SPLITS, *_MISSING)
            said = f"column split says {part!r}" if is_part else f"column fold says {fold!r}"
            known = "train, val or test" if is_part else "a whole number from 0"
            raise DataError(f"{path}: {said} of {name[0]}; it must be {known}, or empty.")
        cases.append(
            Case(
                id="_".join(filter(None, name)),
                images=(str(first.keys["image"][at]),),
                class_name=row[column] if classes else None,
                patient=row.get("patient") or str(first.keys["patient"][at]),
                split=_SPLITS.get(part.lower()),
                fold=int(fold) if fold.isdigit() else None,
            )
        )
    others = [name for name in next(iter(row_of.values())) if name not in (column, *ID_COLUMNS, *OF_CASES)]
    columns = {}
    for other in others:
        values = [_number(row_of[name][other]) for name in names]
        if all(value is not None for value in values) and len(set(values)) > 1:
            columns[printable(other)] = np.array(values, dtype=np.float64)
    targets = np.array([classes.index(cell) for cell in cells]) if classes else np.array(numbers, dtype=np.float64)
    return LabelledRows(
        places=tuple(np.array([at[name] for name in names]) for at in places),
        cases=tuple(cases),
        names=classes,
        targets_N=targets,
        columns=columns,
        label_column=column,
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
