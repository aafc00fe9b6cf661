"""Volumes as images that a tracker can show: middle slices, one row per volume of a group."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Volume = npt.NDArray[Any]

_GAP = 2

#: Axis perpendicular to the plane, axis down and axis across the page, both reversed: axial, coronal and sagittal
#: slices of RAS+ arrays in the radiological convention.
_PLANES = ((2, 1, 0), (1, 2, 0), (0, 2, 1))


def middle_slices(volumes: Mapping[str, Volume]) -> dict[str, npt.NDArray[np.uint8]]:
    """Images ``(H, W)`` of volumes ``(X, Y, Z)``: those named ``coarse/...`` are the rows of the image ``coarse``.

    The columns are the middle axial, coronal and sagittal slice. Volumes of one group share black and white: all but
    the darkest and brightest half per cent of the first, or for label maps zero and the largest label.
    """
    groups: dict[str, list[Volume]] = {}
    for name, volume in volumes.items():
        if volume.ndim == 3:
            groups.setdefault(name.rpartition("/")[0] or name, []).append(volume)
    return {name: _stacked(rows) for name, rows in groups.items()}


def _stacked(volumes: Sequence[Volume]) -> npt.NDArray[np.uint8]:
    maps = [volume for volume in volumes if not np.issubdtype(volume.dtype, np.floating)]
    scans = [volume for volume in volumes if np.issubdtype(volume.dtype, np.floating)]
    largest = float(max((volume.max(initial=0) for volume in maps), default=0)) or 1.0
    grey = _grey_range(scans[0]) if scans else (0.0, 1.0)
    rows = [_row(volume, grey if np.issubdtype(volume.dtype, np.floating) else (0.0, largest)) for volume in volumes]
    width = max(row.shape[1] for row in rows)
    return np.concatenate([np.pad(row, ((0, _GAP), (0, width - row.shape[1]))) for row in rows])[:-_GAP]


def _row(volume: Volume, limits: tuple[float, float]) -> npt.NDArray[np.uint8]:
    slices = [_cut(volume, *plane) for plane in _PLANES]
    height = max(image.shape[0] for image in slices)
    low, high = limits
    shown = [np.clip((np.nan_to_num(image.astype(np.float64)) - low) / (high - low), 0, 1) * 255 for image in slices]
    padded = [np.pad(image, ((0, height - image.shape[0]), (0, _GAP))) for image in shown]
    return np.round(np.concatenate(padded, axis=1)[:, :-_GAP]).astype(np.uint8)


def _cut(volume: Volume, axis: int, down: int, across: int) -> Volume:
    return np.moveaxis(volume, (axis, down, across), (0, 1, 2))[volume.shape[axis] // 2, ::-1, ::-1]


def _grey_range(volume: Volume) -> tuple[float, float]:
    finite = volume[np.isfinite(volume)]
    low, high = (float(value) for value in np.percentile(finite, (0.5, 99.5))) if finite.size else (0.0, 0.0)
    return (low, high) if high > low else (low, low + 1.0)
