"""The command that turns a data set into a cache."""

import os
from typing import Literal

from mim3d.data.cache import build_cache
from mim3d.data.cases import read_cases
from mim3d.data.preprocessing import Preprocessing


def cache(
    data: str,
    out: str,
    spacing_mm: tuple[float, float, float] | None = None,
    intensities: Literal["auto", "lossless", "8-bit"] = "auto",
    window: tuple[float, float] = (-1000.0, 1000.0),
    num_levels: int = 3,
    num_workers: int | None = None,
) -> str:
    """Preprocess a data set into a folder from which training reads single crops.

    May be stopped and run again at any moment: what is finished and unchanged is kept. Scans that cannot be used are
    left out and listed in OUT/failed.json.

    Args:
        data: Folder of scans, DICOM tree, MSD folder or dataset.json, nnU-Net raw folder, or CSV or JSON list.
        out: Folder for the cache.
        spacing_mm: Voxel size along X, Y, Z to resample to, in millimetres; each scan keeps its own if not given.
        intensities: lossless; 8-bit, which is smaller and faster to read and enough for pre-training; or auto, lossless
            if the data set has labels, else 8-bit.
        window: What 8 bits of a CT cover, in HU; other modalities use what their foreground covers.
        num_levels: Number of resolutions stored, each half the one before; 1 for full resolution alone.
        num_workers: Number of processes; one per core if not given.

    Returns:
        The path of the cache.

    Raises:
        DataError: The data set or the folder cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    preprocessing = Preprocessing(spacing_mm=spacing_mm, intensities=intensities, window=window, num_levels=num_levels)
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    made = build_cache(read_cases(data), out, preprocessing, num_workers=workers)
    if made.failed:
        print(f"{len(made.failed)} of {len(made) + len(made.failed)} scans left out, the reasons are in failed.json:")
        for row in made.failed[:3]:
            print(f"  {row['reason']}")
    ratio = made.size_bytes / max(made.source_bytes, 1)
    print(f"{made.path}: {len(made)} scans, {_readable(made.size_bytes)}, {ratio:.2f} of the size of the sources")
    return made.path


def _readable(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
