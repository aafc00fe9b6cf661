"""From a data set to a cache, and what is said of it at the end."""

import warnings
from collections import defaultdict
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Literal

from mim3d.caching.build import build_cache
from mim3d.caching.layout import FAILED
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.set_modality import require_one_kind
from mim3d.caching.summary import CacheSummary
from mim3d.core.left_out import MAX_REASONS, note_left_out
from mim3d.core.names import number_of
from mim3d.core.progress import say
from mim3d.core.resources import in_words
from mim3d.core.types import Spacing
from mim3d.core.worker_processes import ITEM_TIMEOUT_S
from mim3d.datasets.cases import CaseSet, read_cases
from mim3d.datasets.mistaken import on_several_sets
from mim3d.datasets.usable import usable_cases


@dataclass(frozen=True)
class CacheSettings:
    """Settings of `mim3d cache`.

    Attributes:
        data: Folder of scans, DICOM tree, MSD folder or dataset.json, nnU-Net raw folder, or CSV or JSON list.
        out: Folder for the cache.
        spacing_mm: Voxel size along X, Y, Z to resample to, in millimetres; each scan keeps its own if not given.
        intensities: How intensities are stored: lossless; 8-bit, which is smaller and faster to read and enough for
            pre-training; or auto, lossless if the data set has labels, else 8-bit.
        window: What 8 bits of a CT cover and what its reduced resolutions show, in HU; other modalities use what their
            foreground covers.
        num_levels: Number of resolutions stored, each half the one before; 1 for full resolution alone.
        body_crop: Keep only the box around the body (what is not air or background), with a small margin.
        num_workers: Number of processes; one per core if not given.
        pack_gb: Bring the cases into files of about so many GB, for network file systems, where 3 is usual; if not
            given a cache that is there keeps its form, and a new one has a folder for each case.
        scheduler: Address of a running Dask scheduler, such as tcp://host:8786; its workers take the place of
            processes here (num_workers is ignored), and must see DATA and OUT under the same paths.
        strict: Refuse a data set of which a scan cannot be used, with headers checked before any work, or whose scans
            are of several kinds that nothing declares, with a sample of them looked at before any work.
        modality: What made the scans, such as CT or MR, where neither the data set nor a header says it; one for each
            channel separated by ";".
        patient_pattern: Regular expression that finds the patient in the name of a case, such as "STS_[0-9]+".
        timeout_s: Seconds after which a scan that is still not done is given up and left out.
    """

    data: str
    out: str
    _: KW_ONLY
    spacing_mm: Spacing | None = None
    intensities: Literal["auto", "lossless", "8-bit"] = "auto"
    window: tuple[float, float] = (-1000.0, 1000.0)
    num_levels: int = 3
    body_crop: bool = False
    num_workers: int | None = None
    pack_gb: float | None = None
    scheduler: str | None = None
    strict: bool = False
    modality: str | None = None
    patient_pattern: str | None = None
    timeout_s: float = ITEM_TIMEOUT_S

    @property
    def preprocessing(self) -> Preprocessing:
        """How scans are prepared and stored."""
        return Preprocessing(
            spacing_mm=self.spacing_mm,
            intensities=self.intensities,
            window=self.window,
            num_levels=self.num_levels,
            body_crop=self.body_crop,
        )


def cache_data_set(settings: CacheSettings) -> str:
    """Preprocess a data set into a cache, print what came of it, and return the path of the cache.

    Raises:
        DataError: The data set, the folder or the cluster cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    preprocessing, strict = settings.preprocessing, settings.strict
    cases = _with_note_on_sets(
        read_cases(settings.data, modality=settings.modality, patient_pattern=settings.patient_pattern)
    )
    if strict:
        cases = usable_cases(cases, strict=True)
        require_one_kind(cases)
    made = build_cache(
        cases,
        settings.out,
        preprocessing,
        num_workers=settings.num_workers,
        pack_gb=settings.pack_gb,
        scheduler=settings.scheduler,
        strict=strict,
        timeout_s=settings.timeout_s,
    )
    if made.failed:
        num_cases = len(made) + len(made.failed)
        say(f"{len(made.failed)} of {number_of(num_cases, 'scan')} left out, the reasons are in failed.csv:")
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
    scans = number_of(len(made), "scan")
    say(f"{made.path}: {scans}, {in_words(made.size_bytes)}, {ratio:.2f} of the size of the sources")
    return made.path


def _with_note_on_sets(cases: CaseSet) -> CaseSet:
    """The data set, with a note that is said and kept where its label maps come from several data sets."""
    if len(cases.label_sets) < 2:
        return cases
    note = (
        f"{on_several_sets(cases.root, cases.label_sets)}: a cache of all is for pre-training (mim3d pretrain); "
        "mim3d finetune and mim3d probe take a cache of one of them, or of a CSV list (image,label)."
    )
    warnings.warn(note, stacklevel=2)
    return replace(cases, notes=(*cases.notes, note))
