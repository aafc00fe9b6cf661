"""Segmentations over slices of a scan: three planes through the labels, and a row of slices along one of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from mim3d.core.types import Spacing, Triple
from mim3d.reporting.rendering import FILM_INK, LabelColours, film
from mim3d.reporting.scan_images import hide_axes
from mim3d.scans.grids import require_same_grid
from mim3d.scans.volumes import read_volume
from mim3d.tracking.slices import PLANES, Plane, Volume, grey_range

#: The scan is shown around its labels: this much of their size on every side, and at least so many millimetres.
_MARGIN_RATIO, _MARGIN_MM = 0.35, 15.0
_FILL_OPACITY = 0.3
#: Sizes in inches: width of the image, greatest height of the planes and of a slice of the row, gap, and space above
#: each for its title.
_WIDTH, _PLANE_HEIGHT, _SLICE_HEIGHT, _GAP, _TITLE = 7.2, 4.2, 2.2, 0.04, 0.2
#: Most slices of the row.
_NUM_SLICES = 6
#: Lengths of the scale in millimetres; the longest is drawn that takes up to a third of the panel.
_SCALES_MM = (1, 2, 5, 10, 20, 50, 100)
_AXES = "xyz"


@dataclass(frozen=True)
class LabelledRegion:
    """The part of a case around its labels, ready to be drawn.

    Attributes:
        image: Grey values (X, Y, Z) of the region, or None where no image is known.
        reference: Label values (X, Y, Z) of the region.
        predictions: Label values (X, Y, Z) of every prediction.
        spacing_mm: Voxel size in millimetres; of a training crop in voxels, 1.
        first: Index in the scan of the region's first voxel along X, Y, Z.
        shape: Number of voxels of the whole scan along X, Y, Z.
        affine: (4, 4), index in the scan to RAS millimetres, or None of a training crop, whose place is not known.
    """

    image: Volume | None
    reference: Volume
    predictions: tuple[Volume, ...]
    spacing_mm: Spacing
    first: Triple = (0, 0, 0)
    shape: Triple | None = None
    affine: npt.NDArray[np.float64] | None = None

    @property
    def shown(self) -> Volume:
        """The labels by which slices are chosen: the reference, or the first prediction where that is empty."""
        return self.reference if (self.reference > 0).any() or not self.predictions else self.predictions[0]

    @property
    def window(self) -> tuple[float, float]:
        """Grey values shown as black and as white."""
        return grey_range(self.image) if self.image is not None else (0.0, 1.0)

    def title(self, plane: Plane, index: int, *, short: bool = False) -> str:
        """Where a slice lies: its number in the whole scan, and its place in the scan's own millimetres."""
        number = self.first[plane.axis] + index
        name = "" if short else f"{plane.name} "
        total = f"/{(self.shape or self.reference.shape)[plane.axis]}" if not short else ""
        if self.affine is None:
            return f"{name}{number + 1}{total}"
        middle = [(size - 1) / 2 for size in (self.shape or self.reference.shape)]
        middle[plane.axis] = number
        # In an oblique scan it is that of the slice's middle.
        place_mm = float((self.affine @ [*middle, 1.0])[plane.axis])
        return f"{name}{number + 1}{total}, {_AXES[plane.axis]} {place_mm:.0f} mm".replace("-", "\N{MINUS SIGN}")


