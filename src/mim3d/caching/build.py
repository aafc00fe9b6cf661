"""Building a cache: resumable at any moment, and in the end the same bytes however it came about."""

import json
import os
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from mim3d.caching import layout
from mim3d.caching.case import Outcome, Recipe
from mim3d.caching.dask_workers import build_cases_on, require_scheduler
from mim3d.caching.digests import Memo
from mim3d.caching.layout import ByteSource, open_bytes
from mim3d.caching.manifest import held_ids, row_of, write_manifest
from mim3d.caching.packs import PackedCase, cases_in, find_packed, pack_plan, size_of, write_pack
from mim3d.caching.preprocessing import Preprocessing
from mim3d.caching.workers import build_cases
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.files import atomic_file, remove_partial, write_csv
from mim3d.core.progress import counted
from mim3d.datasets.cases import CaseSet

#: The memo of digests is written this often, so that a killed build need not hash again what it hashed.
_MEMO_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Build:
    """How a cache is built, as far as its voxels do not depend on it.

    Attributes:
        num_workers: Processes; 0 or 1 works in this one.
        pack_gb: Size of a pack; None keeps what the cache is, a new one in folders.
        scheduler: Of a Dask cluster whose workers take the place of processes here.
    """

    num_workers: int = 0
    pack_gb: float | None = None
    scheduler: str | None = None

    def __post_init__(self) -> None:
        if self.pack_gb is not None and not self.pack_gb > 0:
            raise ConfigError(f"pack_gb {self.pack_gb} must be above 0, such as 3.")


def build(cases: CaseSet, out: str, preprocessing: Preprocessing, how: Build) -> None:
    """Fill a cache folder; see ``mim3d.caching.cache.build_cache``."""
    if how.scheduler is not None:
        require_scheduler(how.scheduler)
    with _writing(out):
        os.makedirs(os.path.join(out, layout.CASES), exist_ok=True)
    with _writing(out), layout.locked(out):
        pack_gb = _claim(out, cases, preprocessing, how.pack_gb)
        packed = find_packed(os.path.join(out, layout.PACKS))
        recipe = Recipe(out=out, preprocessing=preprocessing, labels=cases.labels, packed=frozenset(packed))
        outcomes = _build_all(cases, recipe, how)
        _write_failed(out, cases, outcomes)
        cards = {
            folder: _Stored(source)
            for outcome in outcomes.values()
            if (folder := outcome.folder) is not None
            for source in [packed.get(folder) or os.path.join(out, layout.CASES, folder)]
        }
        if pack_gb is not None:
            cards = _packed(out, cards, pack_gb)
        _finish(out, cases, outcomes, cards)


class _Stored:
    """A finished case: its card, and where it lies."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        try:
            card = open_bytes(source, layout.CARD)
            self.card: dict[str, Any] = json.loads(card.pread(0, card.size))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{source}: its {layout.CARD} is missing or damaged ({error}); delete it and run `mim3d cache` again."
            ) from error


@contextmanager
def _writing(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        # Other libraries put words of their own where the system's belong.
        raise _write_error(out, os.strerror(error.errno) if error.errno else str(error)) from error


def _write_error(out: str, reason: str) -> DataError:
    return DataError(
        f"{out}: the cache cannot be written ({reason}); make room or choose another folder, then run again: the cases "
        "that are finished are kept."
    )


def check_place(out: str, preprocessing: Preprocessing) -> None:
    """Refuse a place that is no cache folder, or the cache of other settings.

    Raises:
        DataError: A file, a folder of other things, or a cache of another version.
        ConfigError: A cache of other settings.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"{out}: is a file; choose a folder for the cache.")
    settings_path = os.path.join(out, layout.SETTINGS)
    if os.path.exists(settings_path):
        settings = layout.read_json(settings_path)
        if not isinstance(settings, dict) or settings.get("format") != layout.FORMAT:
            raise DataError(f"{settings_path}: not the settings of a mim3d cache; choose another folder.")
        if settings.get("version") != layout.VERSION:
            raise DataError(
                f"{out}: holds a cache of version {settings.get('version')}, but this mim3d makes version "
                f"{layout.VERSION}; delete it and run again to make it anew from the scans, or choose another folder."
            )
        found, wanted = settings.get("preprocessing"), _described(preprocessing)
        if found != wanted:
            raise ConfigError(
                f"{out}: holds a cache of other settings ({found}) than asked for ({wanted}); choose another folder, "
                "or delete this one."
            )
    # A build that was killed before it wrote its settings left at most these, and a scratch folder.
    elif os.path.isdir(out) and any(
        name not in (layout.CASES, layout.LOCK) and not name.endswith(".partial") for name in os.listdir(out)
    ):
        raise DataError(f"{out}: holds other things than a mim3d cache; choose a new or empty folder.")


def _described(preprocessing: Preprocessing) -> dict[str, Any]:
    spacing = preprocessing.spacing_mm
    return {
        **asdict(preprocessing),
        "spacing_mm": None if spacing is None else [float(mm) for mm in spacing],
        "window": [float(value) for value in preprocessing.window],
    }


