"""From DATA to scans in a cache, for pre-training and fine-tuning alike."""

import os
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mim3d
from mim3d.backbones import BACKBONES, Backbone
from mim3d.caching.build import build_cache
from mim3d.caching.cache import Cache, failure_row, is_cache, open_cache
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.resampling import target_grid
from mim3d.caching.set_modality import require_one_kind
from mim3d.caching.summary import CacheSummary
from mim3d.core.errors import ConfigError, DataError, listed
from mim3d.core.files import plain_text
from mim3d.core.left_out import LeftOutList, in_words
from mim3d.core.names import name_digest, number_of
from mim3d.core.progress import say
from mim3d.core.run_folder import GO_ON, LEFT_OUT_NAME, Run
from mim3d.core.settings import to_mapping, to_named
from mim3d.core.types import Spacing, Triple
from mim3d.core.warned import LeftOutWarning
from mim3d.datasets.cases import Case, CaseSet, read_cases
from mim3d.datasets.mistaken import refuse_several_sets
from mim3d.datasets.usable import Lacks, refuse_or_say, usable_cases
from mim3d.distributed.processes import Processes
from mim3d.inference.input_range import InputRange
from mim3d.scans.intensity import Intensity
from mim3d.scans.volumes import read_grid
from mim3d.weights import weights_digest

#: Longest time after which a network disk shows a file that another machine has written, with a margin.
SHARED_DISK_PATIENCE_S = 90.0


def read_data(
    data: str,
    *,
    lacks: Lacks | None = None,
    keep_labels: bool = False,
    strict: bool = False,
    modality: str | None = None,
    patient_pattern: str | None = None,
) -> CaseSet | Cache:
    """Open a cache, or read a data set and check what headers can tell; no voxel is read.

    Args:
        data: Any form of DATA.
        lacks: What a case lacks to be used, in words; cases that lack something are left out.
        keep_labels: Take label maps where there are some, which must be of one data set; without, they are left out
            altogether.
        strict: Refuse a data set of which a case cannot be used.
        modality: What made all images, where the user says it.
        patient_pattern: Regular expression that finds the patient in the name of a case.
    Raises:
        ConfigError: What only a data set can be told is said of a cache.
        DataError: No case can be used, a list cannot be read, or label maps are of several data sets; or with
            ``strict``, a case cannot be used.
    """
    if is_cache(data):
        if modality is not None or patient_pattern is not None:
            raise ConfigError(
                f"{data} is a cache, whose scans and patients are settled; give modality and patient_pattern when it "
                "is made (mim3d cache), or give the data set itself."
            )
        cache = open_cache(data)
        if keep_labels:
            refuse_several_sets(data, cache.label_sets)
        # What the cache itself left out was said when it was made.
        return replace(cache, failed=()) if lacks is None else with_what_is_needed(cache, lacks, strict=strict)
    found = read_cases(data, recursive_images_only=not keep_labels, modality=modality, patient_pattern=patient_pattern)
    refuse_several_sets(data, found.label_sets)
    return usable_cases(found, lacks=lacks, strict=strict)


def with_what_is_needed(cache: Cache, lacks: Lacks, *, strict: bool) -> Cache:
    """The scans of a cache that lack nothing; the others are its failures, with the reason.

    Raises:
        DataError: Every scan lacks something; or with ``strict``, one does.
    """
    seen = {scan: lacks(scan.case if scan.has_label else replace(scan.case, label=None)) for scan in cache}
    rows = [failure_row(scan.case, f"{cache.path}: {fault}.") for scan, fault in seen.items() if fault]
    if len(rows) == len(cache) and not any(scan.has_label for scan in cache):
        raise DataError(
            f"{cache.path} is a cache of scans without labels, such as pre-training makes "
            f"({listed([row['id'] for row in rows])}); make one from the labelled data set first (mim3d cache DATA "
            "--out CACHE), or give the data set itself."
        )
    if rows:
        refuse_or_say(cache.path, [row["reason"] for row in rows], len(cache), strict=strict)
    return replace(cache, scans=tuple(scan for scan, fault in seen.items() if not fault), failed=tuple(rows))


