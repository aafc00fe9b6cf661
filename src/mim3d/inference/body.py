"""Which windows are worth computing: those that see some of the body."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.foreground import BOX_BLOCK
from mim3d.caching.preprocessing import CROP_MARGIN, Prepared
from mim3d.core.types import Triple
from mim3d.inference.windows import Box, Windows, inside_of


def body_windows(prepared: Prepared, windows: Windows) -> list[Triple]:
    """First voxel of each window that sees some of the body.

    The body is what ``mim3d.caching.foreground`` makes its box of: blocks of 4 voxels a side of which at least half lie
    above the threshold of foreground in some channel (-950 HU in CT; in other scans 5 % of the way from the darkest
    voxel to the 99.5th percentile), so that noise in the air and thin tables do not count. Windows are laid over the
    box around it and 8 voxels more on every side, and those that touch none of its blocks are left out. A scan with
    next to no foreground by that rule is all body.

    The scores of the windows that are left differ from those of a sweep over the whole scan, as windows lie elsewhere.
    """
    shape = _triple(prepared.image.shape[1:])
    is_body = prepared.foreground.blocks
    places = windows.places(shape, _widened(prepared.foreground.box, shape))
    kept = [place for place in places if _touches(is_body, inside_of(place, windows.patch_size, shape))]
    # The box is the whole scan where no block counts.
    return kept or places


def _widened(box: Box, shape: Triple) -> Box:
    start = _triple([max(0, first - CROP_MARGIN) for first in box[0]])
    return start, _triple([min(size, last + CROP_MARGIN) for last, size in zip(box[1], shape, strict=True)])


def _touches(is_body: npt.NDArray[np.bool_], box: Box) -> bool:
    blocks = tuple(slice(first // BOX_BLOCK, -(-last // BOX_BLOCK)) for first, last in zip(*box, strict=True))
    return bool(is_body[blocks].any())


def _triple(values: Any) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z
