"""The processes that build a cache: they take cases one by one, and end with the process that started them.

A process may be killed, mostly by a system that runs out of memory. Nobody says which case it was reading, so every
case that was in work then is read once more with nothing beside it: one that ends its process twice alone is left out
like a bad scan, the others go on.
"""

import multiprocessing
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from mim3d.caching.case import BuildSettings, CaseResult, DigestMemo, build_case
from mim3d.core.errors import DataError
from mim3d.core.worker_processes import prepare_worker, without_main_module
from mim3d.datasets.cases import Case

#: Cases that may end their process before the first is done: beyond that the scans are not to blame.
MAX_LOST_AT_FIRST = 8

#: What a worker needs for every case: sent to it once.
_shared: tuple[BuildSettings, DigestMemo] | None = None


def build_in_processes(
    cases: Sequence[Case], settings: BuildSettings, memo: DigestMemo, num_workers: int
) -> Generator[CaseResult, None, None]:
    """Bring cases into a cache; the result of each, in the order in which they are done.

    Args:
        cases: Cases, each of them once.
        settings: What they share.
        memo: Digests known from earlier runs.
        num_workers: Number of processes; 0 or 1 works in this one.

    Raises:
        DataError: Processes cannot be started, or are killed at every case.
    """
    if num_workers <= 1 or len(cases) == 1:
        yield from (build_case(case, settings, memo) for case in cases)
        return
    waiting, num_lost, num_done = deque(cases), 0, 0
    while waiting:
        suspects: list[Case] = []
        for result in _build_until_killed(min(num_workers, len(waiting)), waiting, settings, memo, suspects.append):
            num_done += 1
            yield result
        guilty = 0
        for case in suspects:
            alone = _build_alone(case, settings, memo)
            guilty += alone is None
            yield alone or CaseResult(
                id=case.id,
                reason=f"{case.images[0]}: the process reading it ended without a word twice, most likely out of "
                "memory; crop the scan, or run again where there is more memory.",
            )
        num_lost, num_done = num_lost + guilty, num_done + len(suspects) - guilty
        if num_done == 0 and num_lost >= MAX_LOST_AT_FIRST:
            raise DataError(
                f"{settings.out}: the process reading a scan ended without a word {num_lost} times out of {num_lost}, "
                "most likely out of memory; run again where there is more of it."
            )
        if suspects and not guilty and num_workers > 1:
            # Each of them fits into memory alone, so they did not fit all at once.
            num_workers = (num_workers + 1) // 2
            warnings.warn(
                f"{settings.out}: a process was killed, most likely out of memory; going on with {num_workers}.",
                stacklevel=2,
            )


def _build_alone(case: Case, settings: BuildSettings, memo: DigestMemo) -> CaseResult | None:
    """Build a case with nothing beside it; None if that ends the process twice."""
    for _ in range(2):
        for result in _build_until_killed(1, deque([case]), settings, memo, lambda suspect: None):
            return result
    return None


def _build_until_killed(
    num_workers: int,
    waiting: deque[Case],
    settings: BuildSettings,
    memo: DigestMemo,
    suspect: Callable[[Case], None],
) -> Generator[CaseResult, None, None]:
    """Build cases until none is left or a process is killed.

    Args:
        num_workers: Number of processes; as many cases are in work at a time.
        waiting: Cases, which are taken from its left.
        settings: What they share.
        memo: Digests known from earlier runs.
        suspect: Called with every case that was in work when a process was killed.

    Raises:
        DataError: A process cannot be started.
    """
    # Spawned, not forked: the caller may run threads (torch, progress bars), which a fork would freeze.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_start_worker, initargs=(settings, memo))
    in_work: dict[Future[CaseResult], Case] = {}
    broken = False
    try:
        while in_work or (waiting and not broken):
            try:
                # No more than are read at once, so that few are under suspicion.
                while waiting and len(in_work) < num_workers and not broken:
                    with without_main_module():
                        future = pool.submit(_work, waiting[0])
                    in_work[future] = waiting.popleft()
            except BrokenProcessPool:
                broken = True
            except OSError as error:
                raise DataError(
                    f"{settings.out}: no process can be started ({error.strerror or error}); run again with fewer "
                    "num_workers: the cases that are finished are kept."
                ) from error
            for future in wait(in_work, return_when=FIRST_COMPLETED).done:
                case = in_work.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    broken = True
                    suspect(case)
                else:
                    yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(settings: BuildSettings, memo: DigestMemo) -> None:
    global _shared
    _shared = settings, memo
    prepare_worker()


def _work(case: Case) -> CaseResult:
    assert _shared is not None
    return build_case(case, *_shared)
