"""A build on the workers of a Dask cluster that is running already: the same cases, the same bytes.

What all cases share (settings, known digests, cases in packs) is a task of its own, on which the others depend: it is
sent once, workers pass it on to each other, and it is made again if every worker that holds it ends. Scattered data
would be lost then.

Dask gives the cases of a worker that ends to others, a few times over. It then gives up all that were waiting on such
workers, guilty or not, so these are read again at the end, one at a time.
"""

import asyncio
import importlib
import logging
import os
import socket
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mim3d import __version__
from mim3d.caching import layout
from mim3d.caching.case import BuildSettings, CaseResult, DigestMemo, build_case
from mim3d.core.errors import ConfigError, DataError
from mim3d.datasets.cases import Case

#: Seconds within which a scheduler answers.
_ANSWER_S = 5


@dataclass(frozen=True, kw_only=True)
class _Shared:
    """What all cases share.

    Attributes:
        settings: How they are made.
        memo: Digests known from earlier runs.
        sources: Folder that holds all of the sources.
        version: Version of mim3d here.
    """

    settings: BuildSettings
    memo: DigestMemo
    sources: str
    version: str = __version__


def build_on_cluster(
    scheduler: str, cases: Sequence[Case], settings: BuildSettings, memo: DigestMemo
) -> Generator[CaseResult, None, None]:
    """Bring cases into a cache on a Dask cluster; the result of each, in the order in which they are done.

    Args:
        scheduler: Address of the cluster's scheduler, ``tcp://host:8786``.
        cases: Cases, each of them once.
        settings: What they share.
        memo: Digests known from earlier runs.

    Raises:
        ConfigError: Dask is not installed.
        DataError: The scheduler does not answer, the cluster ended, or its workers do not see the same files.
    """
    shared = _Shared(settings=settings, memo=memo, sources=_folder_of(cases))
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
                    reason=f"{case.images[0]}: the workers reading it ended without a word again and again, most "
                    "likely out of memory; crop the scan, or run again with workers that have more memory.",
                )


def _folder_of(cases: Sequence[Case]) -> str:
    """The folder that holds all scans; the one above it where there is none."""
    folder = os.path.commonpath([os.path.dirname(path.split("::")[0]) for case in cases for path in case.images])
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


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
    futures = client.map(_work, cases, shared=sent, pure=False)
    case_of = {future.key: case for future, case in zip(futures, cases, strict=True)}
    done = _distributed().as_completed(futures, loop=client.loop, with_results=True, raise_errors=False)
    # So that each result is freed once it has been handed on.
    del futures
    for future, answer in done:
        yield case_of[future.key], answer


def _checked_result(answer: Any, case: Case, settings: BuildSettings, scheduler: str) -> CaseResult | None:
    """The result of a case; None where Dask gave it up because the workers it was on have ended.

    Raises:
        DataError: The cluster ended, or a worker cannot take part.
    """
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


def _work(case: Case, shared: _Shared) -> CaseResult:
    """Runs on a worker, in a thread that is not its main one."""
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
    return build_case(case, shared.settings, shared.memo)
