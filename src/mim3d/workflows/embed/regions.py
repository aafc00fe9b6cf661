"""Which parts of scans have rows of their own: labels of masks, and boxes of a table."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.preprocessing import Prepared
from mim3d.core.errors import DataError, listed
from mim3d.core.names import number_of, printable
from mim3d.datasets.cases import Case
from mim3d.datasets.lists import beside, channel_names, read_table
from mim3d.datasets.references import ID_COLUMNS, masks_of
from mim3d.inference.features import BoxRegions, LabelRegions, Regions, SampledAxis
from mim3d.scans.grids import Grid, require_same_grid, resolved
from mim3d.scans.volumes import read_grid, read_volume

#: Columns of the ends of a box, in voxels; with ``_mm`` behind each in millimetres.
ENDS = ("x_min", "y_min", "z_min", "x_max", "y_max", "z_max")


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box in a scan.

    Attributes:
        name: What its row is called.
        ends: First and last place along the three axes, (x_min, y_min, z_min, x_max, y_max, z_max).
        in_mm: Whether they are RAS millimetres; else voxels as the file stores them, the last excluded.
    """

    name: str
    ends: tuple[float, ...]
    in_mm: bool

    def in_voxels(self, grid: Grid) -> tuple[npt.NDArray[np.int64], bool]:
        """First and last voxel (excluded), (3, 2), along the RAS+ axes of a scan: those whose centres lie in the box.

        Returns:
            The voxels, and whether the box was cut as it reaches beyond the scan.

        Raises:
            DataError: The box lies outside of the scan.
        """
        low, high = np.array(self.ends[:3]), np.array(self.ends[3:])
        to_mm = np.eye(4) if self.in_mm else grid.affine
        if not self.in_mm:
            low, high = low - 0.5, high - 0.5
        corners = np.array([*itertools.product(*zip(low, high, strict=True))])
        places = np.linalg.inv(grid.ras_affine) @ to_mm @ np.c_[corners, np.ones(8)].T
        # Rounding of headers must not leave out a voxel whose centre lies on a face.
        first = np.ceil(places[:3].min(1) - 1e-4).astype(np.int64)
        last = np.floor(places[:3].max(1) + 1e-4).astype(np.int64) + 1
        # A box that is thinner than a voxel is the voxel around it.
        middle = np.rint(places[:3].mean(1)).astype(np.int64)
        first, last = np.where(first < last, first, middle), np.where(first < last, last, middle + 1)
        is_cut = bool((first < 0).any() or (last > grid.ras_shape).any())
        first, last = np.maximum(first, 0), np.minimum(last, grid.ras_shape)
        if (first >= last).any():
            unit = "mm" if self.in_mm else "voxels"
            ends = ", ".join(f"{value:g}" for value in self.ends)
            raise DataError(
                f"{grid.path}: the box {self.name} ({ends} {unit}) lies outside of it ({grid.describe()}); correct the "
                "box, and whether it is in voxels or millimetres."
            )
        return np.stack([first, last], axis=1), is_cut


@dataclass(frozen=True, eq=False)
class ScanRegions:
    """The regions of one scan, on its own grid.

    Attributes:
        names: Name of each, in its order.
        grid: The scan's own grid.
        array: Label map (X, Y, Z) along RAS+ axes; None for boxes.
        values: Label value of each region; empty for boxes.
        boxes: (R, 3, 2) voxels of each box; None for labels.
        notes: Sentences on what of them was changed.
    """

    names: tuple[str, ...]
    grid: Grid
    array: npt.NDArray[Any] | None = None
    values: tuple[int, ...] = ()
    boxes: npt.NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()

    def on(self, prepared: Prepared) -> Regions:
        """The regions on a scan as it is prepared, by the voxels of the scan's own grid."""
        x, y, z = (
            SampledAxis.between(size, mm, voxels, voxel_mm)
            for size, mm, voxels, voxel_mm in zip(
                self.grid.ras_shape, self.grid.spacing_mm, prepared.image.shape[1:], prepared.spacing_mm, strict=True
            )
        )
        if self.array is not None:
            return LabelRegions(self.array, self.values, (x, y, z))
        assert self.boxes is not None
        return BoxRegions(self.boxes, (x, y, z))

    @property
    def voxel_ml(self) -> float:
        """Millilitres of a voxel of the scan's own grid."""
        return math.prod(self.grid.spacing_mm) / 1000


