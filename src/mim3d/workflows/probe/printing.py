"""Scores of probes as they are printed: tables with intervals and differences, on 80 columns."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

from rich.text import Text

from mim3d.core.names import printable
from mim3d.core.progress import say
from mim3d.tasks.evaluation import print_tables, printed_table

#: Names of both classifiers, as fields of :class:`Probed`, and for people.
CLASSIFIERS = {"linear": "Linear", "neighbours": "k-NN"}

#: Follows the name of features of an encoder that learned from held-out scans.
LEAK_MARK = " *"

#: Sets of features in one table of labels.
COLUMNS_AT_ONCE = 4

#: Scores that are printed, by what the labels are, and their heads; the last of classes has intervals.
SCORES = {"classes": ("balanced_accuracy", "f1_macro", "auc"), "numbers": ("r2", "mae", "pearson")}
HEADS_OF = {
    "balanced_accuracy": "acc.",
    "f1_macro": "F1",
    "auc": "AUC",
    "r2": "R2",
    "mae": "MAE",
    "pearson": "corr.",
}


def show_encoders(content: Mapping[str, Any]) -> None:
    """Print scores, intervals and differences, measures of collapse, and F1 of every label, on 80 columns."""
    rows = content["features"]
    names = ["balanced_accuracy", "f1_macro", *(["auc"] if content["target"] == "classes" else [])]
    _print(
        f"{content['num_scans']['held_out']} held-out scans, {content['num_scans']['training']} to learn from "
        "(acc.: balanced accuracy)",
        "Features",
        [f"{title}\n{HEADS_OF[name]}" for title in CLASSIFIERS.values() for name in names],
        [[row["name"], *(_number(row[kind][name]) for kind in CLASSIFIERS for name in names)] for row in rows],
    )
    # A line for features, and one for the difference to each row that they are compared with.
    lines = []
    for row in rows:
        scored, cells = [row[kind] for kind in CLASSIFIERS], [row["name"]]
        for each in scored:
            cells += [_number(each["balanced_accuracy"]), _interval(each["ci95"]["balanced_accuracy"])]
        lines.append(cells)
        for other in scored[0]["less"]:
            cells = [f"  difference to {'a random encoder' if other == 'random' else other}"]
            for each in scored:
                less = each["less"][other]["balanced_accuracy"]
                cells += [f"{less['difference']:+.3f}", _interval(less["ci95"])]
            lines.append(cells)
    _print(
        "Balanced accuracy: 95 % intervals over patients, and paired differences",
        "Features",
        [head for title in CLASSIFIERS.values() for head in (title, "95 % interval")],
        lines,
    )
    if any(row["name"].endswith(LEAK_MARK) for row in rows):
        say("* learned from held-out scans, so its scores say nothing about new patients")
    spreads = [(row["name"], row["num_features"], row["collapse"]) for row in rows if row["collapse"]]
    _print(
        "Spread of the features to learn from: 1 is even, 0 is collapsed",
        "Features",
        ["Number", "Spread", "Rank", "Cosine"],
        [
            [name, str(num), f"{c['feature_std']:.3f}", f"{c['effective_rank']:.1f}", f"{c['mean_cosine']:.3f}"]
            for name, num, c in spreads
        ],
    )
    labels = list(dict.fromkeys(name for row in rows for name in row["items"]))
    for start in range(0, len(rows), COLUMNS_AT_ONCE):
        part = rows[start : start + COLUMNS_AT_ONCE]
        _print(
            f"F1 of each {'label' if content['target'] == 'labels' else 'class'}, linear",
            "",
            ["\n".join(wrap(row["name"], 11)) for row in part],
            [[name, *(_number(row["linear"]["per_class_f1"].get(name)) for row in part)] for name in labels],
        )


def show_tables(content: Mapping[str, Any]) -> None:
    """Print scores of heads on tables of features, their intervals, and the differences to what needs no features."""
    rows, names = content["features"], SCORES[content["target"]]
    numbers = content["num_rows"]
    scored = f"{numbers['held_out']} of {numbers['all']} rows scored, of {content['num_patients_held_out']} patients"
    chance = content.get("chance")
    _print(
        f"{scored}; {content['label_column']}"
        + (f"; chance: acc. {chance['balanced_accuracy']:.3f}" if chance else ""),
        "Features",
        [f"{title}\n{HEADS_OF[name]}" for title in CLASSIFIERS.values() for name in names],
        [[row["name"], *(_number(row[kind][name]) for kind in CLASSIFIERS for name in names)] for row in rows],
    )
    first = names[-1] if content["target"] == "classes" else names[0]
    lines = []
    for row in rows:
        scored_by = [row[kind] for kind in CLASSIFIERS]
        lines.append(
            [row["name"], *(cell for s in scored_by for cell in (_number(s[first]), _interval(s["ci95"][first])))]
        )
        for other in scored_by[0]["less"]:
            cells = [f"  difference to {other}"]
            for each in scored_by:
                less = each["less"][other][first]
                cells += ["-" if less["difference"] is None else f"{less['difference']:+.3f}", _interval(less["ci95"])]
            lines.append(cells)
    _print(
        f"{HEADS_OF[first]}: 95 % intervals over patients, and paired differences",
        "Features",
        [head for title in CLASSIFIERS.values() for head in (title, "95 % interval")],
        lines,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _print(title: str, first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = printed_table(title, first, columns)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    print_tables([table])
