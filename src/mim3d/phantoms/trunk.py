"""The phantom's trunk: skin, fat, muscle wall, chest and abdomen with the diaphragm between them, lungs and bones."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mim3d.phantoms.parts import ABDOMEN, BACKGROUND, BODY, BONES, CHEST, FAT, MEDIASTINUM, WALL, Part, Tissues
from mim3d.phantoms.shapes import Array, Level, Solid, Vector, ellipsoid, grown

#: Half the distance of two ribs, and their half height and half thickness, mm.
RIB_HALF_HEIGHT_MM = 6.5
RIB_HALF_THICKNESS_MM = 4.5
#: Thickness of a rib's cortical bone, mm.
RIB_CORTEX_MM = 1.8
#: Mean height of a vertebra with its disc, mm.
PITCH_MM = 31.0
#: From the middle of a vertebra to its end plate, mm.
HALF_BODY_MM = 12.0
#: Thickness of the cortical bone of a vertebra and of the pelvis, mm.
CORTEX_MM = 2.2
_REACH: tuple[Vector, Vector] = ((-62, -125, -400), (62, -8, 400))

Axes = tuple[Array, Array, Array]


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """Sizes of one patient's trunk, mm (body axes: x right, y front, z head, 0 at the first lumbar vertebra).

    Attributes:
        half_width: Half the width of the muscles at the waist, without fat.
        front: Distance from the middle to the front of the muscles.
        back: Distance from the middle to the back of the muscles.
        fat_side: Subcutaneous fat at the flanks.
        fat_front: Subcutaneous fat of the belly.
        fat_back: Subcutaneous fat of the back.
        dome: Height of the diaphragm.
        drop: How far the diaphragm falls from its dome to the ribs.
        rib_shift: Height of the ribs against the vertebrae.
    """

    half_width: float
    front: float
    back: float
    fat_side: float
    fat_front: float
    fat_back: float
    dome: float
    drop: float
    rib_shift: float

    def muscle_axes(self, z: Array) -> Axes:
        """Half-axes to the right, the front and the back of the muscles' outline at a height."""
        chest, hips = rise(z, 10, 120), rise(-z, 60, 150)
        return self.half_width + 14 * chest + 14 * hips, self.front + 12 * chest, self.back - 2 * chest

    def skin_axes(self, z: Array) -> Axes:
        """As `muscle_axes`, for the skin."""
        side, front, back = self.muscle_axes(z)
        belly = 1 - 0.55 * rise(z, 40, 150)
        return side + self.fat_side * belly, front + self.fat_front * belly, back + self.fat_back

    def cavity_axes(self, z: Array) -> Axes:
        """As `muscle_axes`, for the inside of the muscle wall and the ribs."""
        side, front, back = self.muscle_axes(z)
        chest, hips = rise(z, 5, 75), rise(-z, 70, 150)
        return side - 14 - 3 * chest - 24 * hips, front - 11 - 4 * chest, back - 38 + 20 * chest

    def cavity(self, x: Array, y: Array, z: Array) -> Array:
        """Signed distance to the wall of the cavity, mm, measured from its middle; negative inside."""
        return radial(x, y, superellipse(x, y, self.cavity_axes(z)))

    def diaphragm(self, x: Array, y: Array, z: Array) -> Array:
        """Height above the diaphragm: positive in the chest, negative in the abdomen."""
        edge = np.minimum(superellipse(x, y, self.cavity_axes(z)), np.float32(1.2))
        right = 16 / (1 + ((x - 66) ** 2 + y * y) * (1 / 55**2))
        left = 9 / (1 + ((x + 70) ** 2 + y * y) * (1 / 50**2))
        return np.asarray(z - self.dome - right - left + (self.drop - 0.25 * y) * edge * edge)


def draw_trunk(rng: np.random.Generator) -> Trunk:
    """Draw a trunk; fat of flanks, belly and back comes and goes together."""
    fat = rng.uniform(0.35, 1.6)
    return Trunk(
        half_width=rng.uniform(132, 146),
        front=rng.uniform(84, 98) + 6 * fat,
        back=rng.uniform(100, 108),
        fat_side=fat * rng.uniform(14, 20),
        fat_front=fat * rng.uniform(14, 22),
        fat_back=fat * rng.uniform(8, 13),
        dome=rng.uniform(100, 116),
        drop=rng.uniform(80, 95),
        rib_shift=rng.uniform(-12, 12),
    )


