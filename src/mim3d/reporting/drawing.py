"""What every drawing of a report shares: colours, the axes of a chart, and the way from a figure into HTML."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mim3d.reporting.rendering import render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours after the first ones of either kind: "tab20" of matplotlib.
_MORE = """
    #1f77b4 #aec7e8 #ff7f0e #ffbb78 #2ca02c #98df8a #d62728 #ff9896 #9467bd #c5b0d5
    #8c564b #c49c94 #e377c2 #f7b6d2 #7f7f7f #c7c7c7 #bcbd22 #dbdb8d #17becf #9edae5
""".split()
#: Runs on a chart: told apart with colour-blind eyes too, on white and on black (after Okabe and Ito).
RUN_COLOURS = ("#1f86cc", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee7", "#b8a400")
#: Labels over a grey scan: bright.
LABEL_COLOURS = ("#35b6ff", "#ffb000", "#2fe08a", "#ff6ec7", "#ff7043", "#b79cff", "#ffe14d", "#5fe3d6")
FILM, FILM_INK = "#000000", "#d0d0d0"
_DPI = 130


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a chart on a light or a dark page.

    Attributes:
        ink: Colour of text and lines.
        grid: Colour of the grid behind the data.
    """

    ink: str
    grid: str


LIGHT = Theme(ink="#33373d", grid="#dddfe3")
DARK = Theme(ink="#c9ccd1", grid="#3a3f46")


def run_colour(position: int) -> str:
    """Colour of the run at a position. Colours repeat only after 28 runs."""
    return _colour(RUN_COLOURS, position)


def label_colour(position: int) -> str:
    """Colour of the label at a position. Colours repeat only after 28 labels."""
    return _colour(LABEL_COLOURS, position)


def _colour(first: Sequence[str], position: int) -> str:
    return first[position] if position < len(first) else _MORE[(position - len(first)) % len(_MORE)]


def chart(draw: Callable[[Theme], "Figure"], alt: str) -> str:
    """HTML of a chart that is drawn twice and follows the reader's light or dark page; it is light in print."""
    return render("chart.html", light=_encode(draw(LIGHT), "none"), dark=_encode(draw(DARK), "none"), alt=alt)


def film(figure: "Figure", alt: str) -> str:
    """HTML of slices of a scan: black around them on any page, as on a reading screen."""
    return render("film.html", source=_encode(figure, FILM), alt=alt)


def _encode(figure: "Figure", face: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor=face)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def style_axes(axes: "Axes", theme: Theme) -> None:
    """Give a chart's axes the colours of its page."""
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.ink, labelsize=8, length=3)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
        spine.set_linewidth(0.6)
