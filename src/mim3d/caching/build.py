"""Building a cache: resumable at any moment, and the finished bytes do not depend on how it was built."""

import fnmatch
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

from mim3d.caching import layout
from mim3d.caching.cache import Cache, failure_row, open_cache, read_columns, row_of, write_manifest
from mim3d.caching.card_checks import check_card
from mim3d.caching.case import BuildSettings, CaseResult, DigestMemo, content_digest
from mim3d.caching.layout import (
    ByteSource,
    PackedCase,
    cases_in,
    find_packed,
    open_bytes,
    pack_plan,
    size_of,
    write_pack,
)
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.scan import Card, modalities_of
from mim3d.caching.set_modality import SetRemark, in_hu, remarks_on, set_in_hu, settled
from mim3d.caching.summary import CacheSummary
from mim3d.caching.workers import build_in_processes, build_on_cluster, require_scheduler
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import atomic_file, remove_partial, write_csv
from mim3d.core.left_out import write_tracebacks
from mim3d.core.progress import counted
from mim3d.core.resources import num_cores
from mim3d.core.worker_processes import ITEM_TIMEOUT_S
from mim3d.datasets.cases import Case, CaseSet
from mim3d.scans.files import warn_of_assumptions
from mim3d.scans.grids import is_there, split_channel
from mim3d.scans.modality import ChannelModality

#: The memo of digests is written this often, so that a killed build need not hash again what it hashed.
_MEMO_EVERY_S = 10.0

#: Scans of a cache whose content is compared with those of the same names elsewhere.
_NUM_COMPARED = 3


def build_cache(
    cases: CaseSet,
    out: str | Path,
    preprocessing: Preprocessing,
    *,
    num_workers: int | None = 0,
    pack_gb: float | None = None,
    scheduler: str | None = None,
    strict: bool = False,
    timeout_s: float = ITEM_TIMEOUT_S,
) -> Cache:
    """Bring every case of a data set into a cache folder, or bring the folder up to date.

    What is there already and still fits (same source contents, same settings) is kept; changed, new and
    unfinished cases are made; cases no longer in the data set go. It may be killed at any moment and run again.
    Scans that cannot be used are left out and listed in ``failed.csv`` with the reason.

    Args:
        cases: The data set.
        out: The folder; made if missing.
        preprocessing: How to prepare and store the scans; all of them are stored in one way.
        num_workers: Number of processes; 0 works in this one, None takes one per core. They are spawned, and do not
            run the caller's script.
        pack_gb: Size in GB of the files that the cases are brought into. With None a cache that is there stays as it
            is, and a new one has a folder for each case.
        scheduler: Address of a running Dask scheduler, ``tcp://host:8786``, on whose workers the cases are made;
            ``num_workers`` then means nothing. They must see the same files.
        strict: Make no cache where a scan cannot be used.
        timeout_s: Seconds after which the process of a scan that is still not done is ended, and the scan left out;
            without processes of their own nothing can be ended.

    Raises:
        DataError: ``out`` cannot be written, holds other things, other scans or a cache of another version, is being
            built by another process, none of the scans can be used, or the cluster cannot do it.
        ConfigError: ``out`` holds a cache of other settings, a number cannot work, or Dask is not installed.
    """
    if pack_gb is not None and not 0 < pack_gb < math.inf:
        raise ConfigError(f"pack_gb {pack_gb} must be above 0, such as 3.")
    if num_workers is not None and num_workers < 0:
        raise ConfigError(f"num_workers is {num_workers}; it must be 0 or more.")
    if not timeout_s > 0:
        raise ConfigError(f"timeout_s is {timeout_s:g}; it must be above 0, such as {ITEM_TIMEOUT_S:g}.")
    num_workers = num_cores() if num_workers is None else num_workers
    root = os.path.abspath(out)
    preprocessing = preprocessing.settled(any(case.label is not None for case in cases.cases))
    _check_place(root, preprocessing)
    if scheduler is not None:
        require_scheduler(scheduler)
    with _explained(root):
        os.makedirs(os.path.join(root, layout.CASES), exist_ok=True)
        with layout.locked(root):
            pack_gb = _claim(root, cases, preprocessing, pack_gb)
            packed = find_packed(os.path.join(root, layout.PACKS))
            settings = BuildSettings(
                out=root,
                preprocessing=preprocessing,
                labels=cases.label_values,
                packed=frozenset(packed),
                known=_memo(root),
            )
            # What this process has open of a case may be made again.
            layout.forget_open_files()
            build_all = partial(_build_all, num_workers=num_workers, scheduler=scheduler, timeout_s=timeout_s)
            results = build_all(cases.cases, settings)
            modalities = _settle(cases, settings, results, packed, build_all)
            num_failed = _list_failures(root, cases, results)
            if num_failed and strict:
                raise DataError(
                    f"{cases.root}: {num_failed} of {len(cases.cases)} scans cannot be used (strict: nothing is left "
                    f"out); the reasons are in {os.path.join(root, layout.FAILED)}, the others are kept for next time."
                )
            folders = {case.id: folder for case in cases.cases if (folder := results[case.id].folder) is not None}
            sources: dict[str, ByteSource] = {
                folder: packed.get(folder) or os.path.join(root, layout.CASES, folder) for folder in folders.values()
            }
            cards = {folder: _read_card(source) for folder, source in sources.items()}
            for name, folder in folders.items():
                cards[folder] |= {"modalities": [asdict(channel) for channel in modalities[name]]}
            if pack_gb is not None:
                sources = _pack(root, sources, cards, pack_gb)
            used = {name: modalities[name] for name in folders}
            minima = {
                name: [stats["minimum"] for stats in cards[folder]["statistics"]] for name, folder in folders.items()
            }
            _finish(root, cases, folders, sources, cards, remarks_on(used, minima))
            cache = open_cache(root)
            layout.write_json(os.path.join(root, layout.SUMMARY), asdict(CacheSummary.of(cache)))
    return cache


