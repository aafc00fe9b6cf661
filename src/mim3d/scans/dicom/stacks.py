"""One DICOM slice by its header, and slices to a stack: in order, evenly spaced and upright, or refused."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.scans.grids import LPS_TO_RAS, Grid, check_affine, check_spacing, times

#: A stack leaning by more than this is tilted: rounded positions in a header stay below.
MAX_TILT_DEGREES = 0.1

#: Slices may lie this many pixels beside the line through the stack.
MAX_SIDEWAYS_PIXELS = 0.1

_REMEDY = "convert it with dcm2niix, which straightens such series, and use that file, or leave it out"


@dataclass(frozen=True, kw_only=True)
class Slice:
    """What the header of one slice (or one frame of a multi-frame file) tells; no patient data.

    Positions and directions are LPS millimetres; `pixel_spacing` is (between rows, between columns).
    `native_bytes` is the size of the pixels of the whole file, from `pixel_offset` on; None where compressed.
    """

    path: str
    frame: int | None
    series_uid: str
    study_uid: str
    slice_uid: str
    modality: str
    secondary_capture: bool
    image_type: tuple[str, ...]
    rows: int
    columns: int
    num_values: int
    itemsize: int
    pixel_offset: int
    native_bytes: int | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    tilt_degrees: float
    slope: float
    intercept: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Slices in order along the normal, and the grid they make; stored axes are (column, row, slice)."""

    grid: Grid
    slices: tuple[Slice, ...]


def stack(slices: Sequence[Slice], name: str) -> Stack:
    """Order the slices of one series along their normal and derive the grid.

    Args:
        slices: every slice of one series, in any order.
        name: how messages call the series.

    Raises:
        DataError: one slice only, missing geometry, mixed sizes or orientations, several slices in one place,
            gantry tilt, or uneven gaps; the sentence tells angle, gaps and remedy.
    """
    rows, columns = _common_size(slices, name)
    across, down, spacing = _common_plane(slices, name)
    normal = np.cross(across, down)
    positions = np.array([item.position for item in slices], dtype=np.float64)
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    heights = positions @ normal
    complaints = [
        complaint
        for complaint in (
            _tilt(positions, normal, slices[0], float(min(spacing))),
            _gaps(heights, float(max(item.tilt_degrees for item in slices))),
        )
        if complaint
    ]
    if complaints:
        raise DataError(f"{name}: the DICOM series cannot be stacked: {' and '.join(complaints)}; {_REMEDY}.")
    affine = np.eye(4)
    affine[:3, 0] = across * spacing[1]
    affine[:3, 1] = down * spacing[0]
    affine[:3, 2] = normal * (heights[-1] - heights[0]) / (len(slices) - 1)
    affine[:3, 3] = positions[0]
    affine = LPS_TO_RAS @ affine
    check_affine(affine, name)
    grid = Grid(shape=(columns, rows, len(slices)), affine=affine, path=name)
    return Stack(grid=grid, slices=tuple(slices[index] for index in order))


def _common_size(slices: Sequence[Slice], name: str) -> tuple[int, int]:
    sizes = sorted({(item.rows, item.columns) for item in slices})
    if len(sizes) > 1:
        shown = ", ".join(times(size) for size in sizes)
        raise DataError(f"{name}: the slices of the DICOM series differ in size ({shown}); separate them first.")
    if len(slices) < 2:
        raise DataError(f"{name}: the DICOM series has one slice, and a volume needs two or more; copy all of it.")
    for item in slices:
        if item.position is None or item.orientation is None or item.pixel_spacing is None:
            raise DataError(
                f"{item.path}: the DICOM header lacks the slice's position, orientation or pixel spacing, so "
                "the series cannot be stacked; export the original series."
            )
    return sizes[0]


