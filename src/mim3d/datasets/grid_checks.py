"""Whether images and labels lie on one grid."""

import itertools
import os

import numpy as np

from mim3d.core.errors import DataError
from mim3d.datasets.records import CaseSet, listed
from mim3d.scans.volumes import Grid, read_grid

#: Corners of two grids may differ by this much, plus a hundredth of a voxel, from rounding in the headers.
TOLERANCE_MM = 1e-3


def require_same_grid(first: Grid, second: Grid) -> None:
    """Check that two files lie on one grid once both are brought to RAS+.

    Raises:
        DataError: They do not; names both files and both grids.
    """
    if first.ras_shape == second.ras_shape:
        corners = np.array([*itertools.product(*[(0, size - 1) for size in first.ras_shape])], dtype=np.float64)
        difference = first.ras_affine - second.ras_affine
        distance_mm = np.abs(corners @ difference[:3, :3].T + difference[:3, 3]).max()
        if distance_mm <= TOLERANCE_MM + 0.01 * min(first.spacing_mm):
            return
    raise DataError(
        f"{second.path} ({second.describe()}) does not lie on the grid of {first.path} ({first.describe()}); "
        "resample one onto the other's grid."
    )


def check_cases(cases: CaseSet, *, need_labels: bool) -> None:
    """Check every case by its headers, before any work.

    Raises:
        DataError: The first fault found: a case without label where ``need_labels``, a missing or unreadable
            file, or channels and labels on different grids.
    """
    unlabelled = [case.id for case in cases.cases if case.label is None]
    if need_labels and unlabelled:
        raise DataError(
            f"{cases.root}: no label for {listed(unlabelled)} ({len(unlabelled)} of {len(cases.cases)} cases); every "
            "case needs one here, so add the labels or leave these cases out."
        )
    files = [path for case in cases.cases for path in (*case.images, *([case.label] if case.label else []))]
    missing = [path for path in files if not os.path.exists(path.split("::")[0])]
    if missing:
        raise DataError(f"{cases.root}: these files do not exist: {listed(missing)}; correct or remove their entries.")
    for case in cases.cases:
        grid = read_grid(case.images[0])
        for path in (*case.images[1:], *([case.label] if case.label else [])):
            require_same_grid(grid, read_grid(path))
