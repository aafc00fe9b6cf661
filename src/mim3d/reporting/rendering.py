"""How values become text and images: templates filled by jinja2, numbers, colours, and figures within HTML.

The templates are those of the report, of the tables for a paper and of READMEs.
"""

import base64
import colorsys
import functools
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mim3d.core.names import printable

if TYPE_CHECKING:
    import jinja2
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "–": "--",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    **{mark: "\\" + mark for mark in "&%$#_"},
}
#: Runs on a chart: told apart with colour-blind eyes too, on white and on black (after Okabe and Ito).
RUN_COLOURS = ("#1f86cc", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee7", "#b8a400")
#: The first labels over a grey scan, reference and prediction of each: bright, and apart for colour-blind eyes too.
LABEL_COLOURS = (("#35b6ff", "#ffb000"), ("#2fe08a", "#ff6ec7"), ("#ff7043", "#5fe3d6"), ("#b79cff", "#ffe14d"))
#: Around slices of a scan, and text on it.
FILM, FILM_INK = "#000000", "#d0d0d0"
_DPI = 130


def render(template: str, **values: Any) -> str:
    """Fill a template of this package.

    Args:
        template: File name of the template. What is put into HTML is escaped, unless it was rendered here itself.
        values: Values by the names that the template uses.

    Returns:
        The text.

    Raises:
        jinja2.UndefinedError: The template uses a name that has no value.
    """
    from markupsafe import Markup

    text = _environment().get_template(template).render(values)
    return Markup(text) if template.endswith(".html") else text


@functools.cache
def _environment() -> "jinja2.Environment":
    import jinja2
    from markupsafe import Markup, escape

    def harmless(value: Any) -> Any:
        # What was rendered here is trusted; names of files, cases and labels are not.
        return printable(value, keep="\n\t") if type(value) is str else value

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mim3d.reporting"),
        finalize=harmless,
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )

    def breakable(name: str) -> str:
        # A narrow column may break it after an underscore, a dash or a slash.
        return Markup(re.sub(r"([_\-/])", r"\1<wbr>", str(escape(name))))

    def latex(text: str) -> str:
        written = "".join(_LATEX.get(mark, mark) for mark in printable(text.replace("\n", " ")))
        # At the start of a row LaTeX takes these for an argument of the line end before it.
        return f"{{}}{written}" if written.startswith(("[", "*")) else written

    def markdown(text: str) -> str:
        return re.sub(r"([\\`*_{}|<>#~]|(?<=\])\()", r"\\\1", printable(text.replace("\n", " ")))

    filters = {"breakable": breakable, "interval": interval, "latex": latex, "markdown": markdown, "number": number}
    environment.filters |= filters
    return environment


def number(value: float | None, decimals: int) -> str:
    """A number with a true minus sign and none before a zero; a dash where it is not defined."""
    if value is None:
        return "–"
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def interval(ends: Sequence[float] | None, decimals: int) -> str:
    """An interval as "low to high", empty where there is none."""
    return f"{number(ends[0], decimals)} to {number(ends[1], decimals)}" if ends else ""


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
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    count = len(RUN_COLOURS)
    return RUN_COLOURS[position] if position < count else to_hex(colormaps["tab20"]((position - count) % 20))


@dataclass(frozen=True)
class LabelColours:
    """Colours of a label over a scan.

    Attributes:
        reference: Colour of its reference, ``#rrggbb``.
        prediction: Colour of its prediction, ``#rrggbb``.
    """

    reference: str
    prediction: str


def label_colours(position: int) -> LabelColours:
    """Colours of the label at a position: a strong one for the reference, and another for the prediction.

    After the first labels the prediction has the hue of its reference, but pale, so that many labels stay apart.
    """
    if position < len(LABEL_COLOURS):
        return LabelColours(*LABEL_COLOURS[position])
    # Steps of the golden ratio never meet a hue again.
    hue = position * 0.618034 % 1
    shades = [colorsys.hls_to_rgb(hue, light, 1.0) for light in (0.55, 0.85)]
    return LabelColours(*("#" + "".join(f"{round(255 * part):02x}" for part in shade) for shade in shades))


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


def chart_text(name: str) -> str:
    """A name as text of a chart, in which dollar signs do not begin a formula."""
    return printable(name).replace("$", r"\$")


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
