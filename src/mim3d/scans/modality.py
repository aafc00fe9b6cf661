"""What a scan is: CT in Hounsfield units (HU) or something else, and who says so.

Who is asked, in this order: the user or the data set (a setting, a column, the names of channels), the file's own
header (DICOM), the voxels of the scan, and last the set that it belongs to: a crop of soft tissue without air shows
nothing that tells CT from MRI.

Voxels are judged by robust shares, never by single ones. They show HU where enough of them lie near air, the others
lie around soft tissue (which is near 0 HU), and all but padding lie in the range of a CT. An MRI with some voxels of
overshoot shows no air, and one over -32000 to 32000 has a range that no CT has.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

#: Scans whose darkest voxel lies below this were taken for CT by earlier versions; caches of theirs still are.
DARKEST_CT_HU = -200.0

#: Voxels that are looked at in each channel, evenly spaced.
MAX_VOXELS = 250_000

#: Between these lies a CT but for its padding, noise and some metal.
RANGE_HU = (-1500.0, 4000.0)
LOWEST_PADDING_HU = -3100.0
#: Besides two values of padding, and what interpolation makes of them so near, at most this share lies below the range.
MAX_BELOW_RANGE, NEAR_PADDING_HU = 0.03, 150.0
#: Share of voxels above the range that implants of metal may fill where a scan shows air.
MAX_METAL = 0.05
#: Share of voxels below -500 HU that is enough for air; below -200 HU, where air was clipped, it must be larger.
LEAST_AIR, LEAST_DARK = 0.005, 0.1
#: Tissue, which is all that is not air, has its median below this, bones and contrast agent included ...
HIGHEST_TISSUE_HU = 600.0
#: ... and where it fills less than this share of a scan, as a vessel of a lung does, it is not looked at.
LEAST_TISSUE = 0.05
#: Width of the middle half of a crop without air, and the least width of all of it, HU.
MAX_MIDDLE_WIDTH_HU, LEAST_WIDTH_HU = 300.0, 10.0
#: Fat of a CT, by which it is told from MRI where neither shows air.
FAT_HU = -100.0
#: A background of zeros, which masks and MRI have, fills more than this share of a scan.
MAX_ZEROS = 0.1
#: What is added where CT is stored without negative numbers; the share of what is not air that is soft tissue then, and
#: the share of all but padding, where there is some.
ADDED_HU, LEAST_SOFT_TISSUE, LEAST_BESIDE_PADDING = 1024.0, 0.5, 0.25

#: What the voxels of a channel show. ``HU``: air and soft tissue where a CT has them. ``unknown``: no air, but all in a
#: range that soft tissue has in HU. ``unlike``: in the range of a CT, but not distributed like one. ``outside``: never
#: HU. ``HU + 1024``: HU if 1024 is subtracted.
Sign = Literal["HU", "unknown", "unlike", "outside", "HU + 1024"]
Decider = Literal["declared", "header", "voxels", "set", "earlier version", "nobody"]

_WORDS: Mapping[str, frozenset[str]] = {
    "CT": frozenset({"ct", "cta", "cect", "ncct", "ldct", "cbct", "hrct", "computed", "tomodensitometry"}),
    "MR": frozenset(
        "mr mri mrt mra t1 t1w t1c t1ce t1gd t1post t1wce t2 t2w t2f t2star flair adc dwi swi dce lge cine bssfp pd "
        "pdw dixon gre mprage stir haste vibe tof mp2rage qsm magnetic".split()
    ),
    "PT": frozenset({"pt", "pet", "suv", "fdg", "psma", "positron"}),
    "NM": frozenset({"nm", "spect"}),
    "US": frozenset({"ultrasound"}),
}

#: Other modalities, as DICOM writes them.
_CODES = frozenset("CR DX ES IVUS MG OCT OP OPT OT RF SM US XA".split())


@dataclass(frozen=True, kw_only=True)
class ChannelModality:
    """What one channel of a scan is.

    Attributes:
        name: ``CT``, ``MR``, ``PT`` or another as declared; None where nobody says it.
        by: Who decided: what was declared, the file's header, its voxels, the set that it belongs to, an earlier
            version of mim3d by its darkest voxel, or nobody.
        in_hu: Whether its intensities are taken for HU.
        sign: What its voxels show.
    """

    name: str | None = None
    by: Decider = "nobody"
    in_hu: bool = False
    sign: Sign = "unknown"

    @property
    def is_like_ct(self) -> bool:
        """Whether it is declared as another modality, and its voxels are those of a CT."""
        return self.by in ("declared", "header") and self.name in ("MR", "PT") and self.sign == "HU"

    @property
    def is_unlike_ct(self) -> bool:
        """Whether it is taken for CT as declared, and its voxels speak against it."""
        return self.by in ("declared", "header") and self.in_hu and self.sign == "unlike"


def modality_name(text: str | None) -> str | None:
    """The modality that a word stands for, as DICOM writes it (CT, MR, PT); None where it names none.

    Args:
        text: Such as ``CT``, ``MRI``, ``T1w``, ``0: FLAIR`` or ``PET``, or the name of a file.
    """
    words = set(re.split(r"[^a-z0-9]+", text.lower())) if text else set()
    found = [name for name, known in _WORDS.items() if words & known]
    return found[0] if len(found) == 1 else None


def declared_modality(channels: Sequence[str]) -> str | None:
    """What names of channels declare, in the form of :func:`modality_of_channels`; None where none is a modality."""
    return ";".join(channels) if any(map(modality_name, channels)) else None


def modality_of_channels(modality: str | None, num_channels: int) -> list[str | None]:
    """The declared modality of each channel; None for words that name none, which declare nothing.

    Args:
        modality: One for all channels, or one for each separated by ``;``.
        num_channels: Number of channels.
    """
    parts = [part.strip() for part in modality.split(";")] if modality else [""]
    names = [modality_name(part) or (part.upper() if part.upper() in _CODES else None) for part in parts]
    return names if len(names) == num_channels else [names[0] if len(names) == 1 else None] * num_channels


def sign_of(channel: npt.NDArray[Any]) -> Sign:
    """What the voxels of an (X, Y, Z) channel show."""
    values = channel.ravel()
    values = values[:: max(1, values.size // MAX_VOXELS)].astype(np.float64)
    kept, has_padding = _without_padding(values)
    if kept is None:
        return "outside"
    if not kept.size:
        return "unknown"
    if _share(kept > RANGE_HU[1]) > MAX_METAL:
        return "outside"
    dark = _share(kept < DARKEST_CT_HU)
    least_tissue = LEAST_BESIDE_PADDING if has_padding or dark >= LEAST_AIR else LEAST_TISSUE
    if dark < 0.5 and _is_ct_with_peaks(kept[kept >= DARKEST_CT_HU] - ADDED_HU, least_tissue):
        return "HU + 1024"
    if has_padding or _share(kept < -500) >= LEAST_AIR or dark >= LEAST_DARK:
        return "HU" if dark > 1 - LEAST_TISSUE or _median_tissue(kept) < HIGHEST_TISSUE_HU else "unknown"
    low, high = np.percentile(kept, (0.5, 99.5))
    if high > RANGE_HU[1]:
        return "unlike"
    if high - low < LEAST_WIDTH_HU:
        return "outside"
    first, middle, third = np.percentile(kept, (25, 50, 75))
    has_background = low >= 0 and _share(kept == 0) > MAX_ZEROS
    brightest = channel.max()
    if low >= 0 and (brightest == 255 or (has_background and 200 <= brightest < 255)):
        # A picture of 8 bits.
        return "outside"
    is_narrow = third - first < MAX_MIDDLE_WIDTH_HU or low <= FAT_HU
    return "unknown" if middle < HIGHEST_TISSUE_HU and is_narrow and not has_background else "unlike"


def _without_padding(values: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64] | None, bool]:
    """The values in the range of a CT, None where too many lie below it; and whether padding was among them."""
    is_below = values < RANGE_HU[0]
    if not is_below.any():
        return values, False
    below = values[is_below]
    numbers, counts = np.unique(below, return_counts=True)
    common = numbers[np.argsort(counts)[-2:]]
    distances = np.abs(below - common[:, None])
    if np.count_nonzero(distances.min(axis=0) > NEAR_PADDING_HU) > MAX_BELOW_RANGE * values.size:
        return None, False
    padding = np.count_nonzero(below >= LOWEST_PADDING_HU)
    return values[~is_below], bool(padding >= LEAST_AIR * values.size)


def _median_tissue(values: npt.NDArray[np.float64]) -> float:
    tissue = values[values >= DARKEST_CT_HU]
    return float(np.median(tissue)) if tissue.size else 0.0


def _is_ct_with_peaks(values: npt.NDArray[np.float64], least_tissue: float) -> bool:
    """Whether air and soft tissue are two peaks with less between them, as in a CT and hardly ever by chance."""
    air, tissue = _share(values < -500), _share(np.abs(values) < -DARKEST_CT_HU)
    between = _share((values >= -500) & (values <= DARKEST_CT_HU))
    is_soft = tissue >= LEAST_SOFT_TISSUE * (1 - air)
    return air >= LEAST_DARK and tissue >= least_tissue and between < max(air, tissue) / 2 and is_soft


def _share(mask: npt.NDArray[np.bool_]) -> float:
    return float(np.count_nonzero(mask)) / max(1, mask.size)


def decide(
    sign: Sign, *, declared: str | None = None, header: str | None = None, set_in_hu: bool = False
) -> ChannelModality:
    """What a channel is.

    Args:
        sign: What its voxels show.
        declared: Its modality as the user or the data set says; None where they say nothing.
        header: Its modality as its file says.
        set_in_hu: Whether the other scans of its set are CT.
    """
    name = declared or header
    if name is not None:
        # Voxels that can never be HU overrule a declaration; those of bones alone or behind a mask do not.
        in_hu = name == "CT" and sign not in ("outside", "HU + 1024")
        return ChannelModality(name=name, by="declared" if declared else "header", in_hu=in_hu, sign=sign)
    if sign == "HU":
        return ChannelModality(name="CT", by="voxels", in_hu=True, sign=sign)
    if sign == "unknown" and set_in_hu:
        return ChannelModality(name="CT", by="set", in_hu=True, sign=sign)
    return ChannelModality(by="nobody" if sign == "unknown" else "voxels", sign=sign)


def is_ct_set(channels: Sequence[ChannelModality]) -> bool:
    """Whether most scans of a set are CT in HU, of those that are known; one channel of each.

    Scans that are unknown by themselves have no vote.
    """
    votes = [channel.in_hu for channel in channels if channel.by not in ("nobody", "set")]
    return 2 * sum(votes) > len(votes)
