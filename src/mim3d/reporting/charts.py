"""Charts of a report: learning curves, the Dice of every case, and the calibration of classifiers."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mim3d.reporting.rendering import Theme, chart, chart_text, style_axes
from mim3d.reporting.sources import NamedRun, ScoreSet, is_number

#: Keys of a metrics line that are no learning curve.
NOT_CURVES = {"step", "time_s"}
_COLUMNS = 3
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


def curves_chart(runs: Sequence[NamedRun], keys: Sequence[str]) -> str:
    """HTML of one panel per metric with the curves of all runs; losses of long runs are smoothed."""

    def draw(theme: Theme) -> Figure:
        columns = min(_COLUMNS, len(keys))
        rows = -(-len(keys) // columns)
        figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, key in zip(panels, keys, strict=False):
            style_axes(panel, theme)
            panel.set_title(chart_text(key), loc="left", fontsize=9, color=theme.ink)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
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
            if key != "learning_rate" and drawn.size and drawn.min() > 0 and drawn.max() / drawn.min() > 30:
                panel.set_yscale("log")
            if key == "learning_rate":
                panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
                panel.yaxis.get_offset_text().set(color=theme.ink, fontsize=8)
        for panel in panels[len(keys) :]:
            panel.set_visible(False)
        for panel in panels[max(0, len(keys) - columns) : len(keys)]:
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
        panel.set_ylim(top=1.02)
        return figure

    return chart(draw, "Dice of every case by label")


def reliability_chart(sets: Sequence[ScoreSet]) -> str:
    """HTML of the observed frequency of a class against its predicted probability, a line per set."""

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(3.4, 3.2), layout="constrained")
        panel = figure.subplots()
        style_axes(panel, theme)
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

    return chart(draw, "Predicted probability against observed frequency")
