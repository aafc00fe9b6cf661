"""Files of scores as a report shows them: side by side, with differences, and case by case."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mim3d.core.errors import ConfigError
from mim3d.reporting.class_scores import is_class_scores
from mim3d.reporting.drawing import Theme, chart, dress
from mim3d.reporting.marks import breakable, number, swatch

#: Score, its title, whether more is better, and its decimals.
_COLUMNS = (("dice", "Dice", True, 3), ("hd95_mm", "HD95 (mm)", False, 2), ("nsd", "NSD", True, 3))


@dataclass(frozen=True)
class ScoreSet:
    """A file of scores, with the name and colour that stand for it."""

    name: str
    colour: str
    content: Mapping[str, Any]

    @property
    def is_of_classes(self) -> bool:
        """Whether these are scores of a classifier, not of label maps."""
        return self.content.get("kind") == "classification"

    @property
    def labels(self) -> dict[int, str]:
        """Label value -> name."""
        return {int(value): str(name) for value, name in self.content["labels"].items()}

    @property
    def cases(self) -> dict[str, Mapping[str, Any]]:
        """Cases by id."""
        return {str(case["id"]): case for case in self.content["cases"]}


def read_scores(path: Path) -> dict[str, Any]:
    """Read a file that `mim3d evaluate` wrote.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: these scores cannot be read ({error}).") from error
    if not _is_scores(content) and not is_class_scores(content):
        raise ConfigError(f"{path} is no file of scores; give the .json that `mim3d evaluate` wrote.")
    return content


def _is_scores(content: Any) -> bool:
    kinds = {"labels": dict, "mean": dict, "per_label": dict, "cases": list}
    if not isinstance(content, dict) or any(not isinstance(content.get(key), kinds[key]) for key in kinds):
        return False
    rows = [content["mean"], *content["per_label"].values()]
    for case in content["cases"]:
        if not isinstance(case, dict) or "id" not in case or not isinstance(case.get("labels"), dict):
            return False
        rows += case["labels"].values()
    return all(isinstance(row, dict) and _has_numbers(row) for row in rows) and all(
        str(value).isdigit() for value in content["labels"]
    )


def _has_numbers(row: Mapping[str, Any]) -> bool:
    return all(row.get(key) is None or isinstance(row[key], (int, float)) for key, *_ in _COLUMNS)