def _common_plane(
    slices: Sequence[Slice], name: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Unit vectors along a row and down a column, and the pixel spacing, that all slices share."""
    planes = np.array([item.orientation for item in slices], dtype=np.float64)
    spacings = np.array([item.pixel_spacing for item in slices], dtype=np.float64)
    for pair in spacings.tolist():
        check_spacing(pair, name)
    if np.abs(planes - planes[0]).max() > 1e-3:
        num_planes = len({tuple(plane) for plane in planes.round(2).tolist()})
        raise DataError(
            f"{name}: the slices of the DICOM series lie in {num_planes} orientations, as in a localiser; "
            "give a series of parallel slices."
        )
    if np.abs(spacings - spacings[0]).max() > 1e-3 * spacings[0].min():
        raise DataError(f"{name}: the slices of the DICOM series differ in pixel spacing; split them first.")
    across, down = planes[0, :3], planes[0, 3:]
    lengths = np.linalg.norm(across), np.linalg.norm(down)
    if min(lengths) < 0.99 or max(lengths) > 1.01 or abs(across @ down) > 1e-3:
        raise DataError(
            f"{name}: the orientation in the DICOM header is not two perpendicular unit vectors; "
            " export the original series."
        )
    across = across / lengths[0]
    down = down - across * (across @ down)
    return across, down / np.linalg.norm(down), spacings[0]


def _tilt(
    positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64], first: Slice, pixel_mm: float
) -> str | None:
    """Complaint about slices that do not lie straight above one another, or None."""
    steps = positions - positions[0]
    up = steps @ normal
    sideways = np.linalg.norm(steps - np.outer(up, normal), axis=1)
    if sideways.max() > MAX_SIDEWAYS_PIXELS * pixel_mm:
        angle = float(np.degrees(np.arctan2(sideways[-1], up[-1])))
        if angle > MAX_TILT_DEGREES:
            return f"it is tilted by {angle:.1f} degrees (gantry tilt)"
        if sideways[-1] < 0.5 * sideways.max():
            return f"slices are shifted sideways by up to {sideways.max():.2f} mm"
    # A header whose slices look upright though the gantry was tilted has lost the tilt.
    if abs(first.tilt_degrees) > 0.5 and np.abs(normal).max() > np.cos(np.radians(MAX_TILT_DEGREES)):
        return f"the gantry was tilted by {abs(first.tilt_degrees):.1f} degrees, but the slices lie upright"
    return None


def _gaps(heights: npt.NDArray[np.float64], tilt_degrees: float) -> str | None:
    """Complaint about slices that share a place, are missing, or are unevenly spaced, or None."""
    gaps = np.diff(heights)
    typical = float(np.median(gaps))
    shared = int(np.count_nonzero(gaps < max(1e-3, 0.02 * typical)))
    if shared:
        return (
            f"{shared} of its {len(heights)} slices lie in the place of another (several phases, echoes or "
            "reconstructions in one series)"
        )
    even = heights[0] + np.arange(len(heights)) * (heights[-1] - heights[0]) / len(gaps)
    if np.abs(heights - even).max() <= min(max(0.05 * typical, 0.1), 0.25 * typical):
        return None
    ratios = gaps / typical
    missing = int(np.rint(ratios).sum()) - len(gaps)
    if missing > 0 and np.abs(ratios - np.rint(ratios)).max() < 0.1:
        after = ", ".join(str(index + 1) for index in np.flatnonzero(np.rint(ratios) > 1)[:5])
        return (
            f"{missing} slice{'s are' if missing > 1 else ' is'} missing (gaps up to {gaps.max():.2f} mm, "
            f"where {typical:.2f} mm is the rule, after slice {after})"
        )
    values, counts = np.unique(gaps.round(2), return_counts=True)
    most = np.sort(np.argsort(-counts, kind="stable")[:4])
    shown = ", ".join(f"{counts[index]} of {values[index]:.2f} mm" for index in most)
    return f"its slices are unevenly spaced (gaps: {shown}{', ...' if len(values) > 4 else ''})"
