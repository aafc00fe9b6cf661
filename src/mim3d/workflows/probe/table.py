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
        "conventions": CONVENTIONS,
        "num_scans": {"training": first.num_scans[0], "held_out": first.num_scans[1]},
        "num_patients_held_out": rows[0].probed.linear.num_patients,
        "features": [
            {
                "name": row.name,
                "kind": row.kind,
                **row.about,
                "num_features": row.probed.num_features,
                "view_size": list(row.items.size),
                "token_edge": row.items.token_edge,
                "items": {
                    name: {"training": training, "held_out": held_out}
                    for name, (training, held_out) in row.items.counts().items()
                },
                "left_out": list(row.items.left_out),
                **{name: _classifier(row, name, bootstrap) for name in CLASSIFIERS},
                "collapse": None if row.probed.collapse is None else asdict(row.probed.collapse),
            }
            for row in rows
        ],
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
        ["Features", *chain.from_iterable((title, "95 % interval") for title in CLASSIFIERS.values())],
        lines,
    )
    spreads = [(row["name"], row["num_features"], row["collapse"]) for row in rows if row["collapse"]]
    _print(
        "Spread of the features to learn from: 1 is even, 0 is collapsed",
        ["Features", "Number", "Spread", "Rank", "Cosine"],
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
            ["", *("\n".join(wrap(row["name"], 11)) for row in part)],
            [[name, *(_number(row["linear"]["per_class_f1"].get(name)) for row in part)] for name in labels],
        )


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
