"""The command that turns a data set into a cache."""

from typing import Literal

from mim3d.caching.preprocessing import Preprocessing
from mim3d.core.command import typed
from mim3d.core.worker_processes import ITEM_TIMEOUT_S
from mim3d.workflows.cache import cache_data_set


@typed
def cache(
    data: str,
    out: str,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    intensities: Literal["auto", "lossless", "8-bit"] = "auto",
    window: tuple[float, float] = (-1000.0, 1000.0),
    num_levels: int = 3,
    body_crop: bool = False,
    num_workers: int | None = None,
    pack_gb: float | None = None,
    scheduler: str | None = None,
    strict: bool = False,
    modality: str | None = None,
    patient_pattern: str | None = None,
    timeout_s: float = ITEM_TIMEOUT_S,
) -> str:
    """Preprocess a data set into a folder from which training reads single crops.

    May be stopped and run again at any moment: what is finished and unchanged is kept. Scans that cannot be used are
    left out and listed in OUT/failed.csv; the exit code is 2 then.

    Args:
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

    Returns:
        The path of the cache.

    Raises:
        DataError: The data set, the folder or the cluster cannot be used.
        ConfigError: A setting cannot work, or the folder holds a cache of other settings.
    """
    preprocessing = Preprocessing(
        spacing_mm=spacing_mm, intensities=intensities, window=window, num_levels=num_levels, body_crop=body_crop
    )
    return cache_data_set(
        data,
        out,
        preprocessing,
        num_workers=num_workers,
        pack_gb=pack_gb,
        scheduler=scheduler,
        strict=strict,
        modality=modality,
        patient_pattern=patient_pattern,
        timeout_s=timeout_s,
    )
