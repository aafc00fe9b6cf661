"""How a phantom lies in its scan: turned, shifted, scaled and smoothly bent, from voxels to body millimetres."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing, Triple
from mim3d.phantoms.shapes import Array, Vector, rotation

#: Distance of the control points of the bend.
KNOT_MM = 90.0
#: Control points per axis: from -4 to +4 knots around the middle of the scan.
NUM_KNOTS = 9
#: Largest length of the bend anywhere, along each axis.
MAX_BEND_MM = 13.0

Box = tuple[slice, slice, slice]


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
        weights = [_spline_weights(axis) for axis in axes]
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

    def box(self, low: Vector, high: Vector, start: int, stop: int) -> Box | None:
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


def _spline_weights(places_mm: Array) -> Array:
    """(N, K) weights of the control points: cubic B-splines, which never leave the range of their points."""
    knots = np.arange(NUM_KNOTS) - (NUM_KNOTS - 1) / 2
    far = np.abs(np.clip(places_mm / KNOT_MM, knots[1], knots[-2])[:, None] - knots)
    near = (4 - 6 * far**2 + 3 * far**3) / 6
    return np.asarray(np.where(far < 1, near, np.clip(2 - far, 0, None) ** 3 / 6), dtype=np.float32)
