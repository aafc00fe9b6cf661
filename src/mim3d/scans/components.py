"""Connected components of a label map: the largest kept, small ones removed."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing


def connected(mask_XYZ: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], int]:
    """Number what hangs together by faces, edges or corners of voxels (26 neighbours).

    Returns:
        (X, Y, Z) number of each voxel's component from 1, 0 outside the mask, four bytes each; and how many there are.
    """
    from scipy.ndimage import generate_binary_structure, label

    numbers, count = label(mask_XYZ, structure=generate_binary_structure(3, 3))
    return numbers, int(count)


def remove_components(
    labels: npt.NDArray[Any], *, spacing_mm: Spacing, largest: Collection[int] = (), min_ml: float = 0.0
) -> None:
    """Turn components of labels into background 0, in place.

    A component is what hangs together, see ``connected``, of one label alone.

    Args:
        labels: (X, Y, Z) label map, background 0.
        spacing_mm: Voxel size along X, Y, Z.
        largest: Labels of which the largest component alone is kept; of equals the first in the order of voxels.
        min_ml: Components of any label smaller than this volume are removed, in millilitres; 0 keeps all.
    """
    from scipy.ndimage import find_objects

    min_voxels = min_ml * 1000 / math.prod(spacing_mm)
    for value, box in enumerate(find_objects(labels), start=1):
        if box is None or not (min_ml or value in largest):
            continue
        inside = labels[box]
        components, count = connected(inside == value)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        keeps = np.ones(count, dtype=np.bool_)
        if value in largest:
            keeps[:] = False
            keeps[int(sizes.argmax())] = True
        # A volume that is the limit but for rounding is large enough.
        keeps &= sizes >= min_voxels * (1 - 1e-9)
        if not keeps.all():
            inside[np.append(False, ~keeps)[components]] = 0
