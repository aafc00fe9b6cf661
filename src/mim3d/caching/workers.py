"""Who makes the cases of a cache: this process, processes of its own, or the workers of a Dask cluster.

Whoever does it, the bytes are the same. A case that ends its process again and again, or takes too long in it, is left
out like a bad scan; the others go on (``core/worker_processes.py``).

On a cluster, what all cases share (settings, known digests, cases in packs) is a task of its own, on which the others
depend: it is sent once, workers pass it on to each other, and it is made again if every worker that holds it ends.
Scattered data would be lost then. Dask gives the cases of a worker that ends to others, a few times over. It then gives
up all that were waiting on such workers, guilty or not: these are under suspicion, and are read once more with nothing
beside them.
"""

import asyncio
import importlib
import logging
import multiprocessing
import os
import socket
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from mim3d import __version__
from mim3d.caching import layout
from mim3d.caching.case import BuildSettings, CaseResult, build_case
from mim3d.core.errors import ConfigError, DataError
from mim3d.core.left_out import Failure
from mim3d.core.own_code import leave_out_working_folder
from mim3d.core.worker_processes import ITEM_TIMEOUT_S, Ended, work_through
from mim3d.datasets.cases import Case
from mim3d.scans.grids import file_of

#: Seconds within which a scheduler answers.
_ANSWER_S = 5


def build_in_processes(
    cases: Sequence[Case], settings: BuildSettings, num_workers: int, timeout_s: float = ITEM_TIMEOUT_S
) -> Generator[CaseResult, None, None]:
    """Bring cases into a cache; the result of each, in the order in which they are done.

    Args:
        cases: Cases, each of them once.
        settings: What they share.
        num_workers: Number of processes; 0 works in this one, where nothing can be ended.
        timeout_s: Seconds that a case may take in a process of its own.

    Raises:
        DataError: Processes cannot be started, or are killed at every case.
    """
    if num_workers < 1:
        yield from (build_case(case, settings) for case in cases)
        return
    work = partial(build_case, settings=settings)
    building = work_through(cases, work, min(num_workers, len(cases)), timeout_s=timeout_s, place=settings.out)
    with closing(building):
        for case, answer in building:
            if isinstance(answer, Ended):
                reason = f"{case.images[0]}: the process reading it {answer}."
                answer = CaseResult(id=case.id, failure=Failure(reason))
            yield answer


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all cases of a build on a cluster share; ``sources`` is the folder that holds all of their files."""

    settings: BuildSettings
    sources: str
    version: str = __version__


def build_on_cluster(
    scheduler: str, cases: Sequence[Case], settings: BuildSettings
) -> Generator[CaseResult, None, None]:
    """Bring cases into a cache on a Dask cluster; the result of each, in the order in which they are done.

    Args:
        scheduler: Address of the cluster's scheduler, ``tcp://host:8786``.
        cases: Cases, each of them once.
        settings: What they share.

    Raises:
        ConfigError: Dask is not installed.
        DataError: The scheduler does not answer, the cluster ended, or its workers do not see the same files.
    """
    # The folder that holds all scans; the one above it where there is none.
    sources = os.path.commonpath([os.path.dirname(file_of(path)) for case in cases for path in case.images])
    while not os.path.isdir(sources):
        sources = os.path.dirname(sources)
    shared = _Shared(settings=settings, sources=sources)
    with _connected(scheduler) as client:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s)Sending large graph")
            sent = client.submit(_sent, shared, pure=False)
        suspects: list[Case] = []
        for case, answer in _answers(client, cases, sent):
            result = _checked_result(answer, case, settings, scheduler)
            if result is None:
                suspects.append(case)
            else:
                yield result
        if len(suspects) == len(cases) > 1:
            raise DataError(
                f"{scheduler}: the workers ended at every one of {len(cases)} cases, most likely out of memory; give "
                "them more, then run again."
            )
        for suspect in suspects:
            for case, answer in _answers(client, [suspect], sent):
                yield _checked_result(answer, case, settings, scheduler) or CaseResult(
                    id=case.id,
                    failure=Failure(
                        f"{case.images[0]}: the workers reading it ended without a word again and again, most likely "
                        "out of memory; crop the scan, or run again with workers that have more memory."
                    ),
                )


def _distributed() -> Any:
    try:
        return importlib.import_module("distributed")
    except ImportError as error:
        raise ConfigError('scheduler: needs Dask; install it with `pip install "mim3d[dask]"`.') from error


def require_scheduler(scheduler: str) -> None:
    """Refuse an address without a scheduler, before anything is changed on the disk.

    Raises:
        ConfigError: Dask is not installed.
        DataError: No answer within some seconds.
    """
    distributed = _distributed()

    async def greet() -> None:
        security = distributed.Security().get_connection_args("client")
        (await distributed.comm.connect(scheduler, timeout=_ANSWER_S, **security)).abort()

    # Without a Dask client: that complains where no scheduler answers, and waits for ever where something else does.
    # In a thread of its own, as the caller's may run an event loop already.
    with _answered(scheduler), ThreadPoolExecutor(1) as thread:
        # This fails at once where no program listens, while Dask would try again.
        address = distributed.comm.get_address_host_port(scheduler)
        socket.create_connection(address, timeout=_ANSWER_S).close()
        thread.submit(lambda: asyncio.run(asyncio.wait_for(greet(), _ANSWER_S))).result()


@contextmanager
def _answered(scheduler: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{scheduler}: no Dask scheduler answers there; start one with `dask scheduler`, and workers with "
            "`dask worker ADDRESS`, or check the address (such as tcp://host:8786)."
        ) from error


@contextmanager
def _connected(scheduler: str) -> Iterator[Any]:
    with _answered(scheduler):
        client = _distributed().Client(scheduler, timeout=_ANSWER_S, set_as_default=False)
    log = logging.getLogger("distributed.client")
    level = log.level
    # The end of a cluster is reported in one sentence, without a traceback beside it.
    log.setLevel(logging.CRITICAL)
    try:
        yield client
    finally:
        # What no client wants any more is not begun.
        client.close()
        log.setLevel(level)


def _answers(client: Any, cases: Sequence[Case], sent: Any) -> Iterator[tuple[Case, Any]]:
    """Each case with Dask's answer: a result, or an error and where it comes from."""
    futures = client.map(_work_on_cluster, cases, shared=sent, pure=False)
    case_of = {future.key: case for future, case in zip(futures, cases, strict=True)}
    done = _distributed().as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
    # So that each result is freed once it has been handed on.
    del futures
    for future, answer in done:
        yield case_of[future.key], answer


