"""Scores of classifiers as a report shows them: side by side with intervals, confusion and calibration."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol

from matplotlib.figure import Figure

from mim3d.reporting.drawing import Theme, chart, dress
from mim3d.reporting.marks import breakable, number, swatch

_TITLES = {
    "auc": "AUC",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1_macro": "Macro F1",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "brier": "Brier score",
    "ece": "Expected calibration error",
}


class NamedScores(Protocol):
    """A file of scores, with the name and colour that stand for it."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def colour(self) -> str:
        """What it is drawn in."""

    @property
    def content(self) -> Mapping[str, Any]:
        """What it holds."""


def is_class_scores(content: Any) -> bool:
    """Whether this is what a file of classification scores holds."""
    if not isinstance(content, Mapping) or content.get("kind") != "classification":
        return False
    kinds = {"mean": dict, "mean_ci95": dict, "confusion": list, "reliability": list, "per_class": dict, "cases": list}
    if any(not isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    cells = [cell for row in content["confusion"] if isinstance(row, list) for cell in row]
    values = [*content["mean"].values(), *cells]
    bins = all(
        isinstance(row, dict) and {"mean_probability", "frequency"} <= row.keys() for row in content["reliability"]
    )
    return bins and all(value is None or isinstance(value, (int, float)) for value in values)


def class_table(sets: Sequence[NamedScores]) -> str:
    """HTML of every score of every classifier, with its interval."""
    heads = "".join(f'<th class="number">{swatch(each.colour)}{breakable(each.name)}</th>' for each in sets)
    rows = []
    for key in [key for key in _TITLES if any(key in each.content["mean"] for each in sets)]:
        cells = ""
        for each in sets:
            text, ends = number(each.content["mean"].get(key), 3), each.content["mean_ci95"].get(key)
            if ends:
                text += f' <small class="faint">{number(ends[0], 3)} to {number(ends[1], 3)}</small>'
            cells += f'<td class="number">{text}</td>'
        rows.append(f'<tr><th scope="row">{escape(_TITLES[key])}</th>{cells}</tr>')
    table = f"<table><thead><tr><th>Score</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="wide">{table}</div>'


def baseline_note(scores: NamedScores) -> str:
    """HTML of the AUC of a baseline and the difference to it; nothing without one."""
    found = scores.content.get("baseline")
    if not isinstance(found, Mapping):
        return ""
    column = scores.content.get("settings", {}).get("baseline_column")
    shown = {key: number(row["auc"], 3) for key, row in found.items()}
    ends = found["difference"]["ci95"]
    text = f" ({number(ends[0], 3)} to {number(ends[1], 3)})" if ends else ""
    return (
        f'<p class="note"><b>{escape(scores.name)}</b>: the AUC of {escape(str(column))} alone is {shown["baseline"]}; '
        f"the difference to it is {shown['difference']}{text}.</p>"
    )


def confusion_table(scores: NamedScores) -> str:
    """HTML of the cases by class and predicted class."""
    names = [str(name) for name in scores.content["per_class"]]
    heads = "".join(f'<th class="number">{breakable(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><th scope="row">{breakable(name)}</th>' + "".join(f'<td class="number">{count}</td>' for count in counts)
        for name, counts in zip(names, scores.content["confusion"], strict=False)
    )
    return (
        f"<p>{swatch(scores.colour)}<b>{escape(scores.name)}</b>, class in rows, predicted class in columns</p>"
        f'<div class="wide"><table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def reliability_picture(sets: Sequence[NamedScores]) -> str:
    """HTML of what was predicted against what came true."""
    return chart(lambda theme: _draw(sets, theme), "Predicted probability against observed frequency")


def _draw(sets: Sequence[NamedScores], theme: Theme) -> Figure:
    figure = Figure(figsize=(3.4, 3.2), layout="constrained")
    panel = figure.subplots()
    dress(panel, theme)
    panel.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    for each in sets:
        held = [row for row in each.content["reliability"] if row["frequency"] is not None]
        points = [(row["mean_probability"], row["frequency"]) for row in held]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=each.colour, linewidth=1.2)
    panel.set_xlabel("mean predicted probability", fontsize=8, color=theme.ink)
    panel.set_ylabel("observed frequency", fontsize=8, color=theme.ink)
    panel.set_xlim(-0.02, 1.02)
    panel.set_ylim(-0.02, 1.02)
    return figure
