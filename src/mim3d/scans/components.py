"""Connected components of a label map: the largest kept, small ones removed."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.types import Spacing


def find_components(mask_XYZ: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], int]:
    """Label the connected components of a mask; voxels are connected by faces, edges or corners (26 neighbours).

    Returns:
        The number of each voxel's component (X, Y, Z), from 1 and 0 outside the mask, in four bytes each; and the
        number of components.
    """
    from scipy.ndimage import generate_binary_structure, label

    numbers, count = label(mask_XYZ, structure=generate_binary_structure(3, 3))
    return numbers, int(count)


def remove_components(
    labels: npt.NDArray[Any], *, spacing_mm: Spacing, largest: Collection[int] = (), min_ml: float = 0.0
) -> None:
    """Turn components of labels into background 0, in place.

    The components of each label are those of its own mask, see ``find_components``.

    Args:
        labels: Label map (X, Y, Z), background 0.
        spacing_mm: Voxel size along X, Y, Z.
        largest: Labels of which only the largest component is kept; of equals the first in the order of voxels.
        min_ml: Components of any label smaller than this volume are removed, in millilitres; 0 keeps all.
    """
    from scipy.ndimage import find_objects

    min_voxels = min_ml * 1000 / math.prod(spacing_mm)
    for value, box in enumerate(find_objects(labels), start=1):
        if box is None or not (min_ml or value in largest):
            continue
        inside = labels[box]
        components, count = find_components(inside == value)
        sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
        keeps = np.ones(count, dtype=np.bool_)
        if value in largest:
            keeps[:] = False
            keeps[int(sizes.argmax())] = True
        # A volume that is the limit but for rounding is large enough.
        keeps &= sizes >= min_voxels * (1 - 1e-9)
        if not keeps.all():
            inside[np.append(False, ~keeps)[components]] = 0
