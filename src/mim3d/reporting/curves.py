"""Learning curves: every metric of the runs, those of one kind drawn into one panel."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mim3d.reporting.drawing import Theme, chart, dress

#: Keys of a metrics line that are no curve of learning.
NOT_CURVES = {"step", "time_s"}
_COLUMNS = 3
_SMOOTHED_FROM = 60


@dataclass(frozen=True)
class Curves:
    """The metrics of one run, with the colour that stands for it."""

    name: str
    colour: str
    metrics: Sequence[Mapping[str, Any]]

    def series(self, key: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Steps and finite values of a metric."""
        points = [(line["step"], line[key]) for line in self.metrics if _is_number(line.get(key))]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(np.isfinite(value))


def metric_names(runs: Iterable[Curves]) -> tuple[list[str], list[str]]:
    """Names of the metrics that matter (losses, validation, learning rate), and of all others."""
    names = {key: None for run in runs for line in run.metrics for key, value in line.items() if _is_number(value)}
    keys = [key for key in names if key not in NOT_CURVES]
    groups = (
        [key for key in keys if key == "loss"],
        [key for key in keys if key.startswith("loss/")],
        [key for key in keys if key.startswith("val/") and key.count("/") == 1],
        [key for key in keys if key == "learning_rate"],
    )
    main = [key for group in groups for key in group]
    return main, [key for key in keys if key not in main]


def curves_picture(runs: Sequence[Curves], keys: Sequence[str]) -> str:
    """HTML of one panel per metric, all runs in each."""
    return chart(lambda theme: _draw(runs, keys, theme), "Learning curves: " + ", ".join(keys))


def _draw(runs: Sequence[Curves], keys: Sequence[str], theme: Theme) -> Figure:
    columns = min(_COLUMNS, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, key in zip(panels, keys, strict=False):
        dress(panel, theme)
        panel.set_title(key, loc="left", fontsize=9, color=theme.ink)
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        lowest, highest = np.inf, 0.0
        for run in runs:
            steps, values = run.series(key)
            if steps.size:
                _draw_run(panel, steps, values, run.colour, smooth=key.startswith("loss"))
                lowest, highest = min(lowest, values.min()), max(highest, values.max())
        if key != "learning_rate" and lowest > 0 and highest / lowest > 30:
            panel.set_yscale("log")
        if key == "learning_rate":
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            panel.yaxis.get_offset_text().set(color=theme.ink, fontsize=8)
    for panel in panels[len(keys) :]:
        panel.set_visible(False)
    for panel in panels[max(0, len(keys) - columns) : len(keys)]:
        panel.set_xlabel("step", fontsize=8, color=theme.ink)
    return figure


def _draw_run(
    panel: Axes,
    steps: npt.NDArray[np.float64],
    values: npt.NDArray[np.float64],
    colour: str,
    *,
    smooth: bool,
) -> None:
    if not smooth or steps.size < _SMOOTHED_FROM:
        marker = "o" if steps.size < 25 else None
        panel.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3)
        return
    panel.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
    width = steps.size // 30 | 1
    padded = np.pad(values, width // 2, mode="reflect")
    panel.plot(steps, np.convolve(padded, np.ones(width) / width, mode="valid"), color=colour, linewidth=1.6)
