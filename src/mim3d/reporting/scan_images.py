"""Images of scans: segmentations over the slices of a case, and what a pre-training has reconstructed."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from mim3d.core.errors import DataError
from mim3d.core.types import Spacing
from mim3d.reporting.rendering import FILM, FILM_INK, chart_text, film
from mim3d.scans.grids import require_same_grid
from mim3d.scans.volumes import read_volume
from mim3d.tracking.slices import PLANES, Plane, Volume, grey_range

#: Volumes of a level of pre-training, in the order of their rows.
KINDS = ("original", "masked", "reconstructed")
#: The scan is shown around its labels: this much of their size on every side, and at least so many millimetres.
_MARGIN_RATIO, _MARGIN_MM = 0.35, 15.0
_FILL_OPACITY = 0.35
#: Size in inches of the strip of three planes, the gap between them, and the space above for their titles.
_STRIP_WIDTH, _STRIP_HEIGHT, _GAP, _TITLE = 7.2, 4.2, 0.04, 0.22
#: Hidden patches in the masked image: a colour that no grey scan has.
_HIDDEN = np.array([0.16, 0.24, 0.36])
_CUBE_MM = (1.0, 1.0, 1.0)

#: Volumes (X, Y, Z) by their kind.
Group = Mapping[str, Volume]


@dataclass(frozen=True)
class LabelledRegion:
    """The part of a case around its labels, ready to be drawn.

    Attributes:
        image: Grey values (X, Y, Z) of the region, or None where no image is known.
        reference: Label values (X, Y, Z) of the region.
        predictions: Label values (X, Y, Z) of every prediction.
        spacing_mm: Voxel size in millimetres.
        slices: Index into the region for each plane.
    """

    image: Volume | None
    reference: Volume
    predictions: tuple[Volume, ...]
    spacing_mm: Spacing
    slices: tuple[int, ...]


def read_region(reference_path: str, prediction_paths: Sequence[str], image_path: str | None) -> LabelledRegion:
    """Read a case and choose what of it is shown: the same region and slices for every prediction.

    Raises:
        DataError: A file cannot be read, or lies on another grid than the reference.
    """
    reference = read_volume(reference_path, label=True)
    predictions = [read_volume(path, label=True) for path in prediction_paths]
    image = read_volume(image_path) if image_path else None
    for other in (*predictions, *([image] if image else [])):
        require_same_grid(reference.grid, other.grid)
    # The box around the labels of all maps with a margin, or the whole scan where there is none.
    maps = [volume.array for volume in (reference, *predictions)]
    box = []
    for axis, spacing in enumerate(reference.spacing_mm):
        others = tuple(other for other in range(3) if other != axis)
        held = np.flatnonzero(np.any([(labels > 0).any(axis=others) for labels in maps], axis=0))
        first, last = (int(held[0]), int(held[-1]) + 1) if held.size else (0, maps[0].shape[axis])
        margin = int(np.ceil(max(_MARGIN_RATIO * (last - first), _MARGIN_MM / spacing)))
        box.append(slice(max(0, first - margin), last + margin))
    labels = reference.array[*box]
    shown = labels if (labels > 0).any() or not predictions else predictions[0].array[*box]
    return LabelledRegion(
        image=image.array[*box].astype(np.float32) if image else None,
        reference=labels,
        predictions=tuple(volume.array[*box] for volume in predictions),
        spacing_mm=reference.spacing_mm,
        slices=tuple(_busiest_slice(shown, plane) for plane in PLANES),
    )


def _busiest_slice(labels: Volume, plane: Plane) -> int:
    """The slice that shows most labels, of those the one with the largest; the middle where there is none."""
    values = np.unique(labels[labels > 0])
    if not values.size:
        return labels.shape[plane.axis] // 2
    # The square root lets a small label count beside a large one.
    shown = sum(np.sqrt((labels == value).sum(axis=(plane.across, plane.down))) for value in values)
    return int(np.argmax(shown))


def overlay_image(region: LabelledRegion, prediction: Volume, colours: Mapping[int, str]) -> str:
    """HTML of the three planes of a case: the reference filled, one of its predictions as a line.

    Args:
        region: The case.
        prediction: One of ``region.predictions``.
        colours: Colours by label value; other values are not drawn.
    """
    extents_mm = [plane.extent_mm(prediction.shape, region.spacing_mm) for plane in PLANES]
    widths, heights = [extent[1] for extent in extents_mm], [extent[3] for extent in extents_mm]
    spare = _STRIP_WIDTH - _GAP * (len(widths) - 1)
    scale = min(spare / sum(widths), _STRIP_HEIGHT / max(heights))
    tall = scale * max(heights)
    figure = Figure(figsize=(_STRIP_WIDTH, tall + _TITLE))
    left = (spare - scale * sum(widths)) / 2
    low, high = grey_range(region.image) if region.image is not None else (0.0, 1.0)
    for plane, index, extent in zip(PLANES, region.slices, extents_mm, strict=True):
        width, height = extent[1], extent[3]
        corner = (left / _STRIP_WIDTH, (tall - scale * height) / 2 / (tall + _TITLE))
        panel = figure.add_axes((*corner, scale * width / _STRIP_WIDTH, scale * height / (tall + _TITLE)))
        left += scale * width + _GAP
        reference = plane.cut(region.reference, index)
        grey = plane.cut(region.image, index) if region.image is not None else np.zeros(reference.shape)
        panel.imshow(grey, cmap="gray", vmin=low, vmax=high, extent=extent, interpolation="bilinear")
        fill = np.zeros((*reference.shape, 4))
        for value, colour in colours.items():
            fill[reference == value] = (*to_rgb(colour), _FILL_OPACITY)
        panel.imshow(fill, extent=extent, interpolation="nearest")
        for value, colour in colours.items():
            mask = np.pad(plane.cut(prediction, index) == value, 1)
            if mask.any():
                across, down = (region.spacing_mm[axis] for axis in (plane.across, plane.down))
                columns = (np.arange(mask.shape[1]) - 0.5) * across
                rows = height - (np.arange(mask.shape[0]) - 0.5) * down
                panel.contour(columns, rows, mask.astype(float), levels=[0.5], colors=[colour], linewidths=1.2)
        panel.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
        _hide_axes(panel)
        panel.set_title(plane.name, color=FILM_INK, fontsize=8, pad=3)
        for text, place, side in ((plane.left, 0.02, "left"), (plane.right, 0.98, "right")):
            mark = panel.text(place, 0.5, text, transform=panel.transAxes, ha=side, va="center", fontsize=8)
            mark.set(color="white", path_effects=[withStroke(linewidth=1.8, foreground="black")])
    return film(figure, "Reference (filled) and prediction (line) in axial, coronal and sagittal slices")


def crop_image(crop: Group, colours: Mapping[int, str]) -> str:
    """HTML of a training crop of a segmentation, drawn as by :func:`overlay_image`.

    Args:
        crop: The volumes ``image``, ``reference`` and ``prediction``.
        colours: Colours by label value.
    """
    reference, prediction = crop["reference"], crop["prediction"]
    shown = reference if (reference > 0).any() else prediction
    slices = tuple(_busiest_slice(shown, plane) for plane in PLANES)
    region = LabelledRegion(crop["image"], reference, (prediction,), _CUBE_MM, slices)
    return overlay_image(region, prediction, colours)


def level_image(name: str, level: Group) -> str:
    """HTML of the middle slices of one level of pre-training: a row per kind, a column per plane.

    Args:
        name: Name of the level.
        level: Its original volume, and the masked and the reconstructed one as far as they are known.
    """
    kinds = [kind for kind in KINDS if kind in level]
    figure = Figure(figsize=(4.6, 1.5 * len(kinds) + 0.25), layout=_tight_layout())
    panels = figure.subplots(len(kinds), len(PLANES), squeeze=False)
    low, high = grey_range(level["original"])
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
            _hide_axes(panel)
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
            _hide_axes(panel)
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


def _hide_axes(panel: Axes) -> None:
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