@dataclass(frozen=True, kw_only=True)
class RegionSource:
    """Where the regions of scans come from.

    Attributes:
        masks: Label map of each scan that has one, by id.
        labels: Label value -> name; empty where nothing is declared.
        ignore_label: Value of voxels that nothing is known of.
        boxes: Boxes of each scan that has some, by id.
    """

    masks: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[int, str] = field(default_factory=dict)
    ignore_label: int | None = None
    boxes: Mapping[str, Sequence[Box]] = field(default_factory=dict)

    @classmethod
    def of(cls, cases: Sequence[Case], masks: str | None, boxes: str | None) -> "RegionSource":
        """The regions of scans.

        Args:
            cases: The scans.
            masks: Label maps in any form, or None.
            boxes: Table of boxes, or None.

        Raises:
            DataError: They cannot be read, or belong to none of the scans.
        """
        if masks is not None:
            found = masks_of(masks, cases)
            _say_unmatched(cases, found.paths, "a mask")
            return cls(masks=found.paths, labels=found.labels, ignore_label=found.ignore_label)
        if boxes is not None:
            of_scans = read_boxes(boxes, cases)
            _say_unmatched(cases, of_scans, "a box")
            return cls(boxes=of_scans)
        return cls()

    def describe(self, case: Case) -> dict[str, Any]:
        """What the regions of a scan come from, besides the content of its mask, as plain values."""
        boxes = [[box.name, list(box.ends), box.in_mm] for box in self.boxes.get(case.id, ())]
        return {"boxes": boxes} if boxes else {}

    def read(self, case: Case) -> ScanRegions | None:
        """The regions of a scan; None where there are none for it.

        Raises:
            DataError: A mask cannot be used, or a box lies outside of the scan.
        """
        if case.id in self.boxes:
            grid, boxes = read_grid(case.images[0]), self.boxes[case.id]
            places, cut = zip(*(box.in_voxels(grid) for box in boxes), strict=True)
            beyond = [box.name for box, is_cut in zip(boxes, cut, strict=True) if is_cut]
            notes = (
                (f"Boxes reach beyond the scan and are cut: {listed(beyond)}; check their units.",) if beyond else ()
            )
            return ScanRegions(tuple(box.name for box in boxes), grid, boxes=np.stack(places), notes=notes)
        if case.id not in self.masks:
            return None
        volume = read_volume(self.masks[case.id], label=True, narrow=True)
        grid = read_grid(case.images[0])
        require_same_grid(grid, volume.grid)
        array = volume.array.astype(np.uint8 if volume.array.max(initial=0) < 256 else np.uint16, copy=False)
        found = np.zeros(int(array.max(initial=0)) + 1, dtype=np.int64)
        for plane in array:
            found += np.bincount(plane.ravel(), minlength=len(found))
        values = tuple(int(value) for value in np.flatnonzero(found) if value not in (0, self.ignore_label))
        if not values:
            raise EmptyMaskError(f"{self.masks[case.id]}: the mask holds no label besides background; correct it.")
        names = tuple(self.labels.get(value, str(value)) for value in values)
        return ScanRegions(names, grid, array=array, values=values)


class EmptyMaskError(DataError):
    """A mask in which nothing is marked."""


def _say_unmatched(cases: Sequence[Case], found: Mapping[str, object], what: str) -> None:
    without = [case.id for case in cases if case.id not in found]
    if without:
        warnings.warn(
            f"{number_of(len(without), 'scan', 'have', of=len(cases))} no {what[2:]}: {listed(without)}.", stacklevel=3
        )


def read_boxes(path: str, cases: Sequence[Case]) -> dict[str, list[Box]]:
    """The boxes of a table, by the ids of the scans that they lie in.

    Raises:
        DataError: The table cannot be read, lacks a column, holds something else than numbers, or names no scan of
            these.
    """
    header, lines = read_table(path)
    key = next((name for name in ID_COLUMNS if name in header), None)
    in_mm = all(f"{name}_mm" in header for name in ENDS)
    columns = [f"{name}_mm" if in_mm else name for name in ENDS]
    missing = [name for name in columns if name not in header]
    if key is None or missing:
        what = missing[0] if key else f"{', '.join(ID_COLUMNS[:-1])} or {ID_COLUMNS[-1]}"
        raise DataError(
            f"{path}: has no column {what}; a table of boxes has id (or image) and {', '.join(ENDS)} in voxels, or the "
            "same with _mm behind each in millimetres."
        )
    ids = {case.id: case.id for case in cases}
    if key == "image":
        by_image = {resolved(case.images): case.id for case in cases}
    found: dict[str, list[Box]] = {}
    for where, cells in lines:
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        images = tuple(beside(path, part) for part in channel_names(row[key], path)) if key == "image" else ()
        name = by_image.get(resolved(images)) if images else ids.get(row[key])
        if name is None:
            continue
        try:
            ends = tuple(float(row.get(column, "")) for column in columns)
        except ValueError:
            ends = (math.nan,)
        if not all(map(math.isfinite, ends)) or any(low >= high for low, high in zip(ends[:3], ends[3:], strict=False)):
            raise DataError(
                f"{where}: the box of {row[key]} needs six numbers, each minimum below its maximum; correct it."
            )
        boxes = found.setdefault(name, [])
        boxes.append(Box(name=printable(row.get("name") or f"box_{len(boxes) + 1}"), ends=ends, in_mm=in_mm))
    if not found:
        named = [row[0] for _, row in lines]
        raise DataError(
            f"{path}: names none of the scans; it has {listed(named)} where the scans are {listed([*ids])}."
        )
    return found
