"""Parts of the phantom: tissues and their HU, labels, and solids to paint."""

from dataclasses import dataclass

import numpy as np

from mim3d.phantoms.shapes import Solid

BACKGROUND, LIVER, SPLEEN, RIGHT_KIDNEY, LEFT_KIDNEY, AORTA, LUNGS, BONES, LESION = range(9)

#: Label value to name.
LABELS: dict[int, str] = {
    BACKGROUND: "background",
    LIVER: "liver",
    SPLEEN: "spleen",
    RIGHT_KIDNEY: "right_kidney",
    LEFT_KIDNEY: "left_kidney",
    AORTA: "aorta",
    LUNGS: "lungs",
    BONES: "bones",
    LESION: "lesion",
}

#: What of the trunk a voxel lies in; organs are painted into one of these.
AIR, FAT, WALL, ABDOMEN, CHEST, MEDIASTINUM = range(6)
#: Where organs of the belly, the chest and the whole trunk may lie.
BELLY = (ABDOMEN,)
THORAX = (MEDIASTINUM, CHEST)
CAVITY = (ABDOMEN, MEDIASTINUM, CHEST)
BODY = (WALL, ABDOMEN, MEDIASTINUM, CHEST)


#: HU without contrast, in the arterial and in the portal venous phase.
_PHASES: dict[str, tuple[float, float, float]] = {
    "muscle": (52, 58, 62),
    "liver": (58, 72, 112),
    "spleen": (48, 128, 122),
    "renal_cortex": (34, 172, 178),
    "renal_medulla": (30, 78, 152),
    "artery": (42, 310, 152),
    "vein": (42, 92, 142),
    "portal": (44, 118, 168),
    "pancreas": (40, 104, 92),
    "bowel_wall": (36, 84, 76),
    "heart": (42, 110, 112),
    "heart_chamber": (44, 250, 140),
}


@dataclass(frozen=True, kw_only=True)
class Tissues:
    """HU of one patient's tissues."""

    fat: float
    skin: float
    muscle: float
    liver: float
    spleen: float
    renal_cortex: float
    renal_medulla: float
    artery: float
    vein: float
    portal: float
    pancreas: float
    bowel_wall: float
    bowel_fluid: float
    stomach_fluid: float
    heart: float
    heart_chamber: float
    bile: float
    lung: float
    disc: float
    cord: float
    cartilage: float
    cancellous: float
    cortical: float
    gas: float
    cyst: float
    hypodense: float
    hyperdense: float


def draw_tissues(rng: np.random.Generator) -> Tissues:
    """Draw a contrast phase (none, arterial, portal venous) and every tissue's HU around it."""
    phase = int(rng.choice(3, p=(0.2, 0.25, 0.55)))
    strength = float(rng.uniform(0.8, 1.15))
    dyed = {name: hu[0] + strength * (hu[phase] - hu[0]) for name, hu in _PHASES.items()}
    dyed["liver"] -= max(0.0, float(rng.normal(0, 14)))  # fatty livers are darker
    plain = {
        "fat": -104.0,
        "skin": 5.0,
        "bowel_fluid": float(rng.choice((18.0, 30.0, 45.0, 190.0), p=(0.35, 0.3, 0.2, 0.15))),
        "stomach_fluid": float(rng.choice((10.0, 28.0, 55.0, 210.0), p=(0.35, 0.3, 0.2, 0.15))),
        "bile": 8.0,
        "lung": float(rng.uniform(-885, -790)),
        "disc": 82.0,
        "cord": 32.0,
        "cartilage": 96.0,
        "cancellous": float(rng.uniform(130, 260)),
        "cortical": float(rng.uniform(560, 820)),
        "gas": -985.0,
        "cyst": 4.0,
    }
    hu = {name: float(value + rng.normal(0, 5)) for name, value in {**plain, **dyed}.items()}
    hu["hypodense"] = hu["liver"] - float(rng.uniform(32, 55))
    hu["hyperdense"] = hu["liver"] + float(rng.uniform(32, 60))
    return Tissues(**hu)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to paint; later parts cover earlier ones.

    Attributes:
        solid: Its shape.
        hu: Its tissue.
        label: Label value it gets; None keeps what is below (a vessel of the liver is liver).
        regions: Regions of the trunk it may lie in.
        on: Label values it may cover; None for all.
    """

    solid: Solid
    hu: float
    label: int | None = BACKGROUND
    regions: tuple[int, ...] = BODY
    on: tuple[int, ...] | None = None
