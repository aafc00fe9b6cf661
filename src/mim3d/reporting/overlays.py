"""Segmentations over the scan: reference filled, prediction as a line, in three planes through the label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mim3d.core.types import Spacing
from mim3d.datasets.grid_checks import require_same_grid
from mim3d.reporting.drawing import FILM, FILM_INK, PLANES, Plane, film, grey_range
from mim3d.scans.volumes import read_volume

#: The scan is shown around its labels: this much of their size on every side, and at least so many millimetres.
_MARGIN_RATIO, _MARGIN_MM = 0.35, 15.0
_FILL_OPACITY = 0.35
#: Size in inches of the strip of three planes.
_STRIP_WIDTH, _STRIP_HEIGHT = 7.2, 4.2

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class View:
    """One case ready to be drawn: the region around its labels and the slice of each plane.

    Attributes:
        image: (X, Y, Z) grey values of the region, or None where no image is known.
        reference: (X, Y, Z) label values of the region.
        predictions: the same of every prediction.
        spacing_mm: voxel size.
        slices: index into the region for each plane.
    """

    image: npt.NDArray[Any] | None
    reference: npt.NDArray[Any]
    predictions: tuple[npt.NDArray[Any], ...]
    spacing_mm: Spacing
    slices: tuple[int, ...]


def read_view(reference_path: str, prediction_paths: Sequence[str], image_path: str | None) -> View:
    """Read a case and choose what of it is shown: the same region and slices for every prediction.

    Raises:
        DataError: a file cannot be read, or lies on another grid than the reference.
    """
    reference = read_volume(reference_path, label=True)
    predictions = [read_volume(path, label=True) for path in prediction_paths]
    image = read_volume(image_path) if image_path else None
    for other in (*predictions, *([image] if image else [])):
        require_same_grid(reference.grid, other.grid)
    box = _region([volume.array for volume in (reference, *predictions)], reference.spacing_mm)
    labels = reference.array[box]
    shown = labels if (labels > 0).any() or not predictions else predictions[0].array[box]
    return View(
        image=image.array[box].astype(np.float32) if image else None,
        reference=labels,
        predictions=tuple(volume.array[box] for volume in predictions),
        spacing_mm=reference.spacing_mm,
        slices=tuple(busiest_slice(shown, plane) for plane in PLANES),
    )


def overlay_picture(view: View, prediction: npt.NDArray[Any], colours: Mapping[int, str]) -> str:
    """HTML of the three planes of a case with one of its predictions.

    Args:
        view: the case.
        prediction: one of `view.predictions`.
        colours: label value -> colour; other values are not drawn.
    """
    figure, panels = _side_by_side([plane.extent_mm(prediction.shape, view.spacing_mm) for plane in PLANES])
    for panel, plane, index in zip(panels, PLANES, view.slices, strict=True):
        _draw_plane(panel, plane, index, view, prediction, colours)
    return film(figure, "Reference (filled) and prediction (line) in axial, coronal and sagittal slices")


def _side_by_side(extents_mm: Sequence[tuple[float, float, float, float]]) -> tuple[Figure, list[Axes]]:
    """Panels of one scale in a row, with space above for their titles."""
    gap, title = 0.04, 0.22
    widths, heights = [extent[1] for extent in extents_mm], [extent[3] for extent in extents_mm]
    spare = _STRIP_WIDTH - gap * (len(widths) - 1)
    scale = min(spare / sum(widths), _STRIP_HEIGHT / max(heights))
    tall = scale * max(heights)
    figure = Figure(figsize=(_STRIP_WIDTH, tall + title))
    left = (spare - scale * sum(widths)) / 2
    panels = []
    for width, height in zip(widths, heights, strict=True):
        bottom = (tall - scale * height) / 2
        place = (left / _STRIP_WIDTH, bottom / (tall + title))
        panels.append(figure.add_axes((*place, scale * width / _STRIP_WIDTH, scale * height / (tall + title))))
        left += scale * width + gap
    return figure, panels


def _draw_plane(
    panel: Axes,
    plane: Plane,
    index: int,
    view: View,
    prediction: npt.NDArray[Any],
    colours: Mapping[int, str],
) -> None:
    extent = plane.extent_mm(prediction.shape, view.spacing_mm)
    reference = plane.cut(view.reference, index)
    low, high = grey_range(view.image) if view.image is not None else (0.0, 1.0)
    grey = plane.cut(view.image, index) if view.image is not None else np.zeros(reference.shape)
    panel.imshow(grey, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
    fill = np.zeros((*reference.shape, 4))
    for value, colour in colours.items():
        fill[reference == value] = (*to_rgb(colour), _FILL_OPACITY)
    panel.imshow(fill, extent=extent, interpolation="nearest")
    for value, colour in colours.items():
        mask = np.pad(plane.cut(prediction, index) == value, 1)
        if mask.any():
            across, down = (view.spacing_mm[axis] for axis in (plane.across, plane.down))
            columns = (np.arange(mask.shape[1]) - 0.5) * across
            rows = extent[3] - (np.arange(mask.shape[0]) - 0.5) * down
            panel.contour(columns, rows, mask.astype(float), levels=[0.5], colors=[colour], linewidths=1.2)
    panel.set(xlim=extent[:2], ylim=extent[2:], xticks=[], yticks=[], aspect="equal", facecolor=FILM)
    panel.spines[:].set_visible(False)
    panel.set_title(plane.name, color=FILM_INK, fontsize=8, pad=3)
    for text, place, side in ((plane.left, 0.02, "left"), (plane.right, 0.98, "right")):
        mark = panel.text(place, 0.5, text, transform=panel.transAxes, ha=side, va="center", fontsize=8)
        mark.set(color="white", path_effects=[withStroke(linewidth=1.8, foreground="black")])


def _region(maps: Sequence[npt.NDArray[Any]], spacing_mm: Spacing) -> Box:
    """The box around the labels of all maps with a margin, or the whole scan where there is none."""
    sides = []
    for axis, spacing in enumerate(spacing_mm):
        others = tuple(other for other in range(3) if other != axis)
        held = np.flatnonzero(np.any([(labels > 0).any(axis=others) for labels in maps], axis=0))
        if not held.size:
            return slice(None), slice(None), slice(None)
        first, last = int(held[0]), int(held[-1]) + 1
        margin = int(np.ceil(max(_MARGIN_RATIO * (last - first), _MARGIN_MM / spacing)))
        sides.append(slice(max(0, first - margin), min(maps[0].shape[axis], last + margin)))
    return sides[0], sides[1], sides[2]


def busiest_slice(labels: npt.NDArray[Any], plane: Plane) -> int:
    """The slice that shows most labels, of those the one with the largest; the middle where there is none."""
    values = np.unique(labels[labels > 0])
    if not values.size:
        return labels.shape[plane.axis] // 2
    others = (plane.across, plane.down)
    # The square root lets a small label count beside a large one.
    shown = sum(np.sqrt((labels == value).sum(axis=others)) for value in values)
    return int(np.argmax(shown))
