"""The command that turns a data set into a cache."""

from collections import defaultdict
from typing import Literal

from mim3d.caching.cache import Cache, build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.resources import in_words, num_cores
from mim3d.datasets.cases import read_cases


def cache(
    data: str,
    out: str,
    spacing_mm: tuple[float, float, float] | None = None,
    intensities: Literal["auto", "lossless", "8-bit"] = "auto",
    window: tuple[float, float] = (-1000.0, 1000.0),
    num_levels: int = 3,
    body_crop: bool = False,
    num_workers: int | None = None,
    pack_gb: float | None = None,
    scheduler: str | None = None,
) -> str:
    """Preprocess a data set into a folder from which training reads single crops.

    May be stopped and run again at any moment: what is finished and unchanged is kept. Scans that cannot be used are
    left out and listed in OUT/failed.csv.

    Args:
        data: Folder of scans, DICOM tree, MSD folder or dataset.json, nnU-Net raw folder, or CSV or JSON list.
        out: Folder for the cache.
        spacing_mm: Voxel size along X, Y, Z to resample to, in millimetres; each scan keeps its own if not given.
        intensities: lossless; 8-bit, which is smaller and faster to read and enough for pre-training; or auto, lossless
            if the data set has labels, else 8-bit.
        window: What 8 bits of a CT cover, in HU; other modalities use what their foreground covers.
        num_levels: Number of resolutions stored, each half the one before; 1 for full resolution alone.
        body_crop: Keep only the box around the body (what is not air or background), with a small margin.
        num_workers: Number of processes; one per core if not given.
        pack_gb: Bring the cases into files of about so many GB, for network file systems, where 3 is usual; if not
            given a cache that is there keeps its form, and a new one has a folder for each case.
        scheduler: Address of a running Dask scheduler, such as tcp://host:8786; its workers take the place of
            processes here (num_workers is ignored), and must see DATA and OUT under the same paths.

    Returns:
        The path of the cache.

    Raises:
        DataError: The data set, the folder or the cluster cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    preprocessing = Preprocessing(
        spacing_mm=spacing_mm, intensities=intensities, window=window, num_levels=num_levels, body_crop=body_crop
    )
    workers = num_cores() if num_workers is None else num_workers
    cases = read_cases(data)
    made = build_cache(cases, out, preprocessing, num_workers=workers, pack_gb=pack_gb, scheduler=scheduler)
    if made.failed:
        print(f"{len(made.failed)} of {len(made) + len(made.failed)} scans left out, the reasons are in failed.csv:")
        for row in made.failed[:3]:
            print(f"  {row['reason']}")
    copies = _copies(made)
    if copies:
        others = len(copies) - 1
        more = f" (+ {others} more pair{'s' * (others > 1)})" if others else ""
        print(f"2 scans have the same content: {', '.join(copies[0])}{more}")
    ratio = made.size_bytes / max(made.source_bytes, 1)
    print(f"{made.path}: {len(made)} scans, {in_words(made.size_bytes)}, {ratio:.2f} of the size of the sources")
    return made.path


def _copies(made: Cache) -> list[tuple[str, str]]:
    """Pairs of ids whose images are the same files byte for byte: the first of them with each other one."""
    alike: dict[str, list[str]] = defaultdict(list)
    for scan in made:
        alike[scan.source_digest].append(scan.case.id)
    return [(ids[0], other) for ids in alike.values() for other in ids[1:]]
