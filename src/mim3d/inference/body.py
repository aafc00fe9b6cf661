"""Which windows are worth computing: those that see some of the body."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.data.foreground import BOX_BLOCK, threshold_of
from mim3d.data.preprocessing import CROP_MARGIN, Prepared
from mim3d.inference.windows import Box, Windows, inside_of
from mim3d.types import Triple


def body_windows(prepared: Prepared, windows: Windows) -> list[Triple]:
    """First voxel of each window that sees some of the body.

    The body is what ``mim3d.data.foreground`` makes its box of: blocks of 4 voxels a side of which at least half lie
    above the threshold of foreground in some channel (-950 HU in CT; in other scans 5 % of the way from the darkest
    voxel to the 99.5th percentile), so that noise in the air and thin tables do not count. Windows are laid over the
    box around it and 8 voxels more on every side, and those that touch none of its blocks are left out. A scan with
    next to no foreground by that rule is all body.

    The scores of the windows that are left differ from those of a sweep over the whole scan, as windows lie elsewhere.
    """
    shape = _triple(prepared.image.shape[1:])
    is_body = body_blocks(prepared.image)
    places = windows.places(shape, _widened(prepared.foreground.box, shape))
    kept = [place for place in places if _touches(is_body, inside_of(place, windows.patch_size, shape))]
    # The box is the whole scan where no block counts.
    return kept or places


def body_blocks(image_CXYZ: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether at least half of a block's voxels are foreground in some channel.

    Computed in slabs of a block's height: nothing as large as the image is made.

    Returns:
        ``(ceil(X / 4), ceil(Y / 4), ceil(Z / 4))``; at the far edges a block is what lies inside the scan.
    """
    shape = image_CXYZ.shape[1:]
    thresholds = [threshold_of(channel) for channel in image_CXYZ]
    if image_CXYZ.dtype.kind in "iu":
        # Integers are above a number where they are above the whole number below it; comparing integers is fast.
        thresholds = [at if at == -math.inf else math.floor(at) for at in thresholds]
    starts = [np.arange(0, size, BOX_BLOCK) for size in shape]
    x, y, z = (np.diff(np.append(start, size)) for start, size in zip(starts, shape, strict=True))
    is_body = np.empty((len(x), len(y), len(z)), dtype=np.bool_)
    for place, planes in enumerate(x):
        rows = slice(place * BOX_BLOCK, place * BOX_BLOCK + planes)
        inside = np.zeros((planes, *shape[1:]), dtype=np.bool_)
        for channel, threshold in zip(image_CXYZ, thresholds, strict=True):
            inside |= True if threshold == -math.inf else channel[rows] > threshold
        counts = np.add.reduceat(inside.sum(axis=0, dtype=np.uint8), starts[1], axis=0)
        is_body[place] = 2 * np.add.reduceat(counts, starts[2], axis=1) >= planes * y[:, None] * z
    return is_body


def _widened(box: Box, shape: Triple) -> Box:
    start = _triple([max(0, first - CROP_MARGIN) for first in box[0]])
    return start, _triple([min(size, last + CROP_MARGIN) for last, size in zip(box[1], shape, strict=True)])


def _touches(is_body: npt.NDArray[np.bool_], box: Box) -> bool:
    blocks = tuple(slice(first // BOX_BLOCK, -(-last // BOX_BLOCK)) for first, last in zip(*box, strict=True))
    return bool(is_body[blocks].any())


def _triple(values: Any) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z
