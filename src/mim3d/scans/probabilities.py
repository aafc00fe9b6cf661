"""Class probabilities of a scan as one NIfTI file of several volumes, whatever their size."""

import math
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError
from mim3d.core.files import atomic_file, explained_write
from mim3d.scans.grids import Grid
from mim3d.scans.nifti import write_nifti


class ProbabilityFile:
    """A 4-D NIfTI file that is filled part by part: float32, one volume per channel, on a scan's own grid.

    Until it is saved the numbers lie in a file beside it, not in memory: 4 bytes per voxel and channel of disk.

    Args:
        path: File to be written; it ends in .nii or .nii.gz. Missing folders are made.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._stored: npt.NDArray[np.float32] | None = None
        self._grid: Grid | None = None

    def __enter__(self) -> "ProbabilityFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stored = None
        if self._scratch is not None:
            self._scratch.cleanup()

    def target(self, grid: Grid, num_channels: int) -> npt.NDArray[np.float32]:
        """(X, Y, Z, K) zeros along RAS+ axes, to be filled.

        Raises:
            DataError: The folder cannot be written to, or its disk has not enough room.
        """
        size_bytes = 4 * math.prod(grid.shape) * num_channels
        with explained_write(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            free_bytes = shutil.disk_usage(self._path.parent).free
            if size_bytes > free_bytes:
                raise DataError(
                    f"{self._path}: the probabilities of {num_channels} channels need {size_bytes / 2**30:.1f} GiB of "
                    f"disk, and {free_bytes / 2**30:.1f} GiB are free; choose another disk, or --probabilities false."
                )
            self._scratch = tempfile.TemporaryDirectory(
                prefix=".", suffix=".partial", dir=self._path.parent, ignore_cleanup_errors=True
            )
            self._stored = np.memmap(
                os.path.join(self._scratch.name, "probabilities"),
                dtype=np.float32,
                mode="w+",
                shape=(*grid.shape, num_channels),
                order="F",
            )
        self._grid = grid
        # Reorientation concerns the first three axes; the channels stay last.
        view: Any = grid.to_ras(self._stored)
        return view

    def save(self) -> None:
        """Write the file; it appears whole or not at all.

        Raises:
            DataError: The disk is full.
        """
        assert self._stored is not None and self._grid is not None
        with atomic_file(self._path) as part:
            write_nifti(str(part), self._stored, self._grid)