def _checked_result(answer: Any, case: Case, settings: BuildSettings, scheduler: str) -> CaseResult | None:
    """The result of a case; None where Dask gave it up because the workers it was on have ended."""
    if not isinstance(answer, CaseResult):
        error = answer[1] if isinstance(answer, tuple) else answer
        if isinstance(error, _distributed().KilledWorker):
            return None
        if isinstance(error, DataError):
            raise error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{scheduler}: the Dask cluster cannot go on ({reason}); check that it runs and that its "
            "workers have this version of mim3d, then run again: the cases that are finished are kept."
        )
    if answer.folder is not None and answer.folder not in settings.packed:
        card = os.path.join(settings.out, layout.CASES, answer.folder, layout.CARD)
        # A worker may find a folder of the same path that is not this one.
        if not os.path.exists(card):
            raise DataError(
                f"{card}: a Dask worker says that {case.id} is there, and it is not; workers must share the file "
                "system that holds the cache."
            )
    return answer


def _sent(shared: _Shared) -> _Shared:
    return shared


def _work_on_cluster(case: Case, shared: _Shared) -> CaseResult:
    """Runs on a worker, in a thread that is not its main one."""
    if multiprocessing.parent_process() is not None:
        # The worker may stand among the scans.
        leave_out_working_folder()
    host = socket.gethostname()
    for place in (os.path.join(shared.settings.out, layout.CASES), shared.sources):
        if not os.path.isdir(place):
            raise DataError(
                f"{place}: not seen by the Dask worker on {host}; workers must share the file systems that hold the "
                "data and the cache."
            )
    if shared.version != __version__:
        raise DataError(
            f"mim3d {__version__} on the Dask worker {host}, but {shared.version} here; install one version everywhere."
        )
    return build_case(case, shared.settings)