def _list_failures(root: str, cases: CaseSet, results: Mapping[str, CaseResult]) -> int:
    """Write which cases could not be used and why, those that were known before included; the number of the others.

    Raises:
        DataError: None could be used.
    """
    failed = [(case, failure) for case in cases.cases if (failure := results[case.id].failure) is not None]
    rows = [failure_row(each.case, each.reason) for each in cases.left_out]
    rows += [failure_row(case, failure.reason) for case, failure in failed]
    path = os.path.join(root, layout.FAILED)
    write_csv(path, layout.FAILED_COLUMNS, [list(row.values()) for row in rows], remedy=None)
    tracebacks = {case.id: failure.traceback for case, failure in failed if failure.traceback is not None}
    write_tracebacks(Path(root, layout.TRACEBACKS), tracebacks, remedy=None)
    if len(failed) == len(cases.cases):
        raise DataError(f"{cases.root}: none of {len(rows)} scans can be used; the first: {rows[0]['reason']}")
    return len(failed)


def _read_card(source: ByteSource) -> Card:
    try:
        file = open_bytes(source, layout.CARD)
        card: Card = json.loads(file.pread(0, file.size))
        check_card(card)
        return card
    except (OSError, ValueError, RecursionError) as error:
        place = source.path if isinstance(source, PackedCase) else source
        raise DataError(
            f"{place}: a {layout.CARD} in it is missing or damaged ({error}); delete it and run `mim3d cache` again."
        ) from error


@contextmanager
def _explained(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Other libraries put words of their own where the system's belong.
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise DataError(
            f"{out}: the cache cannot be written ({reason}); make room or choose another folder, then run again: the "
            "cases that are finished are kept."
        ) from error


def _check_place(out: str, preprocessing: Preprocessing) -> None:
    """Refuse a place that is no cache folder, or the cache of other settings."""
    if os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"{out}: is a file; choose a folder for the cache.")
    for name in (layout.CASES, layout.PACKS, layout.UNFINISHED):
        if os.path.islink(place := os.path.join(out, name)):
            raise DataError(
                f"{place}: is a link, and what is there and not of this cache would be removed; link the folder of the "
                "cache as a whole, or choose another."
            )
    # One look, since another process may begin to build here meanwhile.
    held = os.listdir(out) if os.path.isdir(out) else []
    settings_path = os.path.join(out, layout.SETTINGS)
    if layout.SETTINGS in held:
        try:
            settings = layout.read_json(settings_path)
        except DataError:
            # The cases say by their names what they are of, so that the settings may be written anew.
            if layout.is_damaged_cache(out):
                return
            raise DataError(f"{settings_path}: not the settings of a mim3d cache; choose another folder.") from None
        if not isinstance(settings, dict) or settings.get("format") != layout.FORMAT:
            raise DataError(f"{settings_path}: not the settings of a mim3d cache; choose another folder.")
        if settings.get("version") != layout.VERSION:
            version = shorten(str(settings.get("version")), 30)
            raise DataError(
                f"{out}: holds a cache of version {version}, but this mim3d makes version {layout.VERSION}; delete it "
                "and run again to make it anew from the scans, or choose another folder."
            )
        found, wanted = settings.get("preprocessing"), _described(preprocessing)
        if found != wanted:
            raise ConfigError(
                f"{out}: holds a cache of other settings ({found}) than asked for ({wanted}); choose another folder, "
                "or delete this one."
            )
    else:
        # A build that was killed right at its start leaves these.
        own = {layout.CASES, layout.LOCK, *fnmatch.filter(held, ".*.partial")}
        if set(held) - own:
            raise DataError(f"{out}: holds other things than a mim3d cache; choose a new or empty folder.")


