"""What `mim3d probe` writes and prints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mim3d.metrics import Bootstrap
from mim3d.probing.collapse import CONVENTIONS as COLLAPSE
from mim3d.probing.items import ProbeSet
from mim3d.probing.probe import Probed
from mim3d.probing.scores import CONVENTIONS, Scored, differences, intervals

#: Names of both classifiers, as fields of :class:`Probed`, and for people.
CLASSIFIERS = {"linear": "Linear", "neighbours": "k-NN"}


@dataclass(frozen=True)
class Row:
    """Features that were probed.

    Attributes:
        name: of them, for people.
        kind: ``encoder``, or what it is without learned weights: ``random``, ``intensities`` or ``place``.
        about: what else is told of them.
        items: what they were probed on.
        probed: what they are worth.
        against: the rows that they are held against, by name.
    """

    name: str
    kind: str
    about: Mapping[str, Any]
    items: ProbeSet
    probed: Probed
    against: Mapping[str, Probed]


def content_of(rows: Sequence[Row], settings: Mapping[str, Any], bootstrap: Bootstrap) -> dict[str, Any]:
    """All there is to tell, as JSON takes it."""
    first = rows[0].items
    return {
        "kind": "probe",
        "target": first.target,
        "settings": dict(settings),
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
    """Print one line for each set of features, F1 of every label, and the differences."""
    rows = content["features"]
    names = ["balanced_accuracy", "f1_macro", *(["auc"] if content["target"] == "classes" else [])]
    heads = {"balanced_accuracy": "acc.", "f1_macro": "F1", "auc": "AUC"}
    columns = [f"{title} {heads[name]}" for title in CLASSIFIERS.values() for name in names]
    _print(
        f"{content['num_scans']['held_out']} held-out scans, {content['num_scans']['training']} to learn from "
        "(acc.: balanced accuracy)",
        ["Features", *columns, "Spread", "Rank", "Cosine"],
        [
            [
                row["name"],
                *(_number(row[kind][name]) for kind in CLASSIFIERS for name in names),
                *_collapse(row["collapse"]),
            ]
            for row in rows
        ],
    )
    _print(
        "Balanced accuracy: 95 % intervals over patients, and paired differences",
        ["Features", "", "Interval", *(f"Less {name}" for name in _others(rows))],
        [
            [
                row["name"],
                title,
                _interval(row[kind]["ci95"]["balanced_accuracy"]),
                *(_difference(row[kind]["less"].get(name)) for name in _others(rows)),
            ]
            for row in rows
            for kind, title in CLASSIFIERS.items()
        ],
    )
    labels = list(dict.fromkeys(name for row in rows for name in row["items"]))
    _print(
        f"F1 of each {'label' if content['target'] == 'labels' else 'class'}, linear",
        ["", *(row["name"] for row in rows)],
        [[name, *(_number(row["linear"]["per_class_f1"].get(name)) for row in rows)] for name in labels],
    )


def _others(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["linear"]["less"]))


def _collapse(found: Mapping[str, float] | None) -> list[str]:
    if found is None:
        return ["-"] * 3
    return [f"{found['feature_std']:.3f}", f"{found['effective_rank']:.1f}", f"{found['mean_cosine']:.3f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    each = found["balanced_accuracy"]
    return f"{each['difference']:+.3f} ({_interval(each['ci95'])})"


def _print(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if place == 0 else "right", no_wrap=place == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
