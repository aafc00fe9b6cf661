"""From DATA to scans in a cache, for pre-training and fine-tuning alike."""

import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mim3d
from mim3d.backbones import BACKBONES, Backbone
from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache, is_cache, open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.resampling import target_grid
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.run_folder import Run
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Spacing, Triple
from mim3d.datasets.cases import Case, CaseSet, check_cases, read_cases
from mim3d.distributed.processes import Processes
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid
from mim3d.weights import weights_digest

#: Longest time after which a network disk shows a file that another machine has written, with a margin.
SHARED_DISK_PATIENCE_S = 90.0


def read_data(data: str, *, need_labels: bool, keep_labels: bool = False) -> CaseSet | Cache:
    """Open a cache, or read a data set and check what headers can tell; no voxel is read.

    Args:
        data: Any form of DATA.
        need_labels: Whether every case must have a label; without, labels are left out altogether.
        keep_labels: Take labels where there are some, though none is needed.
    Raises:
        DataError: There are files, lists or grids that cannot be used.
    """
    if is_cache(data):
        cache = open_cache(data)
        unlabelled = [scan.case.id for scan in cache if not scan.has_label] if need_labels else []
        if unlabelled:
            raise DataError(
                f"{data} is a cache of scans without labels, such as pre-training makes ({listed(unlabelled)}); make "
                "one from the labelled data set first (mim3d cache DATA --out CACHE), or give the data set itself."
            )
        return cache
    cases = read_cases(data, recursive_images_only=not (need_labels or keep_labels))
    check_cases(cases, need_labels=need_labels)
    return cases


def open_scans(
    source: CaseSet | Cache,
    cases: Sequence[Case],
    run: Run,
    processes: Processes,
    cache_dir: str | None,
    *,
    spacing_mm: Spacing | None,
    num_workers: int | None,
    strict: bool = False,
) -> Cache:
    """The cached scans of ``cases``: built or brought up to date from a data set, or those of the cache given.

    The run is bound to what they hold: it cannot be resumed on other data. The first process builds; the others wait,
    and must find the same on their own machine.

    Args:
        source: What :func:`read_data` gave.
        cases: The cases of it that are wanted.
        run: The run that they are for.
        processes: The processes that run this command.
        cache_dir: Folder of a cache that other runs may share; None for the run's own folder.
        spacing_mm: Voxel size to resample to; None keeps each scan's own.
        num_workers: Processes that build it; None for one per core.
        strict: Refuse scans that cannot be used instead of leaving them out.
    Raises:
        ConfigError: A given cache has another spacing.
        DataError: Nothing can be used; ``strict``, and something cannot; or another machine has other scans.
        Mim3dError: Another process has failed.
    """
    if isinstance(source, Cache):
        scans = given_scans(source, cases, spacing_mm)
    else:
        # A shared cache holds every case, so that no run drops what another one needs.
        wanted = replace(source, cases=tuple(cases)) if cache_dir is None else source
        preprocessing = Preprocessing(spacing_mm=spacing_mm)
        place = cache_dir or run.path / "cache"
        if processes.is_first:
            cache = build_cache(wanted, place, preprocessing, num_workers=num_workers)
            processes.announce("cache", cache.digest)
        else:
            cache = _seen_here(place, processes.wait_for("cache"))
        scans = cache.subset(cases)
        say_left_out(scans, strict=strict)
    run.bind_input("data", scans.digest)
    if processes.is_first:
        processes.announce("scans", scans.digest)
    elif processes.wait_for("scans") not in (None, scans.digest):
        raise DataError(
            f"{scans.path} on {socket.gethostname()} holds other scans than on the machine of the first process; copy "
            "the same cache to every machine, or use one in a folder that all of them share."
        )
    processes.barrier()
    return scans


def given_scans(cache: Cache, cases: Sequence[Case], spacing_mm: Spacing | None) -> Cache:
    """The scans of ``cases`` in a cache that the user gives in place of a data set.

    Raises:
        ConfigError: The cache has another spacing than is asked for.
    """
    own = cache.preprocessing.spacing_mm
    if spacing_mm is not None and own != spacing_mm:
        raise ConfigError(
            f"{cache.path} was made with spacing_mm {own}, not {spacing_mm}; leave spacing_mm out, or give the data "
            "set itself."
        )
    return cache.subset(cases)


def say_left_out(scans: Cache, *, strict: bool) -> None:
    """Warn of each scan that could not be used for a cache.

    Raises:
        DataError: ``strict``, and there is one.
    """
    for row in scans.failed:
        if strict:
            raise DataError(f"{row['reason']} (strict: nothing is left out)")
        warnings.warn(f"left out: {row['reason']}", stacklevel=2)


def _seen_here(place: str | Path, digest: str | None) -> Cache:
    """The cache that the first process has built, as this machine sees it."""
    # A network disk may show another machine's files up to a minute late.
    end = time.monotonic() + SHARED_DISK_PATIENCE_S
    while True:
        try:
            cache = open_cache(place)
            if digest in (None, cache.digest):
                return cache
        except DataError:
            pass
        if time.monotonic() > end:
            raise DataError(
                f"{place} is not on {socket.gethostname()} as the first process has built it; put --cache and --out in "
                "a folder that all machines share, or build the cache first (mim3d cache) and copy it to each."
            )
        time.sleep(0.5)


def shapes_of(source: CaseSet | Cache, cases: Sequence[Case], spacing_mm: Spacing | None) -> list[Triple]:
    """Voxels of every case as it will lie in the cache, from headers alone: enough to plan before any work begins."""
    if isinstance(source, Cache):
        return [scan.shape for scan in source.subset(cases)]
    grids = [read_grid(case.images[0]) for case in cases]
    if spacing_mm is None:
        return [grid.ras_shape for grid in grids]
    return [target_grid(grid.ras_shape, grid.ras_affine, grid.spacing_mm, spacing_mm)[0] for grid in grids]


def check_channels(cases: Sequence[Case], recipe: Backbone) -> None:
    """Hold the number of images per case against the encoder's input channels.

    Raises:
        ConfigError: A case does not fit; the sentence names it.
    """
    for case in cases:
        if len(case.images) != recipe.in_channels:
            raise ConfigError(
                f"case {case.id} has {len(case.images)} images (channels), but backbone.in_channels is "
                f"{recipe.in_channels}; use --backbone.in_channels {len(case.images)}, or list only the images that "
                "the network shall see."
            )


def weights_input(weights: str | None) -> dict[str, str]:
    """The digest that binds a run to the weights it starts from, so that it cannot be resumed from others."""
    return {} if weights is None else {"weights": weights_digest(weights)}


def encoder_card(recipe: Backbone, intensity: Intensity, scans: Cache) -> dict[str, Any]:
    """What an encoder carries with its weights: how its input was made, and from what it learned."""
    return {
        "backbone": to_named(recipe, BACKBONES),
        "input_multiple": list(recipe.input_multiple),
        "orientation": "RAS+",
        "spacing_mm": to_mapping(scans.preprocessing.spacing_mm),
        "intensity": to_mapping(intensity),
        "data_digest": scans.digest,
        "mim3d_version": mim3d.__version__,
    }