def _described(preprocessing: Preprocessing) -> dict[str, Any]:
    spacing = preprocessing.spacing_mm
    return {
        **asdict(preprocessing),
        "spacing_mm": None if spacing is None else [float(mm) for mm in spacing],
        "window": [float(value) for value in preprocessing.window],
    }


def _claim(out: str, cases: CaseSet, preprocessing: Preprocessing, pack_gb: float | None) -> float | None:
    """Write the settings, and remove the manifest: the cache is unfinished until all cases are checked again.

    Returns:
        Size of the packs that this cache will have; None for folders.
    """
    settings_path, manifest = os.path.join(out, layout.SETTINGS), os.path.join(out, layout.MANIFEST)
    if pack_gb is None and os.path.exists(settings_path) and not layout.is_damaged_cache(out):
        pack_gb = layout.read_json(settings_path).get("pack_gb")
        if pack_gb is not None and not (isinstance(pack_gb, (int, float)) and 0 < pack_gb <= 1e6):
            shown = shorten(repr(pack_gb), 60, placeholder=" ...")
            raise DataError(f"{settings_path}: pack_gb is {shown}, but it must be a number of GB; give --pack_gb.")
    if os.path.exists(manifest):
        _require_same_scans(out, cases)
        os.remove(manifest)
    remove_partial(out)
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)
    identity = {"format": layout.FORMAT, "version": layout.VERSION}
    layout.write_json(settings_path, identity | {"preprocessing": _described(preprocessing), "pack_gb": pack_gb})
    return pack_gb


def _require_same_scans(out: str, cases: CaseSet) -> None:
    """Refuse a cache of which nothing would be left: ids alone do not make it one of the same scans.

    Raises:
        DataError: No scan is the same, by its place or, for a few of them, by its content.
    """
    try:
        columns = read_columns(out, ["id", "images", "source_digest"]).to_pydict()
    except DataError:
        # A damaged manifest is written anew; folders of cases begin with their ids.
        folders = [*os.listdir(os.path.join(out, layout.CASES)), *find_packed(os.path.join(out, layout.PACKS))]
        names = [name.rpartition(".")[0] for name in folders]
        columns = {"id": names, "images": [[""]] * len(names), "source_digest": [""] * len(names)}
    held = dict(zip(columns["id"], zip(columns["images"], columns["source_digest"], strict=True), strict=True))
    shared = [(case, *held[case.id]) for case in cases.cases if case.id in held]
    if held and not shared:
        raise DataError(
            f"{out}: holds a cache of other scans ({len(held)}, none of them in {cases.root}); choose another "
            "folder, or delete this one."
        )
    # Another channel of a file is still that file.
    places = [
        [os.path.realpath(split_channel(path)[0]) for path in (case.images[0], old[0])] for case, old, _ in shared
    ]
    if not shared or any(here == before for here, before in places):
        return
    for case, old, digest in shared[:_NUM_COMPARED]:
        try:
            # What has gone from its old place may have moved here, and changed since.
            if not is_there(old[0]) or content_digest(case.images) == digest:
                return
        except (DataError, OSError):
            continue
    case, old, _ = shared[0]
    raise DataError(
        f"{out}: holds a cache of other scans of the same names ({case.id} is {old[0]} there, {case.images[0]} here); "
        "choose another folder, or delete this one."
    )


def _memo(out: str) -> DigestMemo:
    """What earlier runs knew of source files; without it every one is read once more."""
    try:
        rows = layout.read_json(os.path.join(out, layout.DIGESTS)).items()
        return {path: ((s[0], s[1], s[2], s[3]), digest) for path, (s, digest) in rows}
    except (DataError, ValueError, AttributeError, TypeError, LookupError):
        return {}


