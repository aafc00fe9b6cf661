"""The card of a cached case: everything but its voxels, as plain values for JSON and Parquet, and back."""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.caching.fingerprints import fingerprint_of
from mim3d.caching.foreground import Statistics
from mim3d.caching.layout import ByteSource
from mim3d.caching.preprocessing import Prepared
from mim3d.caching.scan import CachedScan
from mim3d.caching.shards import BLOCK
from mim3d.caching.stored_voxels import StoredIntensity
from mim3d.datasets.cases import Case

Card = dict[str, Any]


def card_of(prepared: Prepared, lines: Sequence[StoredIntensity], dtype: np.dtype[Any], num_levels: int) -> Card:
    """What is told of a case's voxels.

    Args:
        prepared: The case.
        lines: What the stored numbers mean in each channel.
        dtype: The type they are stored in.
        num_levels: Resolutions stored.
    """
    return {
        "shape": list(prepared.image.shape[1:]),
        "spacing_mm": [float(mm) for mm in prepared.spacing_mm],
        "affine": prepared.affine.ravel().tolist(),
        "num_channels": prepared.image.shape[0],
        "dtype": dtype.name,
        "num_levels": num_levels,
        "has_label": prepared.label is not None,
        "statistics": [asdict(channel) for channel in prepared.statistics],
        "stored_intensities": [asdict(line) for line in lines],
        "body_box": [voxel for corner in prepared.foreground.box for voxel in corner],
        "foreground": _packed(prepared.foreground.shares),
        "fingerprint": fingerprint_of(prepared.image[0], prepared.spacing_mm, prepared.affine).to_text(),
    }


def scan_of(row: Mapping[str, Any], case: Case, source: ByteSource) -> CachedScan:
    """The scan behind a card.

    Raises:
        KeyError, TypeError, ValueError, IndexError, zlib.error: The card is damaged.
    """
    x, y, z = (int(voxels) for voxels in row["shape"])
    sx, sy, sz = (float(mm) for mm in row["spacing_mm"])
    box = [int(voxel) for voxel in row["body_box"]]
    return CachedScan(
        case=case,
        source=source,
        shape=(x, y, z),
        spacing_mm=(sx, sy, sz),
        affine=np.array(row["affine"], dtype=np.float64).reshape(4, 4),
        num_channels=int(row["num_channels"]),
        dtype=np.dtype(row["dtype"]).name,
        statistics=tuple(Statistics(**channel) for channel in row["statistics"]),
        digest=str(row["digest"]),
        source_digest=str(row["source_digest"]),
        body_box=((box[0], box[1], box[2]), (box[3], box[4], box[5])),
        foreground=_unpacked(row["foreground"], [-(-voxels // BLOCK) for voxels in (x, y, z)]),
        has_label=bool(row["has_label"]),
        num_voxels={int(item["value"]): int(item["count"]) for item in row["num_voxels"]},
        source_bytes=int(row["source_bytes"]),
        size_bytes=int(row["size_bytes"]),
        stored_intensities=tuple(StoredIntensity(**line) for line in row["stored_intensities"]),
        num_levels=int(row["num_levels"]),
    )


def _packed(shares_XYZ: npt.NDArray[np.uint8]) -> str:
    return base64.b64encode(zlib.compress(shares_XYZ.tobytes())).decode("ascii")


def _unpacked(text: str, shape: Sequence[int]) -> npt.NDArray[np.uint8]:
    num_bytes = int(np.prod(shape))
    content = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), num_bytes)
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)
