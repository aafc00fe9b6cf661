"""What fills the phantom: labelled organs and lesions; and vessels, heart, airways, bowel with gas, psoas muscles."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mim3d.phantoms.parts import (
    AORTA,
    BELLY,
    BODY,
    CAVITY,
    CHEST,
    LEFT_KIDNEY,
    LESION,
    LIVER,
    RIGHT_KIDNEY,
    SPLEEN,
    THORAX,
    Part,
    Tissues,
)
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
from mim3d.phantoms.trunk import Spine, Trunk

_COLON: tuple[Vector, ...] = (
    (98, 0, -190),
    (103, -4, -110),
    (104, 0, -60),
    (88, 30, -42),
    (50, 58, -58),
    (0, 66, -70),
    (-50, 62, -48),
    (-88, 34, -10),
    (-104, 0, 8),
    (-110, -20, -40),
    (-108, -16, -110),
    (-100, -5, -190),
)
#: Candidates among which the place of a lesion is drawn.
NUM_CANDIDATES = 400


@dataclass(frozen=True, kw_only=True)
class Kidney:
    """One kidney: its label value, its shape, and how that is placed and turned."""

    label: int
    solid: Solid
    centre: Vector
    angles_deg: Vector


@dataclass(frozen=True, kw_only=True)
class Organs:
    """Solids that lesions and vessels need to know; the right kidney comes first."""

    liver: Solid
    spleen: Solid
    kidneys: tuple[Kidney, Kidney]


def draw_organs(rng: np.random.Generator, trunk: Trunk) -> Organs:
    """Draw the solid organs, each kept clear of the others, of the spine and of the diaphragm."""
    poses: list[tuple[Vector, Vector]] = []
    for sign, place in ((1, (66, -33, -14)), (-1, (-64, -34, 3))):
        centre = _near(rng, place, 4)
        # The angles bring the upper pole inwards and turn the hilum to the front.
        poses.append((centre, (rng.uniform(-10, 2), -sign * rng.uniform(6, 15), -sign * rng.uniform(15, 38))))
    kidneys = []
    for label, (centre, angles) in zip((RIGHT_KIDNEY, LEFT_KIDNEY), poses, strict=True):
        size = rng.uniform(0.9, 1.12)
        solid = ellipsoid(centre, (27 * size, 23.5 * size, 53 * size), angles)
        kidneys.append(Kidney(label=label, solid=solid, centre=centre, angles_deg=angles))
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
    return Organs(
        liver=cut(liver, outside(grown(right.solid, 5))),
        spleen=cut(spleen, outside(grown(left.solid, 5))),
        kidneys=(right, left),
    )


def organ_parts(rng: np.random.Generator, organs: Organs, tissues: Tissues) -> list[Part]:
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
    for kidney in organs.kidneys:
        centre = np.array(kidney.centre)
        inward = rotation(kidney.angles_deg) @ np.array([-1.0 if centre[0] > 0 else 1.0, 0.0, 0.0])
        sinus = ellipsoid(vector(centre + 17 * inward), (17, 7, 19), kidney.angles_deg)
        pelvis = ellipsoid(vector(centre + 18 * inward), (13, 4.5, 12), kidney.angles_deg)
        parts += [
            Part(solid=grown(kidney.solid, 7), hu=tissues.fat, regions=BELLY),
            Part(solid=kidney.solid, hu=tissues.renal_cortex, label=kidney.label, regions=BELLY),
            Part(solid=grown(kidney.solid, -6.5), hu=tissues.renal_medulla, label=kidney.label, regions=BELLY),
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
        kidney = organs.kidneys[0 if rng.random() < 0.5 else 1]
        hu = tissues.cyst if rng.random() < 0.6 else 0.5 * (tissues.renal_cortex + 30)
        parts += _lesion(rng, kidney.solid, kidney.label, float(rng.uniform(7, 13)), hu)
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


def chest_parts(rng: np.random.Generator, trunk: Trunk, tissues: Tissues) -> list[Part]:
    """Heart with its chambers, airways, gullet, and the vessels of the lungs."""
    top = trunk.dome
    heart = ellipsoid((-24, 24, top + 34), (60, 46, 50), (0, 28, -22))
    parts = [Part(solid=grown(heart, 2), hu=tissues.fat, regions=THORAX)]
    parts.append(Part(solid=heart, hu=tissues.heart, regions=THORAX))
    for centre, radii in (
        ((-42, 22, top + 28), (24, 26, 30)),
        ((-2, 34, top + 36), (24, 20, 32)),
        ((-8, -2, top + 52), (32, 14, 18)),
    ):
        parts.append(Part(solid=ellipsoid(centre, radii, (0, 20, -20)), hu=tissues.heart_chamber, regions=THORAX))
    gullet = ((-10, -20, top - 12), (-6, -26, top + 40), (0, -26, 330))
    parts += _painted(tube(gullet, (8, 8, 8)), tissues.bowel_wall, CAVITY)
    parts += _painted(tube(((22, 22, top + 70), (24, 18, 330)), (11, 10)), tissues.vein, THORAX)
    for sign in (1, -1):
        bronchus = ((0, -12, 215), (sign * 26, -10, 192), (sign * 58, -14, 170))
        parts += _painted(tube(bronchus, (9, 8, 4.5)), tissues.bowel_wall, THORAX)
        parts += _painted(tube(bronchus, (7, 6, 3)), tissues.gas, THORAX)
        # Vessels leave a lung's hilum in all directions and fork once, thinning to the pleura.
        hilum = np.array([sign * 34.0, -6.0, 180.0])
        parts += _painted((ellipsoid(vector(hilum), (17, 15, 24)),), tissues.vein, THORAX)
        for _ in range(22):
            heading = np.array([sign, 0.0, 0.0]) * 0.5 + rng.normal(0, 0.75, 3) * (0.7, 1.0, 1.5)
            heading[0] = sign * abs(heading[0])
            heading /= np.linalg.norm(heading)
            fork = hilum + heading * rng.uniform(25, 50)
            stem = tube((vector(hilum), vector(fork)), (5, 3.2), piece_mm=25)
            parts += _painted(stem, tissues.vein, (CHEST,), keep=True)
            for _ in range(3):
                end = fork + (heading + rng.normal(0, 0.45, 3)) * rng.uniform(30, 60)
                branch = tube((vector(fork), vector(end)), (2.6, 0.9), piece_mm=30)
                parts += _painted(branch, tissues.vein - 60, (CHEST,), keep=True)
    parts += _painted(tube(((0, -12, 215), (0, -8, 340)), (10, 10)), tissues.bowel_wall, THORAX)
    parts += _painted(tube(((0, -12, 215), (0, -8, 340)), (8, 8)), tissues.gas, THORAX)
    return parts


def vessel_parts(rng: np.random.Generator, trunk: Trunk, spine: Spine, tissues: Tissues) -> list[Part]:
    """Aorta from the heart over its arch to the fork, vena cava, iliac and renal vessels."""
    radius, fork = rng.uniform(10, 13.5), rng.uniform(-112, -92)
    bulge = rng.uniform(1, 1.25)
    down = ((-22, -34, 225), (-21, -34, 150), (-11, -22, 90), (-7, -13, 30), (-5, -12, -40), (-2, -13, fork))
    arch = ((8, 22, trunk.dome + 66), (14, 24, 212), (4, 6, 246), (-14, -24, 248))
    parts: list[Part] = []
    for sign in (1, -1):
        for shift, hu in ((0.0, tissues.artery), (-14.0, tissues.vein)):
            iliac = (
                (sign * 4.0, -14 + 0.5 * shift, fork),
                (sign * 30.0, -8 + shift, fork - 50),
                (sign * 48.0, 5 + shift, fork - 130),
            )
            parts += _painted(tube(_before(spine, iliac), (8, 6.5, 6)), hu, CAVITY)
    cava = _before(spine, ((14, -14, fork - 10), (20, -11, -40), (23, -10, 40), (24, -4, trunk.dome + 4)))
    parts += _painted(tube(cava, (10, 11, 12, 13)), tissues.vein, CAVITY)
    for sign in (1, -1):
        hilum = (sign * 48.0, -28.0, -10.0 if sign > 0 else 6.0)
        parts += _painted(tube((hilum, (sign * 20, -8, 2)), (5, 5)), tissues.vein, BELLY)
        parts += _painted(tube((hilum, (-5, -14, 4)), (2.8, 3)), tissues.artery, BELLY)
    aorta = tube(
        (*arch, *_before(spine, down)), (15, 14.5, 13.5, 13, 12.5, 12.5, 12, radius * bulge, radius, radius * 0.85)
    )
    parts += [Part(solid=piece, hu=tissues.artery, label=AORTA, regions=CAVITY) for piece in aorta]
    return parts


def belly_parts(rng: np.random.Generator, spine: Spine, tissues: Tissues) -> list[Part]:
    """Psoas muscles, mesenteric vessels, small bowel, colon, stomach and pancreas."""
    parts: list[Part] = []
    for sign in (1, -1):
        psoas = (sign * 32, -44, 0), (sign * 42, -42, -70), (sign * 50, -34, -130), (sign * 62, -8, -230)
        parts += _painted(tube(_before(spine, psoas), (8, 17, 22, 22)), tissues.muscle, CAVITY)
    for _ in range(int(rng.integers(14, 24))):
        root = vector(rng.uniform((-20, 5, -60), (20, 25, 0)))
        end = vector(rng.uniform((-85, 10, -150), (85, 55, -30)))
        parts += _painted(tube((root, end), (2.6, 1.4), piece_mm=30), tissues.portal, BELLY)
    for _ in range(int(rng.integers(30, 42))):
        # Small bowel.
        start = rng.uniform((-82, -2, -165), (70, 58, -20))
        line = [vector(start)]
        for _ in range(2):
            start = np.clip(start + rng.uniform(-38, 38, 3), (-90, -6, -180), (76, 62, 0))
            line.append(vector(start))
        radius = float(rng.uniform(9, 13))
        lumen = tube(line, [radius - 3] * 3, piece_mm=20)
        parts += _painted(tube(line, [radius] * 3, piece_mm=20), tissues.bowel_wall, BELLY)
        parts += _painted(lumen, tissues.bowel_fluid + float(rng.uniform(-8, 8)), BELLY)
        if rng.random() < 0.2:
            parts += _gas(lumen, float(np.mean(line, axis=0)[1] + rng.uniform(0, 6)), tissues)
    parts += _colon(rng, tissues)
    pancreas = ((30, 14, 4), (14, 20, 14), (-20, 14, 26), (-70, -16, 40))
    parts += _painted(tube(pancreas, (13, 10, 9.5, 8)), tissues.pancreas, BELLY)
    duodenum = ((30, 30, 20), (44, 18, 6), (38, 6, -26), (0, 2, -32))
    parts += _painted(tube(duodenum, (11, 12, 12, 11)), tissues.bowel_wall, BELLY)
    parts += _painted(tube(duodenum, (8, 9, 9, 8)), tissues.bowel_fluid, BELLY)
    full = rng.uniform(0.85, 1.2)
    stomach = ((-56, -10, 88), (-68, 16, 62), (-52, 44, 28), (-12, 50, 6), (22, 38, 14))
    radii = (34 * full, 34 * full, 27 * full, 18, 11)
    lumen = tube(stomach, [radius - 4 for radius in radii])
    parts += _painted(tube(stomach, radii), tissues.bowel_wall, BELLY)
    parts += _painted(lumen, tissues.stomach_fluid, BELLY)
    parts += _gas(lumen, float(rng.uniform(28, 50)), tissues)
    return parts


def _colon(rng: np.random.Generator, tissues: Tissues) -> list[Part]:
    """The colon in haustra: wall, then stool or gas, which rises to the front of a patient on the back."""
    line = [vector(np.array(place) + rng.uniform(-6, 6, 3)) for place in _COLON]
    radii = [float(radius) for radius in rng.uniform(15, 23, len(line))]
    wall, lumen = tube(line, radii, piece_mm=20), tube(line, [radius - 3 for radius in radii], piece_mm=20)
    parts = _painted(wall, tissues.bowel_wall, BELLY)
    for piece in lumen:
        parts += _painted((piece,), float(rng.uniform(-40, 60)), BELLY)
        if rng.random() < 0.45:
            middle = 0.5 * (piece.low[1] + piece.high[1])
            parts += _gas((piece,), float(middle + rng.uniform(-16, 8)), tissues)
        for _ in range(3):
            spot = vector(rng.uniform(piece.low, piece.high))
            bubble = grown(ellipsoid(spot, (4, 4, 4)), float(rng.uniform(-2, 1)))
            inside = cut(bubble, piece.level)
            parts.append(Part(solid=inside, hu=float(rng.uniform(-700, -200)), regions=BELLY))
    return parts


def _gas(pieces: Sequence[Solid], level_mm: float, tissues: Tissues) -> list[Part]:
    def above(x: Array, y: Array, z: Array) -> Array:
        return np.asarray(level_mm - y)

    return _painted([cut(piece, above) for piece in pieces], tissues.gas, BELLY)


def _painted(pieces: Sequence[Solid], hu: float, regions: tuple[int, ...] = BODY, *, keep: bool = False) -> list[Part]:
    return [Part(solid=piece, hu=hu, label=None if keep else 0, regions=regions) for piece in pieces]


def _before(spine: Spine, line: Sequence[Vector]) -> list[Vector]:
    """A line drawn against a straight spine, along the patient's own."""
    side, forward = spine.curve(np.array([z for _, _, z in line], dtype=np.float32))
    return [(x + float(dx), y + float(dy), z) for (x, y, z), dx, dy in zip(line, side, forward, strict=True)]
