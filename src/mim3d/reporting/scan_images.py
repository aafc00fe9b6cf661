"""Images from training: the levels that a pre-training has masked and reconstructed."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from mim3d.core.errors import DataError
from mim3d.reporting.rendering import FILM, FILM_INK, chart_text, film
from mim3d.tracking.slices import PLANES, Volume, grey_range

#: Volumes of a level of pre-training, or of a crop, in the order of their rows.
KINDS = ("original", "image", "masked", "reconstructed")
#: Hidden patches in the masked image: a colour that no grey scan has.
_HIDDEN = np.array([0.16, 0.24, 0.36])
_CUBE_MM = (1.0, 1.0, 1.0)

#: Volumes (X, Y, Z) by their kind.
Group = Mapping[str, Volume]


def level_image(name: str, level: Group) -> str:
    """HTML of the middle slices of one level of pre-training, or of a crop: a row per kind, a column per plane.

    Args:
        name: Name of the level.
        level: Its original volume or image, and the masked and the reconstructed one as far as they are known.
    """
    kinds = [kind for kind in KINDS if kind in level]
    figure = Figure(figsize=(4.6, 1.5 * len(kinds) + 0.25), layout=_tight_layout())
    panels = figure.subplots(len(kinds), len(PLANES), squeeze=False)
    low, high = grey_range(level[kinds[0]])
    for row, kind in zip(panels, kinds, strict=True):
        grey = np.clip((level[kind] - low) / (high - low), 0, 1)
        pixels = np.repeat(np.nan_to_num(grey)[..., None], 3, axis=-1)
        if kind == "masked":
            hidden = level["masked"] != level["original"]
            if "reconstructed" in level:
                # Hidden air is as black as a masked voxel; a reconstruction differs there too.
                hidden |= level["reconstructed"] != level["original"]
            pixels[hidden] = _HIDDEN
        for panel, plane in zip(row, PLANES, strict=True):
            extent = plane.extent_mm(level[kind].shape, _CUBE_MM)
            panel.imshow(plane.middle(pixels), extent=extent, interpolation="nearest")
            hide_axes(panel)
        row[0].set_ylabel(kind, color=FILM_INK, fontsize=8)
    for panel, plane in zip(panels[0], PLANES, strict=True):
        panel.set_title(plane.name, color=FILM_INK, fontsize=8)
    return film(figure, f"Level {name}: {', '.join(kinds)}, middle slices")


def history_image(history: Mapping[int, Mapping[str, Group]]) -> str:
    """HTML of the middle axial slice of every level as reconstructed at some steps of training.

    Args:
        history: Levels by name, by step of training.
    """
    steps = list(history)
    names = [name for name, level in history[steps[-1]].items() if "reconstructed" in level]
    figure = Figure(figsize=(1.35 * len(steps) + 0.3, 1.35 * len(names) + 0.25), layout=_tight_layout())
    panels = figure.subplots(len(names), len(steps), squeeze=False)
    for row, name in zip(panels, names, strict=True):
        for panel, step in zip(row, steps, strict=True):
            hide_axes(panel)
            level = history[step].get(name, {})
            if "reconstructed" in level:
                low, high = grey_range(level["original"])
                middle = PLANES[0].middle(level["reconstructed"])
                panel.imshow(middle, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        row[0].set_ylabel(chart_text(name), color=FILM_INK, fontsize=8)
    for panel, step in zip(panels[0], steps, strict=True):
        panel.set_title(f"step {step}", color=FILM_INK, fontsize=8)
    return film(figure, "Reconstructions over training, middle axial slices")


def _tight_layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)


def hide_axes(panel: Axes) -> None:
    """Leave nothing of a panel's axes but its black ground."""
    panel.set(xticks=[], yticks=[], facecolor=FILM)
    panel.spines[:].set_visible(False)


def read_training_images(path: Path) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """Volumes (X, Y, Z) that a run saved at one step, ``coarse/original`` as ``["coarse"]["original"]``.

    Raises:
        DataError: The file cannot be read.
    """
    groups: dict[str, dict[str, npt.NDArray[Any]]] = {}
    try:
        with np.load(path, allow_pickle=False) as volumes:
            for key in volumes.files:
                name, _, kind = key.rpartition("/")
                volume = volumes[key]
                if volume.ndim == 3:
                    groups.setdefault(name or kind, {})[kind] = volume
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: these images cannot be read ({error}).") from error
    return groups
