"""Spine, breastbone and pelvis of the phantom (its ribs belong to the trunk's wall)."""

from dataclasses import dataclass

import numpy as np

from mim3d.phantoms.parts import BACKGROUND, BODY, BONES, Part
from mim3d.phantoms.shapes import Array, Level, Solid, Vector, ellipsoid, grown
from mim3d.phantoms.tissues import Tissues
from mim3d.phantoms.trunk import Trunk, vertebra

#: Mean height of a vertebra with its disc, mm.
PITCH_MM = 31.0
#: From the middle of a vertebra to its end plate, mm.
HALF_BODY_MM = 12.0
#: Thickness of the cortical bone of a vertebra and of the pelvis, mm.
CORTEX_MM = 2.2
_REACH: tuple[Vector, Vector] = ((-62, -125, -400), (62, -8, 400))


@dataclass(frozen=True, kw_only=True)
class Spine:
    """One patient's spine.

    Attributes:
        lean: Sideways swing, mm (a slight scoliosis).
        size: Scale of its cross-section.
    """

    lean: float
    size: float

    def curve(self, z: Array) -> tuple[Array, Array]:
        """x and y of the spine against a straight one: forward in the loin, backward in the chest, mm."""
        t = np.clip(z, -200, 300) * (1 / 100)
        return np.asarray(self.lean * t * (1 - 0.6 * t)), np.asarray(3 - 4.5 * t - 1.5 * t * t + 0.9 * t * t * t)

    def _local(self, x: Array, y: Array, z: Array) -> tuple[Array, Array, Array]:
        side, forward = self.curve(z)
        count = vertebra(z)
        along = (count - np.rint(count)) * np.float32(PITCH_MM)
        return (x - side) * (1 / self.size), (y - forward) * (1 / self.size), along

    def column(self, x: Array, y: Array, z: Array) -> Array:
        """Level of the bodies and discs as one column, waisted at the middle of every vertebra."""
        lx, ly, along = self._local(x, y, z)
        waist = 0.92 + 0.08 * np.minimum(np.abs(along) * (1 / HALF_BODY_MM), 1)
        u, v = lx * (1 / 24), (ly + 45) * (1 / 17)
        return np.asarray((np.sqrt(u * u + v * v) / waist - 1) * 18)

    def bone(self, x: Array, y: Array, z: Array) -> Array:
        """Level of the vertebrae: bodies, arches, spinous and transverse processes."""
        lx, ly, along = self._local(x, y, z)
        side = np.abs(lx)
        body = np.maximum(self.column(x, y, z), np.abs(along) - HALF_BODY_MM)
        u, v = lx * (1 / 19), (ly + 71) * (1 / 15)
        arch = np.maximum((np.sqrt(u * u + v * v) - 1) * 16, np.abs(along + 2) - 9.5)
        spine = _oval(lx, ly + 92, along + 6, (4.0, 16.0, 8.5))
        swept = ly + 69 + 0.55 * (side - 18) * np.clip(z * (1 / 120), 0.1, 1)
        process = _oval(side - 29, swept, along - 3, (20.0, 5.5, 6.0))
        return np.asarray(np.minimum(np.minimum(body, arch), np.minimum(spine, process)))

    def canal(self, x: Array, y: Array, z: Array) -> Array:
        """Level of the spinal canal."""
        lx, ly, _ = self._local(x, y, z)
        u, v = lx * (1 / 11.5), (ly + 71) * (1 / 8.5)
        return np.asarray((np.sqrt(u * u + v * v) - 1) * 9)


def draw_spine(rng: np.random.Generator) -> Spine:
    """Draw a spine."""
    return Spine(lean=rng.uniform(-3, 3), size=rng.uniform(0.94, 1.06))


def skeleton(rng: np.random.Generator, trunk: Trunk, spine: Spine, tissues: Tissues) -> list[Part]:
    """Discs, vertebrae, canal, breastbone and pelvis, in the order to paint them."""
    disc = _everywhere(lambda x, y, z: spine.column(x, y, z) + 0.6)
    parts = [Part(solid=disc, hu=tissues.disc)]
    parts += _bone(_everywhere(spine.bone), tissues)
    parts.append(Part(solid=_everywhere(spine.canal), hu=tissues.cord, label=BACKGROUND))
    front = trunk.front + 3
    parts += _bone(ellipsoid((0, front, 195), (19, 7, 78), (rng.uniform(-3, 3), 0, 0)), tissues)
    tilt, flare = rng.uniform(8, 18), rng.uniform(34, 46)
    for sign in (1, -1):
        centre = (sign * rng.uniform(84, 90), rng.uniform(-36, -28), rng.uniform(-178, -166))
        parts += _bone(ellipsoid(centre, (8.5, 62, 74), (0, sign * tilt, -sign * flare)), tissues)
    return parts


def _bone(solid: Solid, tissues: Tissues) -> list[Part]:
    return [
        Part(solid=solid, hu=tissues.cortical, label=BONES, regions=BODY),
        Part(solid=grown(solid, -CORTEX_MM), hu=tissues.cancellous, label=BONES, regions=BODY),
    ]


def _oval(x: Array, y: Array, z: Array, radii: Vector) -> Array:
    u, v, w = x * (1 / radii[0]), y * (1 / radii[1]), z * (1 / radii[2])
    return np.asarray((np.sqrt(u * u + v * v + w * w) - 1) * min(radii))


def _everywhere(level: Level) -> Solid:
    return Solid(level=level, low=_REACH[0], high=_REACH[1])