def case_mean(case: Mapping[str, Any], key: str) -> float | None:
    """Mean of a score over the labels of a case that have it."""
    values = [score.get(key) for score in case["labels"].values()]
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def score_table(sets: Sequence[ScoreSet]) -> str:
    """HTML of the scores per label and mean; from the second set on with the difference to the first."""
    tolerance = sets[0].content.get("settings", {}).get("nsd_tolerance_mm")
    titles = [f"{title} {tolerance:g} mm" if key == "nsd" and tolerance else title for key, title, _, _ in _COLUMNS]
    top = "".join(f'<th class="group" colspan="{len(sets)}">{escape(title)}</th>' for title in titles)
    names = "".join(f'<th class="number">{swatch(each.colour)}{breakable(each.name)}</th>' for each in sets)
    labels = list(dict.fromkeys(name for each in sets for name in each.content["per_label"]))
    rows = [_score_row(escape(name), [each.content["per_label"].get(name, {}) for each in sets]) for name in labels]
    means = [{**each.content["mean"], "ci95": each.content.get("mean_ci95")} for each in sets]
    rows.append(_score_row("mean", means, "mean"))
    return (
        f'<div class="wide"><table class="scores"><thead><tr><th rowspan="2">Label</th>{top}</tr>'
        f"<tr>{names * len(_COLUMNS)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _score_row(title: str, rows: Sequence[Mapping[str, Any]], css: str = "") -> str:
    cells = []
    for key, _, more_is_better, decimals in _COLUMNS:
        first = rows[0].get(key)
        for position, row in enumerate(rows):
            value, spread = row.get(key), (row.get("std") or {}).get(key)
            text = number(value, decimals)
            if spread is not None and len(rows) <= 2 and row.get("num_cases", 0) > 1:
                text += f' <small class="faint">± {spread:.{decimals}f}</small>'
            ends = (row.get("ci95") or {}).get(key)
            if ends is not None and len(rows) <= 2:
                text += f'<br><small class="faint">{number(ends[0], decimals)} to {number(ends[1], decimals)}</small>'
            if position and value is not None and first is not None:
                text += _difference(value - first, more_is_better, decimals)
            edge = " edge" if position == 0 else ""
            cells.append(f'<td class="number{edge}">{text}</td>')
    return f'<tr class="{css}"><th scope="row">{title}</th>{"".join(cells)}</tr>'


def _difference(difference: float, more_is_better: bool, decimals: int) -> str:
    if abs(difference) < 0.5 * 10**-decimals:
        return ' <span class="same">±0</span>'
    shown = f"{difference:+.{decimals}f}".replace("-", "−")
    kind = "better" if (difference > 0) == more_is_better else "worse"
    return f' <span class="{kind}" title="{kind} than the first">{shown}</span>'


def counts_note(sets: Sequence[ScoreSet]) -> str:
    """One sentence on cases and labels that were missed, invented, failed or not shared."""
    parts = []
    for each in sets:
        missed, invented = (
            sum(row.get(key, 0) for row in each.content["per_label"].values()) for key in ("num_missed", "num_invented")
        )
        left_out = each.content.get("not_scored", {})
        failed = len(left_out.get("failed", ()))
        text = f"<b>{escape(each.name)}</b>, cases: {len(each.cases)}"
        text += f", labels missed: {missed}" if missed else ""
        text += f", labels predicted where there are none: {invented}" if invented else ""
        text += f", failed and not in the means: {failed}" if failed else ""
        parts.append(text)
    if len({frozenset(each.cases) for each in sets}) > 1:
        parts.append('<b class="worse">not the same cases: these means do not compare like with like</b>')
    return f'<p class="note">{"; ".join(parts)}.</p>'


def cases_table(sets: Sequence[ScoreSet]) -> str:
    """HTML of every case: means over its labels, for each set."""
    names = sorted({case_id for each in sets for case_id in each.cases})
    top = "".join(f'<th class="group" colspan="{len(sets)}">{escape(title)}</th>' for _, title, _, _ in _COLUMNS)
    heads = "".join(f'<th class="number">{swatch(each.colour)}{breakable(each.name)}</th>' for each in sets)
    rows = []
    for name in names:
        cells = []
        for key, _, _, decimals in _COLUMNS:
            for position, each in enumerate(sets):
                case = each.cases.get(name)
                text = number(case_mean(case, key) if case else None, decimals)
                cells.append(f'<td class="number{"" if position else " edge"}">{text}</td>')
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table><thead><tr><th rowspan="2">Case</th>{top}</tr>'
        f"<tr>{heads * len(_COLUMNS)}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def dice_picture(sets: Sequence[ScoreSet]) -> str:
    """HTML of the Dice of every case as a dot, per label and set, with a line at the median."""
    return chart(lambda theme: _draw_dots(sets, theme), "Dice of every case by label")


def _draw_dots(sets: Sequence[ScoreSet], theme: Theme) -> Figure:
    labels = list(dict.fromkeys(name for each in sets for name in each.content["per_label"]))
    figure = Figure(figsize=(min(max(1.1 * len(labels) * len(sets) ** 0.5 + 1, 4), 11), 2.6), layout="constrained")
    panel = figure.subplots()
    dress(panel, theme)
    panel.grid(visible=False, axis="x")
    spread = np.random.default_rng(0)
    width = 0.8 / len(sets)
    for position, each in enumerate(sets):
        for place, label in enumerate(labels):
            values = [case["labels"].get(label, {}).get("dice") for case in each.cases.values()]
            dice = np.array([value for value in values if value is not None])
            if not dice.size:
                continue
            middle = place + (position - (len(sets) - 1) / 2) * width
            jitter = spread.uniform(-0.28, 0.28, dice.size) * width
            panel.scatter(middle + jitter, dice, s=14, color=each.colour, alpha=0.65, linewidths=0)
            median = float(np.median(dice))
            panel.hlines(median, middle - 0.38 * width, middle + 0.38 * width, color=theme.ink, linewidth=1.2)
    panel.set_xticks(range(len(labels)), labels, rotation=30 if len(labels) > 6 else 0)
    panel.set_xlim(-0.6, len(labels) - 0.4)
    panel.set_ylabel("Dice", fontsize=8, color=theme.ink)
    panel.set_ylim(top=1.02)
    return figure
