"""The section of scores: tables of label maps and of classes, each case's Dice, and curves of classifiers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mim3d.reporting.charts import dice_chart, reliability_chart, roc_chart
from mim3d.reporting.paper_tables import CLASS_COLUMNS, Column
from mim3d.reporting.rendering import interval, number
from mim3d.reporting.segmentations import case_mean
from mim3d.reporting.sources import ScoreSet, related_sets

#: Scores of label maps that are shown.
LABEL_COLUMNS = (Column("dice", "Dice", 3), Column("hd95_mm", "HD95 (mm)", 2), Column("nsd", "NSD", 3))
#: Scores of which less is better.
LESS_IS_BETTER = {"hd95_mm"}


@dataclass(frozen=True, kw_only=True)
class ScoreCell:
    """A score of one set as text.

    Attributes:
        value: The score, or a dash.
        deviation: Its standard deviation over cases, empty where none is shown.
        interval: Its 95 % interval as "low to high", empty where none is shown.
        difference: Its difference to that of the first set, empty where none is shown.
        verdict: Whether the difference makes the score "better" or "worse", or leaves it the "same".
    """

    value: str
    deviation: str = ""
    interval: str = ""
    difference: str = ""
    verdict: str = ""


def score_tables(sets: Sequence[ScoreSet]) -> dict[str, Any]:
    """What the template of the section shows; empty where there are no scores."""
    if not sets:
        return {}
    return {
        "columns": LABEL_COLUMNS,
        "groups": [_label_maps(group) for group in related_sets([each for each in sets if not each.is_of_classes])],
        "class_groups": [_classes(group) for group in related_sets([each for each in sets if each.is_of_classes])],
    }


def _label_maps(maps: Sequence[ScoreSet]) -> dict[str, Any]:
    """The tables of sets of one data set, and each case's Dice."""
    tolerance_mm = maps[0].content["settings"].get("nsd_tolerance_mm")
    return {
        "maps": maps,
        "tolerance": f" {tolerance_mm:g} mm" if tolerance_mm else "",
        "label_rows": label_rows(maps),
        "case_rows": case_rows(maps),
        "same_cases": len({frozenset(each.cases) for each in maps}) == 1,
        "dice_chart": dice_chart(maps),
    }


def _classes(classes: Sequence[ScoreSet]) -> dict[str, Any]:
    """The tables of classifiers of one data set, and their curves."""
    return {
        "classes": classes,
        "class_rows": class_rows(classes),
        "confusions": [(each, list(each.content["per_class"]), each.content["confusion"]) for each in classes],
        "roc_chart": roc_chart(classes),
        "reliability_chart": reliability_chart(classes),
    }


def label_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[ScoreCell]]]:
    """Scores of label maps per label, then their mean: for each of LABEL_COLUMNS a cell per set.

    Deviations and intervals are shown for up to two sets, and differences from the second set on.
    """
    labels = dict.fromkeys(name for each in sets for name in each.content["per_label"])
    rows = [(label, [each.content["per_label"].get(label, {}) for each in sets]) for label in labels]
    rows.append(("mean", [{**each.content["mean"], "ci95": each.content.get("mean_ci95")} for each in sets]))
    return [(title, [cell for column in LABEL_COLUMNS for cell in _cells(column, row)]) for title, row in rows]


def _cells(column: Column, rows: Sequence[Mapping[str, Any]]) -> list[ScoreCell]:
    """One score of every set."""
    cells: list[ScoreCell] = []
    first = rows[0].get(column.key)
    for row in rows:
        value, deviation, ends = (found.get(column.key) for found in (row, row.get("std") or {}, row.get("ci95") or {}))
        if len(rows) > 2 or (row.get("num_cases") or 0) < 2:
            deviation = None
        difference, verdict = "", ""
        if cells and value is not None and first is not None:
            change = value - first
            difference, verdict = "±0", "same"
            if abs(change) >= 0.5 * 10**-column.decimals:
                difference = ("+" if change > 0 else "") + number(change, column.decimals)
                verdict = "better" if (change > 0) != (column.key in LESS_IS_BETTER) else "worse"
        cells.append(
            ScoreCell(
                value=number(value, column.decimals),
                deviation="" if deviation is None else number(deviation, column.decimals),
                interval="" if len(rows) > 2 else interval(ends, column.decimals),
                difference=difference,
                verdict=verdict,
            )
        )
    return cells


def case_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[str]]]:
    """Scores of every case as means over its labels: for each of LABEL_COLUMNS a text per set."""
    cases = [each.cases for each in sets]
    return [
        (
            name,
            [
                number(case_mean(held[name], column.key) if name in held else None, column.decimals)
                for column in LABEL_COLUMNS
                for held in cases
            ],
        )
        for name in sorted({name for held in cases for name in held})
    ]


def class_rows(sets: Sequence[ScoreSet]) -> list[tuple[str, list[ScoreCell]]]:
    """Scores of classifiers that any of them has: a cell per set."""
    rows = []
    for column in CLASS_COLUMNS:
        key = column.key
        if any(key in each.content["mean"] for each in sets):
            pairs = [(each.content["mean"].get(key), each.content["mean_ci95"].get(key)) for each in sets]
            cells = [ScoreCell(value=number(value, 3), interval=interval(ends, 3)) for value, ends in pairs]
            rows.append(("Expected calibration error" if key == "ece" else column.title, cells))
    return rows
