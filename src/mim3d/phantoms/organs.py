"""Liver, spleen, kidneys and lesions of the phantom."""

from dataclasses import dataclass

import numpy as np

from mim3d.phantoms.parts import BELLY, LEFT_KIDNEY, LESION, LIVER, RIGHT_KIDNEY, SPLEEN, Part, Tissues
from mim3d.phantoms.shapes import (
    Array,
    Solid,
    Vector,
    blended,
    capsule,
    cut,
    ellipsoid,
    grown,
    outside,
    rotation,
    tube,
    vector,
)
from mim3d.phantoms.trunk import Trunk

#: Candidates among which the place of a lesion is drawn.
NUM_CANDIDATES = 400


@dataclass(frozen=True, kw_only=True)
class Organs:
    """Solids that lesions and vessels need to know."""

    liver: Solid
    spleen: Solid
    right_kidney: Solid
    left_kidney: Solid


def draw_organs(rng: np.random.Generator, trunk: Trunk) -> tuple[Organs, dict[str, tuple[Vector, Vector]]]:
    """Draw the solid organs, each kept clear of the others, of the spine and of the diaphragm.

    Returns:
        The organs, and centre and angles of each kidney by its side ("right", "left").
    """
    poses: dict[str, tuple[Vector, Vector]] = {}
    for side, sign, place in (("right", 1, (66, -33, -14)), ("left", -1, (-64, -34, 3))):
        centre = _near(rng, place, 4)
        # The angles bring the upper pole inwards and turn the hilum to the front.
        poses[side] = centre, (rng.uniform(-10, 2), -sign * rng.uniform(6, 15), -sign * rng.uniform(15, 38))
    kidneys = []
    for centre, angles in poses.values():
        size = rng.uniform(0.9, 1.12)
        kidneys.append(ellipsoid(centre, (27 * size, 23.5 * size, 53 * size), angles))
    right, left = kidneys
    spine = outside(capsule((2, -46, -300), (2, -52, 300), 43, 43))
    liver = _liver(rng, trunk)
    # The spleen, hollowed at its hilum.
    size = rng.uniform(0.85, 1.15)
    centre = _near(rng, (-97, -30, 58), 4)
    turn = (rng.uniform(-25, -10), rng.uniform(-8, 4), rng.uniform(-22, -8))
    hilum = ellipsoid((centre[0] + 36 * size, centre[1] + 20, centre[2] - 2), (24, 36, 48))
    spleen = cut(ellipsoid(centre, (31 * size, 46 * size, 55 * size), turn), outside(hilum))

    def under_diaphragm(x: Array, y: Array, z: Array) -> Array:
        # Inside the wall and below the diaphragm, with a little fat left between.
        return np.asarray(np.maximum(trunk.cavity(x, y, z) + 3.5, trunk.diaphragm(x, y, z) + 4.5))

    for level in (spine, under_diaphragm):
        liver, spleen = cut(liver, level), cut(spleen, level)
    organs = Organs(
        liver=cut(liver, outside(grown(right, 5))),
        spleen=cut(spleen, outside(grown(left, 5))),
        right_kidney=right,
        left_kidney=left,
    )
    return organs, poses


def organ_parts(
    rng: np.random.Generator, organs: Organs, poses: dict[str, tuple[Vector, Vector]], tissues: Tissues
) -> list[Part]:
    """Liver with its vessels and gall-bladder, spleen, and kidneys with cortex, medulla and sinus."""
    parts = [Part(solid=organs.liver, hu=tissues.liver, label=LIVER, regions=BELLY)]
    # Portal branches from the hilum, and hepatic veins that run to the vena cava under the dome.
    portal = ((60, 0, 45), (98, 10, 30), (8, 40, 72)), ((70, -22, 55), (104, -45, 70), (105, -30, 40))
    veins = ((62, -5, 88), (108, 0, 62), (30, 30, 80)), ((55, 20, 92), (85, 45, 60), (-10, 40, 85))
    for hu, root, trees in ((tissues.portal, (28, 10, 38), portal), (tissues.vein, (22, -8, 100), veins)):
        for middle, *ends in trees:
            fork = _near(rng, middle, 5)
            pieces = [*tube((root, fork), (6.5, 5))]
            for end in ends:
                pieces += tube((fork, _near(rng, end, 9)), (4.6, 1.6))
            parts += [Part(solid=piece, hu=hu, label=None, regions=BELLY, on=(LIVER,)) for piece in pieces]
    bile = ellipsoid(_near(rng, (44, 48, 2), 7), (13, 17, 26), (25, 20, 0))
    parts.append(Part(solid=grown(bile, 1.8), hu=tissues.bowel_wall, regions=BELLY))
    parts.append(Part(solid=bile, hu=tissues.bile, regions=BELLY))
    parts.append(Part(solid=organs.spleen, hu=tissues.spleen, label=SPLEEN, regions=BELLY))
    for side, solid, label in (("right", organs.right_kidney, RIGHT_KIDNEY), ("left", organs.left_kidney, LEFT_KIDNEY)):
        centre, angles = poses[side]
        inward = rotation(angles) @ np.array([-1.0 if centre[0] > 0 else 1.0, 0.0, 0.0])
        sinus = ellipsoid(vector(np.array(centre) + 17 * inward), (17, 7, 19), angles)
        pelvis = ellipsoid(vector(np.array(centre) + 18 * inward), (13, 4.5, 12), angles)
        parts += [
            Part(solid=grown(solid, 7), hu=tissues.fat, regions=BELLY),
            Part(solid=solid, hu=tissues.renal_cortex, label=label, regions=BELLY),
            Part(solid=grown(solid, -6.5), hu=tissues.renal_medulla, label=label, regions=BELLY),
            Part(solid=sinus, hu=tissues.fat, regions=BELLY),
            Part(solid=pelvis, hu=tissues.bile, regions=BELLY),
        ]
    return parts


