"""How a phantom is scanned: its pose, table, finite resolution, noise of reconstructed slices, field of view."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from mim3d.core.types import Spacing, Triple
from mim3d.phantoms.shapes import Array, Vector, rotation

AIR_HU = -1000.0
#: What scanners store outside their round field of view.
OUTSIDE_HU = -1024.0
#: Distance of the control points of the bend.
KNOT_MM = 90.0
#: Control points per axis: from -4 to +4 knots around the middle of the scan.
NUM_KNOTS = 9
#: Largest length of the bend anywhere, along each axis.
MAX_BEND_MM = 13.0


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A patient's pose. Body axes are x to the right, y to the front, z to the head; 0 is the first lumbar vertebra.

    Attributes:
        linear: (3, 3), millimetres of the scan to millimetres of the body.
        centre_mm: The body's point in the middle of the scan.
        bend: (3, K, K, K) float32, displacement at the control points, mm.
    """

    linear: npt.NDArray[np.float64]
    centre_mm: Vector
    bend: Array


def draw_pose(rng: np.random.Generator) -> Pose:
    """Draw a pose: a few degrees of turn, 15 % of scale, a shift, and a smooth bend."""
    tilt = (rng.uniform(-4, 4), rng.uniform(-3, 3), rng.uniform(-7, 7))
    scale = rng.uniform(0.9, 1.12) * rng.uniform(0.96, 1.04, 3)
    bend = rng.uniform(-MAX_BEND_MM, MAX_BEND_MM, (3, NUM_KNOTS, NUM_KNOTS, NUM_KNOTS)).astype(np.float32)
    centre = (rng.uniform(-10, 10), rng.uniform(-6, 6), rng.uniform(12, 52))
    return Pose(linear=np.diag(1 / scale) @ rotation(tilt), centre_mm=centre, bend=bend)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A pose on the voxels of one scan.

    Attributes:
        pose: How the patient lies.
        shape: Voxels along X, Y, Z (RAS+).
        spacing_mm: Their size.
    """

    pose: Pose
    shape: Triple
    spacing_mm: Spacing

    def scan_mm(self, axis: int) -> Array:
        """Places of the voxels along one axis of the scan, 0 in its middle."""
        steps = np.arange(self.shape[axis]) - (self.shape[axis] - 1) / 2
        return np.asarray(steps * self.spacing_mm[axis], dtype=np.float32)

    def body_mm(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Body x, y, z of the voxels in the slices from `start` to `stop`, each (X, Y, stop - start)."""
        axes = [self.scan_mm(0), self.scan_mm(1), self.scan_mm(2)[start:stop]]
        knots = np.arange(NUM_KNOTS) - (NUM_KNOTS - 1) / 2
        weights = []
        for axis in axes:
            # Cubic B-splines, (N, K) weights of the control points, which never leave the range of their points.
            far = np.abs(np.clip(axis / KNOT_MM, knots[1], knots[-2])[:, None] - knots)
            near = (4 - 6 * far**2 + 3 * far**3) / 6
            weights.append(np.where(far < 1, near, np.clip(2 - far, 0, None) ** 3 / 6).astype(np.float32))
        x, y, z = axes[0][:, None, None], axes[1][:, None], axes[2]
        out = []
        for row, centre, bend in zip(self.pose.linear, self.pose.centre_mm, self.pose.bend, strict=True):
            a, b, c = (float(value) for value in row)
            # einsum without optimisation adds up in one fixed order, which a threaded matrix product does not.
            along_z: Any = np.einsum("ijk,zk->ijz", bend, weights[2])
            along_y: Any = np.einsum("ijz,yj->iyz", along_z, weights[1])
            whole: Any = np.einsum("xi,iyz->xyz", weights[0], along_y)
            whole += a * x + (b * y + (c * z + np.float32(centre)))
            out.append(whole)
        return out[0], out[1], out[2]

    def box(self, low: Vector, high: Vector, start: int, stop: int) -> tuple[slice, slice, slice] | None:
        """Voxels of the slices `start` to `stop` that a body box can reach (z counted from `start`), or None."""
        corners = np.array([[(low, high)[i >> axis & 1][axis] for axis in range(3)] for i in range(8)])
        reach = np.linalg.inv(self.pose.linear)
        middle = (np.array(self.shape) - 1) / 2
        places = (corners - np.array(self.pose.centre_mm)) @ reach.T
        margin = np.abs(reach).sum(axis=1) * MAX_BEND_MM
        spacing = np.array(self.spacing_mm)
        first = np.floor((places.min(axis=0) - margin) / spacing + middle).astype(int)
        last = np.ceil((places.max(axis=0) + margin) / spacing + middle).astype(int) + 1
        first = np.maximum(first, (0, 0, start)) - (0, 0, start)
        last = np.minimum(last, (*self.shape[:2], stop)) - (0, 0, start)
        if (first >= last).any():
            return None
        return slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2])


