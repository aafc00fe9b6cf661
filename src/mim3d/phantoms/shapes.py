"""Analytic solids of the phantom: ellipsoids, tubes and what is cut from them, as signed distances in millimetres."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32]
Vector: TypeAlias = tuple[float, float, float]

#: Approximate signed distance in mm, negative inside, of points whose x, y, z come as arrays that broadcast.
Level: TypeAlias = Callable[[Array, Array, Array], Array]


@dataclass(frozen=True, kw_only=True)
class Solid:
    """A body in space.

    Attributes:
        level: Signed distance, negative inside; exact in sign, approximate in length.
        low: Smallest x, y, z that it can reach, mm.
        high: Largest x, y, z that it can reach, mm.
    """

    level: Level
    low: Vector
    high: Vector


def ellipsoid(centre: Vector, radii: Vector, angles_deg: Vector = (0.0, 0.0, 0.0)) -> Solid:
    """An ellipsoid with half-axes `radii`, turned about x, then y, then z."""
    turn = rotation(angles_deg)
    reach = np.sqrt(((turn * np.array(radii)) ** 2).sum(axis=1))
    rows = [[float(value) for value in column] for column in turn.T]

    def level(x: Array, y: Array, z: Array) -> Array:
        dx, dy, dz = x - centre[0], y - centre[1], z - centre[2]
        near, steep = np.float32(0), np.float32(1e-12)
        for (a, b, c), radius in zip(rows, radii, strict=True):
            part = (a * dx + b * dy + c * dz) * (1 / radius)
            near = near + part * part
            part = part * (1 / radius)
            steep = steep + part * part
        gauge = np.sqrt(near)
        return np.asarray(gauge * (gauge - 1) / np.sqrt(steep))

    return Solid(level=level, low=vector(np.array(centre) - reach), high=vector(np.array(centre) + reach))


def capsule(start: Vector, end: Vector, start_radius: float, end_radius: float) -> Solid:
    """A straight piece of tube with round ends, its radius changing evenly from start to end."""
    axis = np.array(end) - np.array(start)
    a, b, c = (float(value) for value in axis / max(float(axis @ axis), 1e-6))
    u, v, w = (float(value) for value in axis)
    swell = end_radius - start_radius

    def level(x: Array, y: Array, z: Array) -> Array:
        dx, dy, dz = x - start[0], y - start[1], z - start[2]
        along = np.clip(a * dx + b * dy + c * dz, 0, 1)
        dx, dy, dz = dx - u * along, dy - v * along, dz - w * along
        return np.asarray(np.sqrt(dx * dx + dy * dy + dz * dz) - (start_radius + swell * along))

    reach = max(start_radius, end_radius)
    ends = np.array([start, end])
    return Solid(level=level, low=vector(ends.min(axis=0) - reach), high=vector(ends.max(axis=0) + reach))


def tube(points: Sequence[Vector], radii: Sequence[float], *, piece_mm: float = 14.0) -> tuple[Solid, ...]:
    """A curved tube through `points`, smooth between them, as short capsules (each with a small box).

    Args:
        points: At least two places on the centre line, mm.
        radii: The radius at each of them, mm.
        piece_mm: About how long one capsule is.
    """
    knots = np.array([(*point, radius) for point, radius in zip(points, radii, strict=True)])
    ends = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    line = [knots[0]]
    for before, start, stop, after in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        num_pieces = max(1, round(float(np.linalg.norm((stop - start)[:3])) / piece_mm))
        for t in (np.arange(1, num_pieces + 1) / num_pieces).tolist():
            # A Catmull-Rom spline.
            bend = t * (2 * before - 5 * start + 4 * stop - after + t * (3 * (start - stop) + after - before))
            line.append(start + 0.5 * t * (stop - before + bend))
    return tuple(capsule(vector(a), vector(b), max(float(a[3]), 0.5), max(float(b[3]), 0.5)) for a, b in pairwise(line))


def grown(solid: Solid, margin_mm: float) -> Solid:
    """The solid with its surface moved outwards by `margin_mm` (inwards if negative)."""
    return Solid(
        level=lambda x, y, z: solid.level(x, y, z) - margin_mm,
        low=vector(np.array(solid.low) - margin_mm),
        high=vector(np.array(solid.high) + margin_mm),
    )


def blended(first: Solid, second: Solid, blend_mm: float) -> Solid:
    """The union of two solids, the crease between them filled over about `blend_mm`."""

    def level(x: Array, y: Array, z: Array) -> Array:
        a, b = first.level(x, y, z), second.level(x, y, z)
        gap = np.clip(blend_mm - np.abs(a - b), 0, None)
        return np.asarray(np.minimum(a, b) - gap * gap * (0.25 / blend_mm))

    low = np.minimum(first.low, second.low) - blend_mm / 4
    return Solid(level=level, low=vector(low), high=vector(np.maximum(first.high, second.high) + blend_mm / 4))


def cut(solid: Solid, keep: Level) -> Solid:
    """What of a solid lies where `keep` is negative too."""
    return Solid(level=lambda x, y, z: np.maximum(solid.level(x, y, z), keep(x, y, z)), low=solid.low, high=solid.high)


def outside(solid: Solid) -> Level:
    """The level of everything that is not in the solid."""
    return lambda x, y, z: -solid.level(x, y, z)


def rotation(angles_deg: Vector) -> npt.NDArray[np.float64]:
    """(3, 3) rotation about x, then y, then z."""
    turn = np.eye(3)
    for axis, angle in enumerate(np.radians(angles_deg)):
        one = np.eye(3)
        i, j = [(1, 2), (2, 0), (0, 1)][axis]
        one[i, i] = one[j, j] = np.cos(angle)
        one[i, j], one[j, i] = -np.sin(angle), np.sin(angle)
        turn = one @ turn
    return turn


def vector(values: Any) -> Vector:
    """Three numbers as a tuple of floats."""
    return float(values[0]), float(values[1]), float(values[2])
