"""What names of labels mean in SNOMED CT, and the colours in which viewers show them.

Anatomy is found by its whole name, however it is spelt: organs of the published data sets and what lies beside them.
Left and right are modifiers. Tumours and other altered tissue are found by a word, and the organ in the same name is
where they lie. Other names have no code here: a wrong one would be worse.
"""

import math
import re
from dataclasses import dataclass

#: Lightness, green to red and blue to yellow of CIELab.
Lab = tuple[float, float, float]

#: Name -> keyword of SNOMED CT in pydicom's dictionary, and colour.
_ANATOMY: dict[str, tuple[str, Lab]] = {
    "spleen": ("Spleen", (50.0, 33.0, -23.0)),
    "kidney": ("Kidney", (52.0, 40.0, 28.0)),
    "gallbladder": ("Gallbladder", (60.0, -20.0, 30.0)),
    "oesophagus": ("Esophagus", (74.0, 12.0, 18.0)),
    "liver": ("Liver", (45.0, 35.0, 32.0)),
    "stomach": ("Stomach", (68.0, 30.0, 24.0)),
    "aorta": ("Aorta", (53.0, 65.0, 46.0)),
    "ascending aorta": ("AscendingAorta", (58.0, 60.0, 36.0)),
    "inferior vena cava": ("InferiorVenaCava", (45.0, 5.0, -55.0)),
    "portal vein": ("PortalVein", (58.0, -8.0, -42.0)),
    "splenic vein": ("SplenicVein", (62.0, 10.0, -40.0)),
    "portal and splenic vein": ("BloodVessel", (58.0, -8.0, -42.0)),
    "hepatic vein": ("HepaticVein", (64.0, -14.0, -34.0)),
    "hepatic vessel": ("BloodVessel", (64.0, -14.0, -34.0)),
    "vessel": ("BloodVessel", (55.0, 55.0, 20.0)),
    "pancreas": ("Pancreas", (80.0, 14.0, 48.0)),
    "adrenal": ("AdrenalGland", (76.0, 24.0, 46.0)),
    "duodenum": ("Duodenum", (85.0, -6.0, 40.0)),
    "small bowel": ("SmallIntestine", (78.0, 8.0, 34.0)),
    "colon": ("Colon", (63.0, 18.0, 40.0)),
    "rectum": ("Rectum", (55.0, 22.0, 36.0)),
    "bladder": ("Bladder", (82.0, -4.0, 60.0)),
    "prostate": ("Prostate", (66.0, 34.0, 8.0)),
    "uterus": ("Uterus", (70.0, 36.0, -4.0)),
    "lung": ("Lung", (72.0, 14.0, 10.0)),
    "trachea": ("Trachea", (78.0, -12.0, -16.0)),
    "heart": ("Heart", (50.0, 50.0, 30.0)),
    "left ventricle": ("LeftVentricle", (54.0, 62.0, 38.0)),
    "right ventricle": ("RightVentricle", (52.0, 12.0, -48.0)),
    "left atrium": ("LeftAtrium", (64.0, 48.0, 22.0)),
    "right atrium": ("RightAtrium", (62.0, 6.0, -36.0)),
    "left ventricle myocardium": ("LeftVentricleMyocardium", (44.0, 38.0, 24.0)),
    "pulmonary artery": ("PulmonaryArtery", (48.0, 26.0, -56.0)),
    "brain": ("Brain", (80.0, 8.0, 12.0)),
    "hippocampus": ("Hippocampus", (66.0, -34.0, 12.0)),
    "spinal cord": ("SpinalCord", (88.0, -4.0, 44.0)),
    "thyroid": ("Thyroid", (62.0, 40.0, 40.0)),
    "femur": ("Femur", (90.0, 0.0, 14.0)),
}

