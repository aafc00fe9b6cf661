"""What `mim3d probe` writes and prints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from textwrap import wrap
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mim3d.metrics import Bootstrap
from mim3d.probing.features import CONVENTIONS as COLLAPSE
from mim3d.probing.items import ProbeSet
from mim3d.probing.probe import Probed
from mim3d.probing.scores import CONVENTIONS, Scored, differences, intervals

#: Names of both classifiers, as fields of :class:`Probed`, and for people.
CLASSIFIERS = {"linear": "Linear", "neighbours": "k-NN"}

#: Sets of features in one table of labels.
COLUMNS_AT_ONCE = 4


@dataclass(frozen=True)
class Row:
    """Features that were probed.

    Attributes:
        name: Name of the features, for people.
        kind: ``encoder``, or what it is without learned weights: ``random``, ``intensities`` or ``place``.
        about: Further facts about them for the file of scores.
        items: The probe set.
        probed: Scores of both classifiers.
        against: The rows that they are compared with, by name.
    """

    name: str
    kind: str
    about: Mapping[str, Any]
    items: ProbeSet
    probed: Probed
    against: Mapping[str, Probed]


def content_of(rows: Sequence[Row], written: Mapping[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    """Everything that the file of scores holds, as JSON takes it."""
    first = rows[0].items
    return {
        "kind": "probe",
        "target": first.target,
        "settings": dict(written),
        "conventions": {**CONVENTIONS, **COLLAPSE},
        "num_scans": {"training": first.num_scans[0], "held_out": first.num_scans[1]},
        "num_patients_held_out": rows[0].probed.linear.num_patients,
        "features": [_row(row, bootstrap) for row in rows],
    }


def _row(row: Row, bootstrap: Bootstrap) -> dict[str, Any]:
    probed = row.probed
    return {
        "name": row.name,
        "kind": row.kind,
        **row.about,
        "num_features": probed.num_features,
        "view_size": list(row.items.size),
        "token_edge": row.items.token_edge,
        "items": {name: {"training": counts[0], "held_out": counts[1]} for name, counts in row.items.counts().items()},
        "left_out": list(row.items.left_out),
        **{name: _classifier(row, name, bootstrap) for name in CLASSIFIERS},
        "collapse": None if probed.collapse is None else asdict(probed.collapse),
    }


def _classifier(row: Row, name: str, bootstrap: Bootstrap) -> dict[str, Any]:
    scored: Scored = getattr(row.probed, name)
    return {
        **scored.values(),
        "ci95": intervals(scored, bootstrap),
        "per_class_f1": dict(zip(row.items.names, scored.f1(), strict=True)),
        "less": {other: differences(scored, getattr(probed, name), bootstrap) for other, probed in row.against.items()},
    }


def show(content: Mapping[str, Any]) -> None:
    """Print scores, intervals and differences, measures of collapse, and F1 of every label, on 80 columns."""
    rows = content["features"]
    names = ["balanced_accuracy", "f1_macro", *(["auc"] if content["target"] == "classes" else [])]
    heads = {"balanced_accuracy": "acc.", "f1_macro": "F1", "auc": "AUC"}
    _print(
        f"{content['num_scans']['held_out']} held-out scans, {content['num_scans']['training']} to learn from "
        "(acc.: balanced accuracy)",
        ["Features", *(f"{title}\n{heads[name]}" for title in CLASSIFIERS.values() for name in names)],
        [[row["name"], *(_number(row[kind][name]) for kind in CLASSIFIERS for name in names)] for row in rows],
    )
    _print(
        "Balanced accuracy: 95 % intervals over patients, and paired differences",
        ["Features", *chain.from_iterable((title, "95 % interval") for title in CLASSIFIERS.values())],
        [line for row in rows for line in _with_differences(row)],
    )
    _print(
        "Spread of the features to learn from: 1 is even, 0 is collapsed",
        ["Features", "Number", "Spread", "Rank", "Cosine"],
        [[row["name"], str(row["num_features"]), *_collapse(row["collapse"])] for row in rows if row["collapse"]],
    )
    labels = list(dict.fromkeys(name for row in rows for name in row["items"]))
    for start in range(0, len(rows), COLUMNS_AT_ONCE):
        part = rows[start : start + COLUMNS_AT_ONCE]
        _print(
            f"F1 of each {'label' if content['target'] == 'labels' else 'class'}, linear",
            ["", *("\n".join(wrap(row["name"], 11)) for row in part)],
            [[name, *(_number(row["linear"]["per_class_f1"].get(name)) for row in part)] for name in labels],
        )


def _with_differences(row: Mapping[str, Any]) -> list[list[str]]:
    """A line for features, and one for the difference to each row that they are compared with."""
    found, name = [row[kind] for kind in CLASSIFIERS], "balanced_accuracy"
    lines = [[row["name"]]]
    for each in found:
        lines[0] += [_number(each[name]), _interval(each["ci95"][name])]
    for other in found[0]["less"]:
        line = [f"  difference to {'a random encoder' if other == 'random' else other}"]
        for each in found:
            less = each["less"][other][name]
            line += [f"{less['difference']:+.3f}", _interval(less["ci95"])]
        lines.append(line)
    return lines


def _collapse(found: Mapping[str, float]) -> list[str]:
    return [f"{found['feature_std']:.3f}", f"{found['effective_rank']:.1f}", f"{found['mean_cosine']:.3f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table()
    for place, head in enumerate(heads):
        # Where the terminal is narrow, names give way: a number that is cut short says nothing.
        if place == 0:
            table.add_column(Text(head), overflow="fold")
        else:
            table.add_column(Text(head), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    console.print(Text(title))
    console.print(table)
