"""From a data set to a cache, and what is said of it at the end."""

from collections import defaultdict
from pathlib import Path

from mim3d.caching.build import build_cache
from mim3d.caching.layout import FAILED
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.set_modality import require_one_kind
from mim3d.caching.summary import CacheSummary
from mim3d.core.left_out import MAX_REASONS, note_left_out
from mim3d.core.progress import say
from mim3d.core.resources import in_words
from mim3d.datasets.cases import read_cases
from mim3d.datasets.usable import usable_cases


def cache_data_set(
    data: str,
    out: str,
    preprocessing: Preprocessing,
    *,
    num_workers: int | None,
    pack_gb: float | None,
    scheduler: str | None,
    strict: bool,
    modality: str | None,
    patient_pattern: str | None,
    timeout_s: float,
) -> str:
    """Preprocess a data set into a cache, print what came of it, and return the path of the cache.

    Args:
        data: Any form of DATA.
        out: Folder for the cache.
        preprocessing: How scans are prepared and stored.
        num_workers: Number of processes; None for one per core.
        pack_gb: Size of packs in GB; None keeps the form of a cache that is there.
        scheduler: Address of a running Dask scheduler; None for processes of this machine.
        strict: Refuse a data set of which a scan cannot be used, by headers before any work, or whose scans are of
            several kinds, by those of a sample before any work.
        modality: What made all images, where the user says it.
        patient_pattern: Regular expression that finds the patient in the name of a case.
        timeout_s: Seconds that a scan may take in a process of its own.
    Raises:
        DataError: The data set, the folder or the cluster cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    cases = read_cases(data, modality=modality, patient_pattern=patient_pattern)
    if strict:
        cases = usable_cases(cases, strict=True)
        require_one_kind(cases)
    made = build_cache(
        cases,
        out,
        preprocessing,
        num_workers=num_workers,
        pack_gb=pack_gb,
        scheduler=scheduler,
        strict=strict,
        timeout_s=timeout_s,
    )
    if made.failed:
        num_cases = len(made) + len(made.failed)
        print(f"{len(made.failed)} of {num_cases} scans left out, the reasons are in failed.csv:")
        for row in made.failed[:MAX_REASONS]:
            say(f"  {row['reason']}")
        note_left_out(len(made.failed), num_cases, Path(made.path, FAILED))
    made.say_remarks(strict=strict)
    alike: dict[str, list[str]] = defaultdict(list)
    for scan in made:
        alike[scan.source_digest].append(scan.case.id)
    # The first scan of each content with every other one.
    copies = [(ids[0], other) for ids in alike.values() for other in ids[1:]]
    if copies:
        others = len(copies) - 1
        more = f" (+ {others} more pair{'s' * (others > 1)})" if others else ""
        say(f"2 scans have the same content: {', '.join(copies[0])}{more}")
    for line in CacheSummary.of(made).lines():
        say(line)
    ratio = made.size_bytes / max(made.source_bytes, 1)
    say(f"{made.path}: {len(made)} scans, {in_words(made.size_bytes)}, {ratio:.2f} of the size of the sources")
    return made.path