def _claim(out: str, cases: CaseSet, preprocessing: Preprocessing, pack_gb: float | None) -> float | None:
    """Write down the settings, and take away the manifest: until all cases are checked again nothing is vouched for.

    Returns:
        Size of the packs that this cache shall have; None for folders.
    """
    settings_path, manifest = os.path.join(out, layout.SETTINGS), os.path.join(out, layout.MANIFEST)
    if pack_gb is None and os.path.exists(settings_path):
        pack_gb = layout.read_json(settings_path).get("pack_gb")
    if os.path.exists(manifest):
        held = held_ids(manifest)
        if held and held.isdisjoint(case.id for case in cases.cases):
            raise DataError(
                f"{out}: holds a cache of other scans ({len(held)}, none of them in {cases.root}); choose another "
                "folder, or delete this one."
            )
        os.remove(manifest)
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)
    remove_partial(out)
    identity = {"format": layout.FORMAT, "version": layout.VERSION}
    layout.write_json(settings_path, identity | {"preprocessing": _described(preprocessing), "pack_gb": pack_gb})
    return pack_gb


def read_memo(out: str) -> Memo:
    """The digests known from earlier runs; none where they cannot be read."""
    try:
        rows = layout.read_json(os.path.join(out, layout.DIGESTS))
        return {path: ((s[0], s[1], s[2], s[3]), digest) for path, (s, digest) in rows.items()}
    except (DataError, ValueError, AttributeError, TypeError, IndexError):
        return {}


def _build_all(cases: CaseSet, recipe: Recipe, how: Build) -> dict[str, Outcome]:
    memo = read_memo(recipe.out)
    outcomes: dict[str, Outcome] = {}
    memo_path = os.path.join(recipe.out, layout.DIGESTS)
    written = time.monotonic()
    # Closed before anything else happens after a failure: no process may write once the lock has fallen.
    with closing(_worked(cases, recipe, dict(memo), how)) as done:
        for outcome in counted(done, len(cases.cases), "caching"):
            outcomes[outcome.id] = outcome
            memo.update(outcome.digests)
            if outcome.write_error is not None:
                raise _write_error(recipe.out, outcome.write_error)
            if time.monotonic() - written > _MEMO_EVERY_S:
                layout.write_json(memo_path, memo)
                written = time.monotonic()
    current = {path: entry for outcome in outcomes.values() for path, entry in outcome.digests.items()}
    layout.write_json(memo_path, current)
    return outcomes


def _worked(cases: CaseSet, recipe: Recipe, memo: Memo, how: Build) -> Generator[Outcome, None, None]:
    if how.scheduler is None:
        yield from build_cases(cases.cases, recipe, memo, how.num_workers)
    else:
        yield from build_cases_on(how.scheduler, cases.cases, recipe, memo)


def _write_failed(out: str, cases: CaseSet, outcomes: Mapping[str, Outcome]) -> None:
    """Write the table of scans that could not be used.

    Raises:
        DataError: None of them can.
    """
    failed = [(case, outcomes[case.id].reason) for case in cases.cases if outcomes[case.id].folder is None]
    rows = ([case.id, ";".join(case.images), case.label or "", reason] for case, reason in failed)
    write_csv(os.path.join(out, layout.FAILED), layout.FAILED_COLUMNS, rows, remedy=None)
    if len(failed) == len(cases.cases):
        raise DataError(f"{cases.root}: none of {len(failed)} scans can be used; the first: {failed[0][1]}")


def _packed(out: str, stored: Mapping[str, _Stored], pack_gb: float) -> dict[str, _Stored]:
    """Bring cases into packs, in the order of their digests; each pack is whole before its cases' folders go."""
    packs_dir = os.path.join(out, layout.PACKS)
    os.makedirs(packs_dir, exist_ok=True)
    packed: dict[str, _Stored] = {}
    in_order = sorted(stored, key=lambda folder: (stored[folder].card["digest"], folder))
    plan = pack_plan({folder: size_of(stored[folder].source) for folder in in_order}, int(pack_gb * 1e9))
    for name, folders in counted(plan.items(), len(plan), "packing"):
        path = os.path.join(packs_dir, name)
        if not os.path.exists(path):
            with atomic_file(path, durable=True, remedy=None) as part:
                write_pack(str(part), {folder: stored[folder].source for folder in folders})
        packed |= {folder: _Stored(source) for folder, source in cases_in(path).items()}
        for folder in folders:
            layout.remove_case(os.path.join(out, layout.CASES, folder))
    return packed


def _finish(out: str, cases: CaseSet, outcomes: Mapping[str, Outcome], stored: Mapping[str, _Stored]) -> None:
    """Write the manifest, then take away what it does not name."""
    rows = []
    for case in cases.cases:
        folder = outcomes[case.id].folder
        if folder is not None:
            item = stored[folder]
            rows.append(row_of(case, item.card | {"size_bytes": size_of(item.source)}, folder, item.source))
    write_manifest(os.path.join(out, layout.MANIFEST), rows, cases.labels, cases.root)
    packs = {os.path.basename(item.source.path) for item in stored.values() if isinstance(item.source, PackedCase)}
    _keep_only(os.path.join(out, layout.PACKS), packs)
    loose = {folder for folder, item in stored.items() if isinstance(item.source, str)}
    _keep_only(os.path.join(out, layout.CASES), loose)
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)


def _keep_only(folder: str, names: set[str]) -> None:
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if name in names:
            continue
        if os.path.isdir(path):
            layout.remove_case(path)
        else:
            os.remove(path)