#: Other ways to say the same, in words as ``_words`` gives them.
_VARIANTS = {
    "gall bladder": "gallbladder",
    "esophagus": "oesophagus",
    "arota": "aorta",
    "postcava": "inferior vena cava",
    "ivc": "inferior vena cava",
    "portal vein and splenic vein": "portal and splenic vein",
    "adrenal gland": "adrenal",
    "suprarenal gland": "adrenal",
    "urinary bladder": "bladder",
    "thyroid gland": "thyroid",
    "small intestine": "small bowel",
    "large intestine": "colon",
    "large bowel": "colon",
    "blood vessel": "vessel",
    "myocardium of left ventricle": "left ventricle myocardium",
    "left ventricular myocardium": "left ventricle myocardium",
    **{
        form.format(side=side, part=part): f"{side} {part}"
        for side in ("left", "right")
        for part in ("ventricle", "atrium")
        for form in ("heart {side} {part}", "heart {part} {side}", "{side} heart {part}", "{part} {side}")
    },
    "hepatic": "liver",
    "renal": "kidney",
    "pancreatic": "pancreas",
    "pulmonary": "lung",
    "splenic": "spleen",
    "prostatic": "prostate",
}

#: Word in a name of altered tissue -> keyword of SNOMED CT, the most telling first; the last are left without a code.
_ALTERED = (
    (r"o?edema", "Edema"),
    (r"necro\w*", "Necrosis"),
    (r"metasta\w*", "NeoplasmMetastatic"),
    (r"cysts?", "Cyst"),
    (r"nodules?", "Nodule"),
    (r"ha?emorrhages?", "Hemorrhage"),
    (r"tumou?rs?|cancers?|neoplasms?|\w*carcinomas?|\w*sarcomas?|gliomas?", "Neoplasm"),
    (r"lesions?", "Lesion"),
    (r"infarct\w*|enhancing", None),
)
_ALTERED_COLOUR: Lab = (80.0, -50.0, 46.0)

_SIDES = {"left": "Left", "l": "Left", "lt": "Left", "right": "Right", "r": "Right", "rt": "Right"}

#: Turn from the colour of one segment to that of the next where it has none of its own: far apart for any number.
_GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the name of a label means.

    Attributes:
        keyword: Keyword of SNOMED CT in pydicom's dictionary; None where it has no code here.
        is_altered: Whether it is altered tissue, such as a tumour, and no healthy anatomy.
        side: Keyword of its side, ``Left`` or ``Right``; None where it has none.
        organ: Keyword of the organ that altered tissue lies in; None where the name does not say.
        colour: Its recommended colour; None where it has none of its own.
    """

    keyword: str | None = None
    is_altered: bool = False
    side: str | None = None
    organ: str | None = None
    colour: Lab | None = None


def meaning_of(name: str) -> Meaning:
    """What the name of a label means."""
    words = _words(name)
    for pattern, keyword in _ALTERED:
        if not any(re.fullmatch(pattern, word) for word in words):
            continue
        organ, side = None, None
        # The longest name in it.
        spans = [(start, stop) for start in range(len(words)) for stop in range(start + 1, len(words) + 1)]
        for start, stop in sorted(spans, key=lambda span: span[0] - span[1]):
            found, side = _anatomy(words[start:stop])
            if found is not None:
                organ = found[0]
                break
        return Meaning(keyword=keyword, is_altered=True, organ=organ, side=side, colour=_ALTERED_COLOUR)
    found, side = _anatomy(words)
    return Meaning() if found is None else Meaning(keyword=found[0], side=side, colour=found[1])


def colour_of(meaning: Meaning, number: int) -> Lab:
    """The colour of a segment: its own, or one that depends on its number."""
    angle = number * _GOLDEN_ANGLE
    return meaning.colour or (65.0, 45.0 * math.cos(angle), 45.0 * math.sin(angle))


def _words(name: str) -> list[str]:
    """Words of a name in lower case, whatever joins them, without those that tell nothing."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return [word for word in re.findall(r"[^\W_]+", apart.lower()) if word not in ("the", "organ", "structure")]


def _anatomy(words: list[str]) -> tuple[tuple[str, Lab] | None, str | None]:
    """What words name as a whole, in one form or the other, with its side; None where that is not known."""
    sides = {_SIDES[word] for word in words if word in _SIDES}
    without = [word for word in words if word not in _SIDES]
    for kept, side in ((words, None), (without, next(iter(sides), None))):
        phrase = " ".join(kept)
        for form in (phrase, phrase.removesuffix("s"), " ".join(word.removesuffix("s") for word in kept)):
            found = _ANATOMY.get(_VARIANTS.get(form, form))
            if found is not None and (side is None or len(sides) == 1):
                return found, side
    return None, None
