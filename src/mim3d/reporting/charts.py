"""Charts of a report: learning curves, the Dice of every case, and the ROC and calibration of classifiers."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mim3d.core.errors import DataError
from mim3d.metrics.class_statistics import roc_points
from mim3d.metrics.classification import ClassifiedCases
from mim3d.reporting.rendering import Theme, chart, chart_text, style_axes
from mim3d.reporting.sources import NamedRun, ScoreSet, is_number

#: Scores from 0 to 1, whose axis shows all of it.
SCORES = {
    "dice",
    "nsd",
    "auc",
    "accuracy",
    "balanced_accuracy",
    "f1_macro",
    "f1",
    "sensitivity",
    "specificity",
    "precision",
    "recall",
    "probe_linear",
    "probe_knn",
}
#: Keys of a metrics line that are no learning curve.
NOT_CURVES = {"step", "time_s"}
_COLUMNS = 3
#: Most classes that have a panel of their own.
_MOST_CLASSES = 12
_SMOOTHED_FROM = 60


def curve_names(runs: Iterable[NamedRun]) -> tuple[list[str], list[str]]:
    """Names of the metrics that matter (losses, validation, learning rate), and of all others."""
    lines = [line for run in runs for line in run.record.metrics]
    names = dict.fromkeys(key for line in lines for key, value in line.items() if is_number(value))
    keys = [key for key in names if key not in NOT_CURVES]
    groups = (
        [key for key in keys if key == "loss"],
        [key for key in keys if key.startswith("loss/")],
        [key for key in keys if key.startswith("val/") and key.count("/") == 1],
        [key for key in keys if key == "learning_rate"],
    )
    main = [key for group in groups for key in group]
    return main, [key for key in keys if key not in main]


def is_score(key: str) -> bool:
    """Whether a metric is a score of validation from 0 to 1, of one label or class or of all."""
    parts = key.split("/")
    return parts[0] == "val" and len(parts) > 1 and parts[1] in SCORES


def curves_chart(runs: Sequence[NamedRun], keys: Sequence[str]) -> str:
    """HTML of one panel per metric with the curves of all runs; losses of long runs are smoothed."""

    def draw(theme: Theme) -> Figure:
        figure, panels = _panels(keys, theme, (3.6, 2.3))
        for panel, key in zip(panels, keys, strict=True):
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            curves = [(run, *run.series(key)) for run in runs]
            for run, steps, values in curves:
                if key.startswith("loss") and steps.size >= _SMOOTHED_FROM:
                    panel.plot(steps, values, color=run.colour, linewidth=0.7, alpha=0.3)
                    width = steps.size // 30 | 1
                    padded = np.pad(values, width // 2, mode="reflect")
                    smooth = np.convolve(padded, np.ones(width) / width, mode="valid")
                    panel.plot(steps, smooth, color=run.colour, linewidth=1.6)
                elif steps.size:
                    marker = "o" if steps.size < 25 else None
                    panel.plot(steps, values, color=run.colour, linewidth=1.5, marker=marker, markersize=3)
            drawn = np.concatenate([values for _, _, values in curves])
            if (
                key != "learning_rate"
                and not is_score(key)
                and drawn.size
                and drawn.min() > 0
                and drawn.max() / drawn.min() > 30
            ):
                panel.set_yscale("log")
            if is_score(key):
                panel.set_ylim(-0.02, 1.02)
            if key == "learning_rate":
                panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                panel.yaxis.get_offset_text().set(color=theme.ink, fontsize=8)
        for panel in panels[-_COLUMNS:]:
            panel.set_xlabel("step", fontsize=8, color=theme.ink)
        return figure

    return chart(draw, "Learning curves: " + ", ".join(keys))


def dice_chart(sets: Sequence[ScoreSet]) -> str:
    """HTML of the Dice of every case as a dot, per label and set, with a line at the median."""
    labels = list(dict.fromkeys(name for each in sets for name in each.content["per_label"]))
    width = 0.8 / len(sets)

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(min(max(1.1 * len(labels) * len(sets) ** 0.5 + 1, 4), 11), 2.6), layout="constrained")
        panel = figure.subplots()
        style_axes(panel, theme)
        panel.grid(visible=False, axis="x")
        spread = np.random.default_rng(0)
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
        panel.set_xticks(range(len(labels)), list(map(chart_text, labels)), rotation=30 if len(labels) > 6 else 0)
        panel.set_xlim(-0.6, len(labels) - 0.4)
        panel.set_ylabel("Dice", fontsize=8, color=theme.ink)
        panel.set_ylim(-0.02, 1.02)
        return figure

    return chart(draw, "Dice of every case by label")


def roc_chart(sets: Sequence[ScoreSet]) -> str:
    """HTML of sensitivity against false positives, a line per set; empty where no set holds probabilities.

    Two classes have one panel; of more classes each has its own, against the rest.
    """
    curves = {each.name: (each, roc_of(each)) for each in sets}
    names = list(dict.fromkeys(name for _, found in curves.values() for name in found))[:_MOST_CLASSES]
    if not names:
        return ""

    def draw(theme: Theme) -> Figure:
        figure, panels = _panels([f"ROC of {name}" for name in names], theme, (3.4, 3.3))
        for panel, name in zip(panels, names, strict=True):
            _unit_square(panel, theme, "1 − specificity", "sensitivity")
            for each, found in curves.values():
                if name in found:
                    panel.plot(*found[name], color=each.colour, linewidth=1.4)
        return figure

    return chart(draw, "Receiver operating characteristic: " + ", ".join(names))


def roc_of(scores: ScoreSet) -> dict[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """False positive rate and sensitivity at every threshold, by class: of two the positive one, of more all.

    Classes without a case, or that all cases are of, are left out.
    """
    content = scores.content
    names = [str(name) for name in content.get("classes") or ()] if isinstance(content.get("classes"), list) else []
    rows = [row for row in content["cases"] if row["true_class"] in names and row["probabilities"] is not None]
    try:
        cases = ClassifiedCases(
            probabilities_NK=np.array([row["probabilities"] for row in rows], dtype=np.float64),
            classes_N=np.array([names.index(row["true_class"]) for row in rows], dtype=np.int64),
            class_names=tuple(names),
            patients=tuple(str(row["patient"] or row["id"]) for row in rows),
            predicted_N=np.zeros(len(rows), dtype=np.int64),
            positive=0,
        )
        cases = cases.of_patients() if content["settings"].get("by_patient") is True else cases
    except (DataError, ValueError):
        # Somebody else wrote the file; what is no probability has no curve.
        return {}
    shown = [content["positive"]] if cases.is_binary and content.get("positive") in names else names
    found = {
        name: (cases.probabilities_NK[:, names.index(name)], cases.classes_N == names.index(name)) for name in shown
    }
    return {name: roc_points(*pair) for name, pair in found.items() if 0 < pair[1].sum() < len(pair[1])}


def _panels(titles: Sequence[str], theme: Theme, inches: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each title, at most three side by side, each of a width and height in inches."""
    columns = min(_COLUMNS, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(inches[0] * columns, inches[1] * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    panels = list(grid[: len(titles)])
    for panel, title in zip(panels, titles, strict=True):
        style_axes(panel, theme)
        panel.set_title(chart_text(title), loc="left", fontsize=9, color=theme.ink)
    for panel in grid[len(titles) :]:
        panel.set_visible(False)
    return figure, panels


def _unit_square(panel: Axes, theme: Theme, across: str, up: str) -> None:
    """Give a panel axes from 0 to 1 with a dotted diagonal."""
    panel.plot([0, 1], [0, 1], color=theme.ink, linewidth=0.8, linestyle=":")
    panel.set_xlabel(across, fontsize=8, color=theme.ink)
    panel.set_ylabel(up, fontsize=8, color=theme.ink)
    panel.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))


def reliability_chart(sets: Sequence[ScoreSet]) -> str:
    """HTML of the observed frequency of a class against its predicted probability, a line per set."""

    def draw(theme: Theme) -> Figure:
        figure, (panel,) = _panels(["Calibration"], theme, (3.4, 3.3))
        _unit_square(panel, theme, "mean predicted probability", "observed frequency")
        for each in sets:
            held = [row for row in each.content["reliability"] if row["frequency"] is not None]
            points = [(row["mean_probability"], row["frequency"]) for row in held]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=each.colour, linewidth=1.2)
        return figure

    return chart(draw, "Predicted probability against observed frequency")
