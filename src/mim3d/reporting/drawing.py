"""What every picture of a report shares: colours, anatomical planes, and the way from a figure into HTML."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mim3d.core.types import Spacing

#: Runs on a chart: told apart with colour-blind eyes too, on white and on black (after Okabe and Ito).
RUN_COLOURS = ("#1f86cc", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee7", "#b8a400")
#: Labels over a grey scan: bright.
LABEL_COLOURS = ("#35b6ff", "#ffb000", "#2fe08a", "#ff6ec7", "#ff7043", "#b79cff", "#ffe14d", "#5fe3d6")
FILM, FILM_INK = "#000000", "#d0d0d0"
_DPI = 130


@dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of a chart on a light or a dark page."""

    ink: str
    grid: str


LIGHT = Theme(ink="#33373d", grid="#dddfe3")
DARK = Theme(ink="#c9ccd1", grid="#3a3f46")


@dataclass(frozen=True)
class Plane:
    """An anatomical plane of an (X, Y, Z) array along RAS+ axes, shown in the radiological convention.

    Attributes:
        name: axial, coronal or sagittal.
        axis: array axis perpendicular to the plane.
        across: array axis that runs from left to right on the page, reversed.
        down: array axis that runs from top to bottom on the page, reversed.
        left: what lies on the left of the page.
        right: what lies on the right.
    """

    name: str
    axis: int
    across: int
    down: int
    left: str
    right: str

    def cut(self, array: npt.NDArray[Any], index: int) -> npt.NDArray[Any]:
        """The slice at an index, as rows from the top of the page: anterior or superior first, right side left."""
        flat = np.moveaxis(array, (self.axis, self.down, self.across), (0, 1, 2))[index]
        return flat[::-1, ::-1]

    def extent_mm(self, shape: Sequence[int], spacing_mm: Spacing) -> tuple[float, float, float, float]:
        """Borders of a slice for `imshow`, in millimetres from its lower left corner."""
        return (
            0.0,
            shape[self.across] * spacing_mm[self.across],
            0.0,
            shape[self.down] * spacing_mm[self.down],
        )


PLANES = (
    Plane("axial", axis=2, across=0, down=1, left="R", right="L"),
    Plane("coronal", axis=1, across=0, down=2, left="R", right="L"),
    Plane("sagittal", axis=0, across=1, down=2, left="A", right="P"),
)


def run_colour(position: int) -> str:
    """Colour of the run at a position; they repeat only after 28."""
    return _colour(RUN_COLOURS, position)


def label_colour(position: int) -> str:
    """Colour of the label at a position; they repeat only after 28."""
    return _colour(LABEL_COLOURS, position)


def _colour(first: Sequence[str], position: int) -> str:
    if position < len(first):
        return first[position]
    more = colormaps["tab20"].colors  # type: ignore[attr-defined]
    return to_hex(more[(position - len(first)) % len(more)])


def chart(draw: Callable[[Theme], Figure], alt: str) -> str:
    """HTML of a chart that is drawn twice and follows the reader's light or dark page; light in print."""
    light, dark = _encode(draw(LIGHT), "none"), _encode(draw(DARK), "none")
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="chart" src="{light}" alt="{escape(alt)}"></picture>'
    )


def film(figure: Figure, alt: str) -> str:
    """HTML of scan pictures: black around them on any page, as on a reading screen."""
    return f'<img class="film" src="{_encode(figure, FILM)}" alt="{escape(alt)}">'


def _encode(figure: Figure, face: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor=face)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def dress(axes: Axes, theme: Theme) -> None:
    """Give a chart's axes the colours of its page."""
    axes.set_facecolor("none")
    axes.tick_params(colors=theme.ink, labelsize=8, length=3)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.ink)
        spine.set_linewidth(0.6)


def grey_range(array: npt.NDArray[Any]) -> tuple[float, float]:
    """Black and white point of a grey picture: all but the darkest and brightest half per cent."""
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(finite, (0.5, 99.5)))
    return (low, high) if high > low else (low, low + 1.0)
