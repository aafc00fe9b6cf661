"""Building a cache: many cases in many processes, resumable at any moment."""

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mim3d.data import cache_files as layout
from mim3d.data.cache_case import Outcome, Recipe, build_case
from mim3d.data.case_records import Case, CaseSet
from mim3d.data.digests import Memo
from mim3d.data.preprocessing import Preprocessing
from mim3d.errors import ConfigError, DataError
from mim3d.progress import counted

#: The memo of digests is written this often, so that a killed build need not hash again what it hashed.
_MEMO_EVERY_S = 10.0

_worker_memo: Memo = {}


def build(cases: CaseSet, out: str, preprocessing: Preprocessing, num_workers: int) -> None:
    """Fill a cache folder; see ``mim3d.data.cache.build_cache``."""
    with _writing(out):
        os.makedirs(os.path.join(out, layout.CASES), exist_ok=True)
    with _writing(out), layout.locked(out):
        _claim(out, cases, preprocessing)
        recipe = Recipe(out=out, preprocessing=preprocessing, labels=cases.labels)
        outcomes = _build_all(cases.cases, recipe, num_workers)
        _finish(out, cases, outcomes)


@contextmanager
def _writing(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(out, error.strerror or str(error)) from error


def _write_error(out: str, reason: str) -> DataError:
    return DataError(
        f"{out}: the cache cannot be written ({reason}); make room or choose another folder, then run again: the cases "
        "that are finished are kept."
    )


def check_place(out: str, preprocessing: Preprocessing) -> None:
    """Refuse a place that is no cache folder, or the cache of other settings.

    Raises:
        DataError: A file, a folder of other things, or not writable.
        ConfigError: A cache of other settings.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise DataError(f"{out}: is a file; choose a folder for the cache.")
    settings_path = os.path.join(out, layout.SETTINGS)
    if os.path.exists(settings_path):
        settings = layout.read_json(settings_path)
        if not isinstance(settings, dict) or settings.get("format") != layout.FORMAT:
            raise DataError(f"{settings_path}: not the settings of a mim3d cache; choose another folder.")
        found, wanted = settings.get("preprocessing"), _settings(preprocessing)["preprocessing"]
        if settings.get("version") != layout.VERSION or found != wanted:
            raise ConfigError(
                f"{out}: holds a cache of other settings ({found}, version {settings.get('version')}) than asked for "
                f"({wanted}, version {layout.VERSION}); choose another folder, or delete this one."
            )
    elif os.path.isdir(out) and set(os.listdir(out)) - {layout.CASES, layout.LOCK, f"{layout.SETTINGS}.part"}:
        raise DataError(f"{out}: holds other things than a mim3d cache; choose a new or empty folder.")


def _settings(preprocessing: Preprocessing) -> dict[str, Any]:
    spacing = preprocessing.spacing_mm
    described = {
        **asdict(preprocessing),
        "spacing_mm": None if spacing is None else [float(mm) for mm in spacing],
        "window": [float(value) for value in preprocessing.window],
    }
    return {"format": layout.FORMAT, "version": layout.VERSION, "preprocessing": described}


def _claim(out: str, cases: CaseSet, preprocessing: Preprocessing) -> None:
    """Write down the settings, and take away the index: until all cases are checked again nothing is vouched for."""
    index = os.path.join(out, layout.INDEX)
    if os.path.exists(index):
        held = {row["case"]["id"] for row in layout.read_json(index)["scans"]}
        if held and held.isdisjoint(case.id for case in cases.cases):
            raise DataError(
                f"{out}: holds a cache of other scans ({len(held)}, none of them in {cases.root}); choose another "
                "folder, or delete this one."
            )
        os.remove(index)
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)
    layout.write_json(os.path.join(out, layout.SETTINGS), _settings(preprocessing))


def read_memo(out: str) -> Memo:
    """The digests known from earlier runs; none where they cannot be read."""
    try:
        rows = layout.read_json(os.path.join(out, layout.DIGESTS))
        return {path: ((s[0], s[1], s[2], s[3]), digest) for path, (s, digest) in rows.items()}
    except (DataError, ValueError, AttributeError, TypeError, IndexError):
        return {}


def _build_all(cases: tuple[Case, ...], recipe: Recipe, num_workers: int) -> dict[str, Outcome]:
    memo = read_memo(recipe.out)
    outcomes: dict[str, Outcome] = {}
    memo_path = os.path.join(recipe.out, layout.DIGESTS)
    written = time.monotonic()
    try:
        for outcome in counted(_outcomes(cases, recipe, memo, num_workers), len(cases), "caching"):
            outcomes[outcome.id] = outcome
            memo.update(outcome.digests)
            if outcome.write_error is not None:
                raise _write_error(recipe.out, outcome.write_error)
            if time.monotonic() - written > _MEMO_EVERY_S:
                layout.write_json(memo_path, memo)
                written = time.monotonic()
    except BrokenProcessPool as error:
        raise DataError(
            f"{recipe.out}: a worker process ended without a word, most likely out of memory; run again with fewer "
            "num_workers: the cases that are finished are kept."
        ) from error
    current = {path: entry for outcome in outcomes.values() for path, entry in outcome.digests.items()}
    layout.write_json(memo_path, current)
    return outcomes


def _outcomes(cases: tuple[Case, ...], recipe: Recipe, memo: Memo, num_workers: int) -> Iterator[Outcome]:
    if num_workers <= 1 or len(cases) == 1:
        yield from (build_case(case, recipe, memo) for case in cases)
        return
    # Spawned, not forked: the caller may run threads (torch, progress bars), which a fork would freeze.
    pool = ProcessPoolExecutor(
        min(num_workers, len(cases)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(recipe.out,),
    )
    try:
        with _without_main_module():
            waiting = [pool.submit(_work, case, recipe) for case in cases]
        for done in as_completed(waiting):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Start processes that do not run the caller's script again.

    A spawned process imports the main module, so that a script without ``if __name__ == "__main__"`` would call itself
    in every worker; these workers need nothing of it.
    """
    main = sys.modules["__main__"]
    spec, file = main.__spec__, getattr(main, "__file__", None)
    main.__spec__ = None
    if file is not None:
        del main.__file__
    try:
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file


def _start_worker(out: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker_memo.update(read_memo(out))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers outlive a killed parent; these do not."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(case: Case, recipe: Recipe) -> Outcome:
    return build_case(case, recipe, _worker_memo)


def _finish(out: str, cases: CaseSet, outcomes: dict[str, Outcome]) -> None:
    """Write the tables of good and bad scans, then take away what no table names."""
    scans, failed = [], []
    for case in cases.cases:
        outcome = outcomes[case.id]
        if outcome.folder is None:
            failed.append({"id": case.id, "images": case.images, "label": case.label, "reason": outcome.reason})
        else:
            card = layout.read_json(os.path.join(out, layout.CASES, outcome.folder, layout.CARD))
            scans.append({"case": asdict(case), "folder": outcome.folder, "card": card})
    layout.write_json(os.path.join(out, layout.FAILED), {"failed": failed})
    if not scans:
        raise DataError(f"{cases.root}: none of {len(failed)} scans can be used; the first: {failed[0]['reason']}")
    labels = {str(value): name for value, name in cases.labels.items()}
    layout.write_json(os.path.join(out, layout.INDEX), {"labels": labels, "root": cases.root, "scans": scans})
    kept = {row["folder"] for row in scans}
    for name in os.listdir(os.path.join(out, layout.CASES)):
        if name not in kept:
            shutil.rmtree(os.path.join(out, layout.CASES, name), ignore_errors=True)
    shutil.rmtree(os.path.join(out, layout.UNFINISHED), ignore_errors=True)