def _settle(
    cases: CaseSet,
    settings: BuildSettings,
    results: dict[str, CaseResult],
    packed: Mapping[str, ByteSource],
    build_all: Callable[[Sequence[Case], BuildSettings], dict[str, CaseResult]],
) -> dict[str, tuple[ChannelModality, ...]]:
    """What each scan is, once the whole set is known; those that were made as something else are made again.

    Returns:
        Case id -> what each channel is, of the cases that could be used.
    """

    def made_as(folder: str) -> tuple[ChannelModality, ...]:
        return modalities_of(_read_card(packed.get(folder) or os.path.join(settings.out, layout.CASES, folder)))

    made = {name: made_as(result.folder) for name, result in results.items() if result.folder is not None}
    found = settled(cases.cases, made)
    again = [case for case in cases.cases if case.id in made and in_hu(made[case.id]) != in_hu(found[case.id])]
    if again:
        known = {path: entry for result in results.values() for path, entry in result.digests.items()}
        results |= build_all(again, replace(settings, known=known, set_in_hu=set_in_hu(found)))
    return found


def _build_all(
    cases: Sequence[Case], settings: BuildSettings, *, num_workers: int, scheduler: str | None, timeout_s: float
) -> dict[str, CaseResult]:
    """Build every case; the results by the ids of the cases."""
    memo, memo_path = dict(settings.known), os.path.join(settings.out, layout.DIGESTS)
    if scheduler is None:
        building = build_in_processes(cases, settings, num_workers, timeout_s)
    else:
        building = build_on_cluster(scheduler, cases, settings)
    results: dict[str, CaseResult] = {}
    paths = {case.id: split_channel(case.images[0])[0] for case in cases}
    written = time.monotonic()
    # Closed before anything else happens after a failure: no process may write once the lock has fallen.
    with closing(building):
        for result in counted(building, len(cases), "caching"):
            results[result.id] = result
            memo.update(result.digests)
            warn_of_assumptions(paths[result.id], result.assumed)
            if result.write_error is not None:
                raise OSError(result.write_error)
            if time.monotonic() - written > _MEMO_EVERY_S:
                layout.write_json(memo_path, memo)
                written = time.monotonic()
    # Where the set has been settled, only some of its cases are made again.
    current = {} if settings.set_in_hu is None else dict(settings.known)
    current |= {path: entry for result in results.values() for path, entry in result.digests.items()}
    layout.write_json(memo_path, current)
    return results


def _pack(
    out: str, sources: Mapping[str, ByteSource], cards: Mapping[str, Card], pack_gb: float
) -> dict[str, ByteSource]:
    """Bring cases into packs, in the order of their digests; each pack is whole before its cases' folders go."""
    packs_dir = os.path.join(out, layout.PACKS)
    os.makedirs(packs_dir, exist_ok=True)
    packed: dict[str, ByteSource] = {}
    in_order = sorted(sources, key=lambda folder: (cards[folder]["digest"], folder))
    plan = pack_plan({folder: size_of(sources[folder]) for folder in in_order}, int(pack_gb * 1e9))
    for name, folders in counted(plan.items(), len(plan), "packing"):
        path = os.path.join(packs_dir, name)
        if not os.path.exists(path):
            with atomic_file(path, durable=True, remedy=None) as part:
                write_pack(part, {folder: sources[folder] for folder in folders})
        packed |= cases_in(path)
        for folder in folders:
            layout.remove_case(os.path.join(out, layout.CASES, folder))
    return packed


def _finish(
    out: str,
    cases: CaseSet,
    folders: Mapping[str, str],
    sources: Mapping[str, ByteSource],
    cards: Mapping[str, Card],
    remarks: Sequence[SetRemark],
) -> None:
    """Write the manifest, then remove what it does not name."""
    rows = []
    for case in cases.cases:
        if case.id in folders:
            folder = folders[case.id]
            card = cards[folder] | {"size_bytes": size_of(sources[folder])}
            rows.append(row_of(case, card, folder, sources[folder]))
    write_manifest(out, rows, cases, remarks)
    packs = {os.path.basename(source.path) for source in sources.values() if isinstance(source, PackedCase)}
    unpacked = {folder for folder, source in sources.items() if isinstance(source, str)}
    for part, kept in ((layout.PACKS, packs), (layout.CASES, unpacked)):
        for path in list(Path(out, part).glob("*")):
            if path.name in kept:
                continue
            if path.is_dir():
                layout.remove_case(str(path))
            else:
                path.unlink()
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)
