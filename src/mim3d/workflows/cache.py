"""From a data set to a cache, and what is said of it at the end."""

from collections import defaultdict

from mim3d.caching.build import build_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.progress import say
from mim3d.core.resources import in_words
from mim3d.datasets.cases import read_cases


def cache_data_set(
    data: str,
    out: str,
    preprocessing: Preprocessing,
    *,
    num_workers: int | None,
    pack_gb: float | None,
    scheduler: str | None,
) -> str:
    """Preprocess a data set into a cache, print what came of it, and return the path of the cache.

    Args:
        data: Any form of DATA.
        out: Folder for the cache.
        preprocessing: How scans are prepared and stored.
        num_workers: Number of processes; None for one per core.
        pack_gb: Size of packs in GB; None keeps the form of a cache that is there.
        scheduler: Address of a running Dask scheduler; None for processes of this machine.
    Raises:
        DataError: The data set, the folder or the cluster cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    cases = read_cases(data)
    made = build_cache(cases, out, preprocessing, num_workers=num_workers, pack_gb=pack_gb, scheduler=scheduler)
    if made.failed:
        print(f"{len(made.failed)} of {len(made) + len(made.failed)} scans left out, the reasons are in failed.csv:")
        for row in made.failed[:3]:
            say(f"  {row['reason']}")
    alike: dict[str, list[str]] = defaultdict(list)
    for scan in made:
        alike[scan.source_digest].append(scan.case.id)
    # The first scan of each content with every other one.
    copies = [(ids[0], other) for ids in alike.values() for other in ids[1:]]
    if copies:
        others = len(copies) - 1
        more = f" (+ {others} more pair{'s' * (others > 1)})" if others else ""
        say(f"2 scans have the same content: {', '.join(copies[0])}{more}")
    ratio = made.size_bytes / max(made.source_bytes, 1)
    say(f"{made.path}: {len(made)} scans, {in_words(made.size_bytes)}, {ratio:.2f} of the size of the sources")
    return made.path