def lesion_parts(rng: np.random.Generator, organs: Organs, tissues: Tissues) -> list[Part]:
    """One to four lesions of the liver, up to two of the kidneys: cysts, dark and bright tumours, some with a core."""
    parts: list[Part] = []
    for _ in range(int(rng.integers(1, 5))):
        hu = float(rng.choice((tissues.hypodense, tissues.hyperdense, tissues.cyst), p=(0.6, 0.15, 0.25)))
        parts += _lesion(rng, organs.liver, LIVER, float(rng.uniform(8, 24)), hu)
    for _ in range(int(rng.integers(0, 3))):
        solid, label = (organs.right_kidney, RIGHT_KIDNEY) if rng.random() < 0.5 else (organs.left_kidney, LEFT_KIDNEY)
        hu = tissues.cyst if rng.random() < 0.6 else 0.5 * (tissues.renal_cortex + 30)
        parts += _lesion(rng, solid, label, float(rng.uniform(7, 13)), hu)
    return parts


def _lesion(rng: np.random.Generator, host: Solid, label: int, radius_mm: float, hu: float) -> list[Part]:
    radii = radius_mm * rng.uniform(0.8, 1.2, 3)
    angles = rng.uniform(-90, 90, 3)
    spots = rng.uniform(host.low, host.high, (NUM_CANDIDATES, 3)).astype(np.float32)
    depth = host.level(spots[:, 0], spots[:, 1], spots[:, 2])
    deep = np.flatnonzero(depth < -0.6 * radius_mm)
    centre = vector(spots[deep[0] if deep.size else int(np.argmin(depth))])
    solid = ellipsoid(centre, vector(radii), vector(angles))
    parts = [Part(solid=solid, hu=hu, label=LESION, regions=BELLY, on=(label, LESION))]
    if radius_mm > 14 and rng.random() < 0.4:
        core = grown(solid, -0.5 * radius_mm)
        parts.append(Part(solid=core, hu=hu - 22, label=None, regions=BELLY, on=(LESION,)))
    return parts


def _liver(rng: np.random.Generator, trunk: Trunk) -> Solid:
    """Two lobes, cut from below by a slanting face so that it is a wedge, thick at the right ribs."""
    size, top = rng.uniform(0.92, 1.1), trunk.dome - 108
    right = ellipsoid(
        (68, rng.uniform(-5, 5), 44 + top), (74 * size, 86 * size, 94 * size), vector(rng.uniform(-6, 6, 3))
    )
    reach = rng.uniform(0.8, 1.2)
    left = ellipsoid((2, 44, 80 + top), (82 * reach, 36, 40 * size), (0, rng.uniform(4, 16), rng.uniform(-8, 4)))
    low, slope = rng.uniform(-58, -34), rng.uniform(0.6, 0.85)
    scale = float(1 / np.sqrt(1 + slope**2 + 0.2**2))

    def below(x: Array, y: Array, z: Array) -> Array:
        return np.asarray((low + slope * (126 - x) - 0.2 * y - z) * scale)

    return cut(blended(right, left, 18), below)


def _near(rng: np.random.Generator, place: Vector, spread_mm: float) -> Vector:
    return vector(np.array(place) + rng.uniform(-spread_mm, spread_mm, 3))
