"""What the voxels of a file are: those of a label map, of an image, or neither for sure."""

from enum import Enum

import numpy as np
import numpy.typing as npt

from mim3d.scans.files import nothing_said
from mim3d.scans.volumes import LABEL_TOLERANCE, open_scan

#: A map of few values is one of labels; of more values where most neighbours are equal, as no image's are.
_FEW_VALUES = 16
_MOST_VALUES = 512
_EQUAL_SHARE = 0.7

#: The largest value of a map that is one of labels wherever it lies, except 255 where that is the only one.
_SMALL = 32

#: Pairs of neighbours after which the share of equal ones is known.
_ENOUGH_PAIRS = 100_000


class Voxels(Enum):
    """What the voxels of a file are."""

    SMALL_LABELS = "few small whole numbers, which no image is made of"
    LABELS = "whole numbers from 0 in pieces in which neighbours are equal"
    SHARES = "fractions from 0 to 1, which probabilities and scaled images hold"
    IMAGE = "what neighbours seldom share"
    UNCLEAR = "anything else, or cannot be read"


def voxels_of(path: str) -> Voxels:
    """What the voxels of a file are. It is read until that is clear, which for an image is soon."""
    values: set[int] = set()
    num_pairs = num_equal = 0
    is_whole, is_share, background, brightest = True, True, 0.0, 0.0
    try:
        with nothing_said():
            scan = open_scan(path)
        for slab in scan.read_slabs():
            low, high = float(slab.min()), float(slab.max())
            is_whole &= low >= -LABEL_TOLERANCE and high <= 65535
            is_share &= low >= 0 and high <= 1
            background, brightest = min(background, low), max(brightest, high)
            whole = np.rint(slab) if is_whole and slab.dtype.kind == "f" else slab
            is_whole &= slab is whole or not (np.abs(slab - whole) > LABEL_TOLERANCE).any()
            if is_whole:
                values.update(np.flatnonzero(np.bincount(whole.astype(np.uint16).ravel(order="K"))).tolist())
                is_whole = len(values) <= _MOST_VALUES
            held = (slab[1:] != background) & (slab[:-1] != background)
            num_pairs += int(held.sum())
            num_equal += int(((slab[1:] == slab[:-1]) & held).sum())
            if not (is_whole or is_share) and num_pairs >= _ENOUGH_PAIRS:
                break
    except Exception:  # Whatever a reader raises; it is said when the file is used.
        return Voxels.UNCLEAR
    # Very small numbers are no zeros that were rounded.
    is_whole &= values != {0} or brightest <= 0
    return _voxels(values, num_equal / num_pairs if num_pairs else 1.0, is_whole=is_whole, is_share=is_share)


def is_of_image(labels: npt.NDArray[np.generic], num_values: int) -> bool:
    """Whether whole numbers (X, Y, Z) are grey values: many, and neighbours off the background seldom have the same."""
    if num_values <= _FEW_VALUES:
        return False
    held = (labels[1:] != 0) & (labels[:-1] != 0)
    num_equal = int(((labels[1:] == labels[:-1]) & held).sum())
    return num_equal < _EQUAL_SHARE * int(held.sum())


def _voxels(values: set[int], equal_share: float, *, is_whole: bool, is_share: bool) -> Voxels:
    """What voxels are, by their values where these are whole, and the share of equal neighbours off the background."""
    if is_whole and (len(values) <= _FEW_VALUES or equal_share >= _EQUAL_SHARE):
        if len(values) == 1:
            # A constant other than the background is a scan of nothing.
            return Voxels.LABELS if 0 in values else Voxels.UNCLEAR
        is_small = len(values) <= _FEW_VALUES and (max(values) <= _SMALL or values == {0, 255})
        return Voxels.SMALL_LABELS if is_small else Voxels.LABELS
    if is_share:
        return Voxels.SHARES
    return Voxels.IMAGE if equal_share < _EQUAL_SHARE else Voxels.UNCLEAR