def paint_trunk(trunk: Trunk, tissues: Tissues, places: tuple[Array, Array, Array], hu: Array) -> npt.NDArray[np.uint8]:
    """Paint skin, fat, muscles, the cavity's fat and the lungs' air into `hu`.

    Args:
        trunk: The patient's trunk.
        tissues: The patient's HU.
        places: Body x, y, z of the voxels, each (X, Y, Z).
        hu: (X, Y, Z), changed in place; voxels outside the skin are left alone.

    Returns:
        (X, Y, Z) region of every voxel: AIR, FAT, WALL, ABDOMEN, CHEST or MEDIASTINUM.
    """
    x, y, z = places
    region = np.zeros(hu.shape, dtype=np.uint8)
    side, front, back = trunk.skin_axes(z)
    region[superellipse(x, y, (side, front, back)) < 1] = FAT
    deep = superellipse(x, y, (side - 2, front - 2, back - 2)) < 1
    hu[region == FAT] = tissues.skin
    hu[deep] = tissues.fat
    wall = superellipse(x, y, trunk.muscle_axes(z)) < 1
    region[wall] = WALL
    hu[wall] = tissues.muscle
    inside = superellipse(x, y, trunk.cavity_axes(z)) < 1
    region[inside] = ABDOMEN
    hu[inside] = tissues.fat
    # Thin fat between the flat muscles of the flanks, and streaks of it in the muscles of the back.
    wall = region == WALL
    x, y, z = (place[wall] for place in places)
    depth = radial(x, y, superellipse(x, y, trunk.muscle_axes(z)))
    flank = (np.abs(x) > 80) & (z < 20)
    layers = flank & ((np.abs(depth + 5) < 0.8) | (np.abs(depth + 10) < 0.7))
    between = (y < -70) & (np.abs(np.abs(x) - 66 - 0.2 * y) < 1.2) & (depth < -3)
    values = hu[wall]
    values[layers | between] = 0.5 * (tissues.fat + tissues.muscle)
    hu[wall] = values
    # The diaphragm, and what of the cavity lies above it.
    high = (region == ABDOMEN) & (places[2] > -20)
    x, y, z = (place[high] for place in places)
    above = trunk.diaphragm(x, y, z)
    middle = np.abs(x + 4) - np.where(y > 0, 30 + np.float32(0.12) * y, 27)
    parts, values = region[high], hu[high]
    values[(above > -3.5) & (above <= 0)] = tissues.muscle
    chest = above > 0
    parts[chest] = MEDIASTINUM
    lung = chest & (middle > 0) & (trunk.cavity(x, y, z) < -2)
    parts[lung] = CHEST
    # Blood sinks: lungs of a patient on the back are denser behind.
    values[lung] = tissues.lung - np.float32(0.45) * y[lung]
    region[high], hu[high] = parts, values
    return region


def paint_ribs(
    trunk: Trunk, tissues: Tissues, places: tuple[Array, Array, Array], hu: Array, wall: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Paint ribs and their cartilage into the voxels of the chest `wall`.

    The ribs are one surface 9 mm below the muscles' outline, cut into bands that fall from the spine to the front.

    Returns:
        (X, Y, Z) the voxels that are bone.
    """
    bone = np.zeros(hu.shape, dtype=np.bool_)
    x, y, z = (place[wall] for place in places)
    depth = radial(x, y, superellipse(x, y, trunk.muscle_axes(z))) + 9
    height = np.asarray(z + 0.42 * (y + 95) - trunk.rib_shift, dtype=np.float32)
    number = vertebra(height)
    off = (number - np.rint(number)) * np.float32(28)
    gauge = np.sqrt((depth / RIB_HALF_THICKNESS_MM) ** 2 + (off / RIB_HALF_HEIGHT_MM) ** 2)
    rib = (gauge < 1) & (np.abs(x) > 36) & (height > 4)
    bony = rib & (y < np.clip(1.25 * (height - 50), -62, 72))
    inner = gauge < 1 - RIB_CORTEX_MM / RIB_HALF_THICKNESS_MM
    values = hu[wall]
    values[rib & (height > 45)] = tissues.cartilage
    values[bony] = tissues.cortical
    values[bony & inner] = tissues.cancellous
    hu[wall] = values
    bone[wall] = bony
    return bone


def superellipse(x: Array, y: Array, axes: Axes) -> Array:
    """1 on the outline with these half-axes, rounder in front than behind; grows as distance to the power of 2.5."""
    u = np.abs(x) / axes[0]
    v = np.where(y > 0, y / axes[1], -y / axes[2])
    boxy = u * u * np.sqrt(u) + v * v * np.sqrt(v)
    square = u * u + v * v
    share = np.where(y > 0, np.float32(0.6), np.float32(0.15))
    return np.asarray(boxy + share * (square * np.sqrt(np.sqrt(square)) - boxy))


def radial(x: Array, y: Array, gauge: Array) -> Array:
    """Distance to the outline of a superellipse along the ray from its middle, negative inside."""
    distance = np.sqrt(x * x + y * y) + np.float32(1e-3)
    return np.asarray(distance * (1 - np.power(np.maximum(gauge, np.float32(1e-7)), np.float32(-0.4))))


def rise(value: Array, start: float, stop: float) -> Array:
    """0 up to `start`, 1 from `stop` on, smooth between."""
    t = np.clip((value - start) * (1 / (stop - start)), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def vertebra(z: Array) -> Array:
    """The spine's count at a height: whole in the middle of a vertebra; they grow taller from head to hips."""
    t = z * (1 / 31)
    return np.asarray(t + 0.008 * t * t)


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