def unreadable_of(source: CaseSet | Cache) -> tuple[Case, ...]:
    """The cases of a data set that were left out for their files; a cache knows of none."""
    return () if isinstance(source, Cache) else source.unreadable


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
) -> tuple[Cache, LeftOutList]:
    """The cached scans of ``cases``: built or brought up to date from a data set, or those of the cache given.

    With them comes the list of the cases that the run leaves out, to be added to and said at the end of the work.

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
    if source.notes:
        run.note({"data_notes": source.notes})
    if isinstance(source, Cache):
        scans = given_scans(source, cases, spacing_mm)
        num_cases, failed = len(source) + len(source.failed), source.failed
    else:
        # A shared cache holds every case, so that no run drops what another one needs.
        wanted = replace(source, cases=tuple(cases)) if cache_dir is None else source
        preprocessing = Preprocessing(spacing_mm=spacing_mm)
        place = cache_dir or run.path / "cache"
        if processes.is_first:
            if strict:
                require_one_kind(wanted)
            cache = build_cache(wanted, place, preprocessing, num_workers=num_workers)
            say(f"data: {CacheSummary.of(cache).short()}")
            processes.announce("cache", cache.digest)
        else:
            cache = _seen_here(place, processes.wait_for("cache"))
        scans, failed, num_cases = cache.subset(cases), cache.failed, len(cache) + len(cache.failed)
        said = {each.case.id for each in source.left_out}
        require_all([row for row in failed if row["id"] not in said], strict=strict)
    scans.say_remarks(strict=strict)
    run.bind_input("data", scans.digest)
    left_out = LeftOutList(run.path / LEFT_OUT_NAME, num_cases, remedy=GO_ON)
    if run.writes:
        left_out.begin(failed, {scan.case.id for scan in scans})
    if processes.is_first:
        processes.announce("scans", scans.digest)
    elif processes.wait_for("scans") not in (None, scans.digest):
        raise DataError(
            f"{scans.path} on {socket.gethostname()} holds other scans than on the machine of the first process; copy "
            "the same cache to every machine, or use one in a folder that all of them share."
        )
    processes.barrier()
    return scans, left_out


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


def require_all(failed: Sequence[Mapping[str, str]], *, strict: bool) -> None:
    """Warn of scans that could not be used for a cache.

    Raises:
        DataError: ``strict``, and there is one.
    """
    reasons = [row["reason"] for row in failed]
    if reasons and strict:
        raise DataError(
            f"{number_of(len(reasons), 'scan')} cannot be used (strict: nothing is left out): {in_words(reasons)}"
        )
    if reasons:
        warnings.warn(f"left out: {in_words(reasons)}", category=LeftOutWarning, stacklevel=3)


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
                f"case {case.id} has {number_of(len(case.images), 'image')}, but backbone.in_channels is "
                f"{recipe.in_channels}; use --backbone.in_channels {len(case.images)}, or list only the images that "
                "the network shall see."
            )


def inputs_of(settings: Any) -> dict[str, str]:
    """Digests that bind a run to the weights it starts from and to its lists of cases, wherever these lie."""
    weights = {} if settings.weights is None else {"weights": weights_digest(settings.weights)}
    lists = {name: getattr(settings, name, None) for name in ("train_list", "held_out_list")}
    return weights | {
        name: name_digest(plain_text(path)) for name, path in lists.items() if path and os.path.isfile(path)
    }


def encoder_card(recipe: Backbone, intensity: Intensity, scans: Cache) -> dict[str, Any]:
    """What an encoder carries with its weights: how its input was made, and from what it learned."""
    return {
        "backbone": to_named(recipe, BACKBONES),
        "input_multiple": list(recipe.input_multiple),
        "orientation": "RAS+",
        "spacing_mm": to_mapping(scans.preprocessing.spacing_mm),
        "intensity": to_mapping(intensity),
        "data_digest": scans.digest,
        "input_range": to_mapping(InputRange.of(scans)),
        **({"channel_names": list(scans.channels)} if scans.channels else {}),
        "mim3d_version": mim3d.__version__,
    }