def read_region(reference_path: str, prediction_paths: Sequence[str], image_path: str | None) -> LabelledRegion:
    """Read a case and cut out what of it is shown: the same region for every prediction.

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
    return LabelledRegion(
        image=image.array[*box].astype(np.float32) if image else None,
        reference=reference.array[*box],
        predictions=tuple(volume.array[*box] for volume in predictions),
        spacing_mm=reference.spacing_mm,
        first=(box[0].start, box[1].start, box[2].start),
        shape=reference.grid.ras_shape,
        affine=reference.affine,
    )


def busiest_slice(labels: Volume, plane: Plane) -> int:
    """The slice that shows most labels, of those the one with the largest; the middle where there is none."""
    values = np.unique(labels[labels > 0])
    if not values.size:
        return labels.shape[plane.axis] // 2
    # The square root lets a small label count beside a large one.
    shown = sum(np.sqrt((labels == value).sum(axis=(plane.across, plane.down))) for value in values)
    return int(np.argmax(shown))


def slices_through(labels: Volume, spacing_mm: Spacing) -> tuple[Plane, list[int]]:
    """Slices from the first to the last that holds a label, in the plane of the thickest slices; axial among equal."""
    plane = max(PLANES, key=lambda each: round(spacing_mm[each.axis], 2))
    held = np.flatnonzero((labels > 0).any(axis=(plane.across, plane.down)))
    first, last = (int(held[0]), int(held[-1])) if held.size else (0, labels.shape[plane.axis] - 1)
    count = min(_NUM_SLICES, last - first + 1)
    # Not the outermost ones, which hold next to nothing.
    places = first + (np.arange(count) + 0.5) * (last - first + 1) / count
    return plane, [int(place) for place in places]


def overlay_image(region: LabelledRegion, prediction: Volume, colours: Mapping[int, LabelColours]) -> str:
    """HTML of a case: three planes, and slices along one. The reference is filled, its prediction a broken line.

    Args:
        region: The case.
        prediction: One of ``region.predictions``.
        colours: Colours by label value; other values are not drawn.
    """
    planes = [(plane, busiest_slice(region.shown, plane)) for plane in PLANES]
    plane, indices = slices_through(region.shown, region.spacing_mm)
    sizes_mm = [each.extent_mm(prediction.shape, region.spacing_mm)[1::2] for each, _ in planes]
    width_mm, height_mm = plane.extent_mm(prediction.shape, region.spacing_mm)[1::2]
    spare = _WIDTH - _GAP * (len(planes) - 1)
    scale = min(spare / sum(width for width, _ in sizes_mm), _PLANE_HEIGHT / max(height for _, height in sizes_mm))
    tall = scale * max(height for _, height in sizes_mm)
    across = (_WIDTH - _GAP * (_NUM_SLICES - 1)) / _NUM_SLICES
    small = min(across / width_mm, _SLICE_HEIGHT / height_mm)
    low = small * height_mm
    total = tall + low + 2 * _TITLE
    figure = Figure(figsize=(_WIDTH, total))
    window = region.window

    def panel(left: float, bottom: float, width: float, height: float) -> Axes:
        return figure.add_axes((left / _WIDTH, bottom / total, width / _WIDTH, height / total))

    left = (spare - scale * sum(width for width, _ in sizes_mm)) / 2
    for (each, index), (width, height) in zip(planes, sizes_mm, strict=True):
        bottom = low + _TITLE + (tall - scale * height) / 2
        axes = panel(left, bottom, scale * width, scale * height)
        left += scale * width + _GAP
        _draw_slice(axes, region, prediction, each, index, colours, window)
        axes.set_title(region.title(each, index), color=FILM_INK, fontsize=8, pad=3)
        _mark_sides(axes, each)
        if region.affine is not None:
            _draw_scale(axes, width, height, scale)
    left = (_WIDTH - len(indices) * across - (len(indices) - 1) * _GAP) / 2
    for index in indices:
        axes = panel(left + (across - small * width_mm) / 2, 0.0, small * width_mm, low)
        left += across + _GAP
        _draw_slice(axes, region, prediction, plane, index, colours, window)
        axes.set_title(region.title(plane, index, short=True), color=FILM_INK, fontsize=7, pad=2)
    names = f"axial, coronal and sagittal slices, and {len(indices)} {plane.name} ones"
    return film(figure, f"Reference (filled, solid line) and prediction (broken line) in {names}")


def _draw_slice(
    panel: Axes,
    region: LabelledRegion,
    prediction: Volume,
    plane: Plane,
    index: int,
    colours: Mapping[int, LabelColours],
    window: tuple[float, float],
) -> None:
    """Draw the scan, the reference with its border, and the border of the prediction."""
    extent = plane.extent_mm(prediction.shape, region.spacing_mm)
    reference, predicted = plane.cut(region.reference, index), plane.cut(prediction, index)
    grey = plane.cut(region.image, index) if region.image is not None else np.zeros(reference.shape)
    panel.imshow(grey, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="bilinear")
    fill = np.zeros((*reference.shape, 4))
    across, down = (region.spacing_mm[axis] for axis in (plane.across, plane.down))
    columns = (np.arange(reference.shape[1] + 2) - 0.5) * across
    rows = extent[3] - (np.arange(reference.shape[0] + 2) - 0.5) * down
    for value, colour in colours.items():
        fill[reference == value] = (*to_rgb(colour.reference), _FILL_OPACITY)
    panel.imshow(fill, extent=extent, interpolation="nearest")
    # Predictions lie over all references.
    for labels, kind, style, width in (
        (reference, "reference", "solid", 0.9),
        (predicted, "prediction", "dashed", 1.3),
    ):
        for value, colour in colours.items():
            mask = np.pad(labels == value, 1).astype(float)
            if mask.any():
                line = getattr(colour, kind)
                panel.contour(columns, rows, mask, levels=[0.5], colors=[line], linestyles=[style], linewidths=width)
    panel.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    hide_axes(panel)


def _mark_sides(panel: Axes, plane: Plane) -> None:
    """Write the letters of the patient's sides."""
    for text, place, side in ((plane.left, 0.02, "left"), (plane.right, 0.98, "right")):
        mark = panel.text(place, 0.5, text, transform=panel.transAxes, ha=side, va="center", fontsize=8)
        mark.set(color="white", path_effects=[withStroke(linewidth=1.8, foreground="black")])


def _draw_scale(panel: Axes, width_mm: float, height_mm: float, inches_per_mm: float) -> None:
    """Draw a length in the lower left corner, and write how many millimetres it is."""
    fitting = [length for length in _SCALES_MM if length <= width_mm / 3]
    if not fitting:
        return
    x, y = 0.06 / inches_per_mm, 0.07 / inches_per_mm
    halo = [withStroke(linewidth=3.4, foreground="black")]
    panel.plot([x, x + fitting[-1]], [y, y], color="white", linewidth=1.8, solid_capstyle="butt", path_effects=halo)
    text = panel.text(x, y + 0.04 / inches_per_mm, f"{fitting[-1]} mm", color="white", fontsize=7, va="bottom")
    text.set_path_effects([withStroke(linewidth=1.8, foreground="black")])


def crop_image(crop: Mapping[str, Volume], colours: Mapping[int, LabelColours]) -> str:
    """HTML of a training crop of a segmentation, drawn as by :func:`overlay_image`.

    Args:
        crop: The volumes ``image``, ``reference`` and ``prediction``.
        colours: Colours by label value.
    """
    region = LabelledRegion(crop["image"], crop["reference"], (crop["prediction"],), (1.0, 1.0, 1.0))
    return overlay_image(region, crop["prediction"], colours)
