"""What a pre-training has rebuilt: original, masked and reconstructed volumes (X, Y, Z) of every level."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mim3d.reporting.drawing import FILM, FILM_INK, PLANES, film, grey_range

KINDS = ("original", "masked", "reconstructed")
#: Hidden patches in the masked picture: a colour that no grey scan has.
_HIDDEN = np.array([0.16, 0.24, 0.36])
_CUBE_MM = (1.0, 1.0, 1.0)

Level = Mapping[str, npt.NDArray[np.float64]]


def level_picture(name: str, level: Level) -> str:
    """HTML of the middle slices of one level: a row per kind, a column per plane."""
    kinds = [kind for kind in KINDS if kind in level]
    figure = Figure(figsize=(4.6, 1.5 * len(kinds) + 0.25), layout=_tight())
    panels = figure.subplots(len(kinds), len(PLANES), squeeze=False)
    low, high = grey_range(level["original"])
    for row, kind in zip(panels, kinds, strict=True):
        for panel, plane in zip(row, PLANES, strict=True):
            middle = level[kind].shape[plane.axis] // 2
            pixels = plane.cut(_painted(level, kind, low, high), middle)
            panel.imshow(pixels, extent=plane.extent_mm(level[kind].shape, _CUBE_MM), interpolation="nearest")
            _strip(panel)
        row[0].set_ylabel(kind, color=FILM_INK, fontsize=8)
    for panel, plane in zip(panels[0], PLANES, strict=True):
        panel.set_title(plane.name, color=FILM_INK, fontsize=8)
    return film(figure, f"Level {name}: {', '.join(kinds)}, middle slices")


def history_picture(history: Mapping[int, Mapping[str, Level]]) -> str:
    """HTML of the middle axial slice of every level as rebuilt at some steps of training."""
    steps = list(history)
    names = [name for name, level in history[steps[-1]].items() if "reconstructed" in level]
    figure = Figure(figsize=(1.35 * len(steps) + 0.3, 1.35 * len(names) + 0.25), layout=_tight())
    panels = figure.subplots(len(names), len(steps), squeeze=False)
    plane = PLANES[0]
    for row, name in zip(panels, names, strict=True):
        for panel, step in zip(row, steps, strict=True):
            _strip(panel)
            level = history[step].get(name, {})
            if "reconstructed" in level:
                volume = level["reconstructed"]
                low, high = grey_range(level["original"])
                middle = plane.cut(volume, volume.shape[2] // 2)
                panel.imshow(middle, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        row[0].set_ylabel(name, color=FILM_INK, fontsize=8)
    for panel, step in zip(panels[0], steps, strict=True):
        panel.set_title(f"step {step}", color=FILM_INK, fontsize=8)
    return film(figure, "Reconstructions over training, middle axial slices")


def _painted(level: Level, kind: str, low: float, high: float) -> npt.NDArray[np.float64]:
    """(X, Y, Z, 3) colours: grey, with the hidden patches of the masked volume painted over."""
    grey = np.clip((level[kind] - low) / (high - low), 0, 1)
    colours = np.repeat(np.nan_to_num(grey)[..., None], 3, axis=-1)
    if kind == "masked":
        hidden = level["masked"] != level["original"]
        if "reconstructed" in level:
            # Hidden air is as black as a masked voxel; a reconstruction differs there too.
            hidden |= level["reconstructed"] != level["original"]
        colours[hidden] = _HIDDEN
    return colours


def _tight() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)


def _strip(panel: Axes) -> None:
    panel.set_facecolor(FILM)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