@dataclass(frozen=True, kw_only=True)
class Scanner:
    """How one scan was taken.

    Attributes:
        noise_hu: Standard deviation of the noise in the middle of the body.
        sharpness: 0 for a soft kernel, 1 for a sharp one: its noise is fine-grained.
        streak_hu: Standard deviation of streaks across the body, worst at the hips.
        cupping_hu: How much darker the middle of the body is (beam hardening).
        table_gap_mm: Between back and table.
        table_radius_mm: Radius of the table's curve.
        round_view: Whether the corners outside the round field of view are blank.
    """

    noise_hu: float
    sharpness: float
    streak_hu: float
    cupping_hu: float
    table_gap_mm: float
    table_radius_mm: float
    round_view: bool


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """Draw a dose, a kernel, a table and a field of view."""
    return Scanner(
        noise_hu=rng.uniform(7, 20),
        sharpness=rng.uniform(0, 1),
        streak_hu=rng.uniform(1, 5),
        cupping_hu=rng.uniform(0, 10),
        table_gap_mm=rng.uniform(0, 6),
        table_radius_mm=rng.uniform(420, 800),
        round_view=bool(rng.random() < 0.35),
    )


def paint_table(scanner: Scanner, placement: Placement, back: Vector, hu: Array) -> None:
    """Paint table and mattress under a patient into some slices `hu` (X, Y, slices), before the patient.

    Args:
        scanner: The scanner.
        placement: The scan.
        back: The place of the scan where the table touches the patient, mm.
        hu: Changed in place.
    """
    x = placement.scan_mm(0)[:, None] - np.float32(back[0])
    y = placement.scan_mm(1)[None, :] - np.float32(back[1])
    depth = (x * x) * np.float32(0.5 / scanner.table_radius_mm) - scanner.table_gap_mm - y
    width = np.abs(x) + 0 * y
    tissues = ((0.0, 11.0, 205.0, -930.0), (11.0, 36.0, 215.0, -180.0), (14.0, 33.0, 212.0, -860.0))
    for top, bottom, half_width, value in tissues:
        hu[(depth > top) & (depth < bottom) & (width < half_width)] = value


def scan(scanner: Scanner, placement: Placement, hu: Array, rng: np.random.Generator) -> np.ndarray:
    """Blur the painted tissues, add noise, and store them as a scanner does.

    Args:
        scanner: How the scan is taken.
        placement: Position of the voxels.
        hu: (X, Y, Z) float32, used up.
        rng: Source of the noise.

    Returns:
        (X, Y, Z) int16 HU from -1024 to 3071.
    """
    for axis, sigma in enumerate((0.5, 0.5, 0.4)):
        ndimage.gaussian_filter1d(hu, sigma, axis=axis, output=hu, mode="nearest", truncate=3)
    x, y, z = (placement.scan_mm(axis) for axis in range(3))
    radius = (x / 170)[:, None] ** 2 + (y / 125)[None, :] ** 2
    middle = np.exp(-0.5 * radius.astype(np.float32)).astype(np.float32)
    hips = 1 / (1 + np.exp((z + 110) / 30)).astype(np.float32)
    # Noise of unit deviation whose coarse part is damped within slices, as filtered back-projection does.
    fine = 0.85 - 0.35 * scanner.sharpness
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    for axis, sigma in enumerate((fine, fine, 0.35)):
        ndimage.gaussian_filter1d(noise, sigma, axis=axis, output=noise, mode="reflect", truncate=3)
    coarse = np.empty_like(noise)
    ndimage.gaussian_filter1d(noise, 1.6, axis=0, output=coarse, mode="reflect", truncate=2)
    ndimage.gaussian_filter1d(coarse, 1.6, axis=1, output=coarse, mode="reflect", truncate=2)
    coarse *= 0.3 + 0.4 * np.float32(scanner.sharpness)
    noise -= coarse
    noise *= 1 / noise.std(dtype=np.float64)
    hu += noise * (np.float32(scanner.noise_hu) * (0.45 + 0.65 * middle))[:, :, None]
    # Streaks are long from side to side and new in every row of every slice, of about unit deviation.
    num_knots = 8
    knots = rng.standard_normal((num_knots, *hu.shape[1:]), dtype=np.float32)
    places = np.linspace(0, num_knots - 1, hu.shape[0])
    left = np.minimum(places.astype(int), num_knots - 2)
    right_share = (places - left).astype(np.float32)[:, None, None]
    streaks = knots[left] * (1 - right_share) + knots[left + 1] * right_share
    hu += streaks * (np.float32(scanner.streak_hu) * (0.5 + 1.5 * hips)) * middle[:, :, None]
    hu -= (np.float32(scanner.cupping_hu) * middle)[:, :, None]
    if scanner.round_view:
        view = max(float(np.ptp(x)), float(np.ptp(y))) / 2
        hu[x[:, None] ** 2 + y[None, :] ** 2 > view**2] = OUTSIDE_HU
    np.clip(hu, OUTSIDE_HU, 3071, out=hu)
    return np.rint(hu, out=hu).astype(np.int16)
