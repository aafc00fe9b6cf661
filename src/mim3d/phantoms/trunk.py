"""The phantom's trunk: skin, fat, muscle wall, chest and abdomen with the diaphragm between them, lungs, ribs."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.phantoms.shapes import Array
from mim3d.phantoms.tissues import Tissues

#: What of the trunk a voxel lies in; organs are painted into one of these.
AIR, FAT, WALL, ABDOMEN, CHEST, MEDIASTINUM = range(6)

#: Half the distance of two ribs, and their half height and half thickness, mm.
RIB_HALF_HEIGHT_MM = 6.5
RIB_HALF_THICKNESS_MM = 4.5
#: Thickness of a rib's cortical bone, mm.
RIB_CORTEX_MM = 1.8

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
    _paint_flank_layers(trunk, tissues, places, (region, hu))
    _paint_chest(trunk, tissues, places, (region, hu))
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


def _paint_flank_layers(trunk: Trunk, tissues: Tissues, places: tuple[Array, Array, Array], out: Any) -> None:
    """Thin fat between the flat muscles of the flanks, and streaks of it in the muscles of the back."""
    region, hu = out
    wall = region == WALL
    x, y, z = (place[wall] for place in places)
    depth = radial(x, y, superellipse(x, y, trunk.muscle_axes(z)))
    flank = (np.abs(x) > 80) & (z < 20)
    layers = flank & ((np.abs(depth + 5) < 0.8) | (np.abs(depth + 10) < 0.7))
    between = (y < -70) & (np.abs(np.abs(x) - 66 - 0.2 * y) < 1.2) & (depth < -3)
    values = hu[wall]
    values[layers | between] = 0.5 * (tissues.fat + tissues.muscle)
    hu[wall] = values


def _paint_chest(trunk: Trunk, tissues: Tissues, places: tuple[Array, Array, Array], out: Any) -> None:
    region, hu = out
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
