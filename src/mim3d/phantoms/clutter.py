"""What else fills the phantom: great vessels, heart and airways, stomach and bowel with gas, psoas muscles."""

from collections.abc import Sequence

import numpy as np

from mim3d.phantoms.parts import AORTA, BELLY, BODY, CAVITY, CHEST, THORAX, Part, Tissues
from mim3d.phantoms.shapes import Array, Solid, Vector, cut, ellipsoid, grown, tube, vector
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
