"""Scans that Python code holds as arrays: written as files for a moment, so that they are read as any other scan."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError
from mim3d.core.names import is_file_name


class ScanArray:
    """A scan in memory, for :func:`mim3d.embed`.

    Args:
        array: Voxels (X, Y, Z), or (C, X, Y, Z) for several channels; CT in HU.
        affine: (4, 4), voxel index to RAS millimetres, as nibabel has it.
        id: What its row is called.

    Raises:
        ConfigError: It has another number of axes, values that are no numbers, or an id that is no name.
    """

    def __init__(self, array: npt.ArrayLike, affine: npt.ArrayLike, id: str = "array") -> None:
        voxels, to_mm = np.asarray(array), np.asarray(affine)
        if voxels.ndim not in (3, 4) or voxels.dtype.kind not in "biuf" or not voxels.size:
            raise ConfigError(
                f"The array of {id} has the shape {voxels.shape} and the type {voxels.dtype}; it takes numbers "
                "(X, Y, Z), or (C, X, Y, Z) for several channels."
            )
        if to_mm.shape != (4, 4) or to_mm.dtype.kind not in "iuf":
            raise ConfigError(
                f"The affine of {id} has the shape {to_mm.shape}; it takes (4, 4) numbers, to RAS millimetres."
            )
        if not is_file_name(id):
            raise ConfigError(f"The id {id!r} of an array cannot be the name of a file; choose a plain one.")
        self.channels = voxels[None] if voxels.ndim == 3 else voxels
        self.affine = to_mm.astype(np.float64)
        self.id = id

    def write(self, folder: Path) -> list[str]:
        """Write its channels as files, and return their paths."""
        import nibabel

        voxels = self.channels
        if voxels.dtype.kind == "b" or voxels.dtype == np.float16:
            voxels = voxels.astype(np.uint8 if voxels.dtype.kind == "b" else np.float32)
        elif voxels.dtype.itemsize == 8 and voxels.dtype.kind in "iu":
            voxels = voxels.astype(np.int32 if np.abs(voxels).max() < 2**31 else np.float64)
        paths = []
        for number, channel in enumerate(voxels):
            name = f"{self.id}.nii" if len(voxels) == 1 else f"{self.id}_{number:04d}.nii"
            paths.append(str(folder / name))
            nibabel.save(nibabel.Nifti1Image(channel, self.affine), paths[-1])  # type: ignore[no-untyped-call]
        return paths


def named_scans(scans: Any) -> list[str | ScanArray]:
    """The scans that are meant, each a path or an array.

    Raises:
        ConfigError: Something else is among them, or two arrays have one id.
    """
    items: Sequence[Any] = [scans] if isinstance(scans, (str, os.PathLike, ScanArray)) else scans
    if not isinstance(items, (list, tuple)) or not all(isinstance(i, (str, os.PathLike, ScanArray)) for i in items):
        what = type(scans).__name__ if isinstance(scans, np.ndarray) else repr(scans)[:80]
        raise ConfigError(f"scans is {what}, but it takes paths, or arrays as mim3d.ScanArray(array, affine).")
    ids = [item.id for item in items if isinstance(item, ScanArray)]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"Several arrays have the id {max(ids, key=ids.count)}; give each its own.")
    if ids and len(ids) < len(items):
        raise ConfigError("scans holds both paths and arrays; embed them one after the other.")
    return [item if isinstance(item, ScanArray) else os.fspath(item) for item in items]
