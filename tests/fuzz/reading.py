"""Reads one source as the commands do, in a process that may be ended at any time, and says what came of it."""

import hashlib
import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mim3d.caching.cache import open_cache
from mim3d.core.errors import Mim3dError
from mim3d.core.run_folder import read_run
from mim3d.datasets.cases import read_cases
from mim3d.datasets.usable import usable_cases
from mim3d.scans.volumes import channels_of, find_scans, read_grid, read_volume
from mim3d.tasks.trained import load_trained
from mim3d.weights import read_weights
from mim3d.weights.families import recognised
from mim3d.workflows.finetune.planning import read_plan
from mim3d.workflows.shared.leakage import read_seen

#: Address space that the process may take beyond what it has after its imports.
MORE_BYTES = 3 * 2**30


@dataclass(frozen=True)
class Outcome:
    """What came of one source.

    Attributes:
        result: "read"; "refused", by an error of mim3d's own; or "foreign", by any other.
        text: Digest of what was read, the sentence, or the trace.
        time_s: Seconds that it took.
        memory_bytes: Most memory taken beyond what was held before, in this process and those that it started.
    """

    result: str
    text: str
    time_s: float = 0.0
    memory_bytes: int = 0


def _scan(path: str) -> Iterator[Any]:
    grid = read_grid(path)
    volume = read_volume(path)
    assert volume.array.shape == grid.ras_shape == volume.grid.ras_shape, "grid and voxels differ"
    assert np.isfinite(volume.array).all(), "voxels that are not finite"
    assert np.isfinite(grid.affine).all() and abs(np.linalg.det(grid.affine)) > 0, "no affine of a grid"
    assert all(np.isfinite(mm) and mm > 0 for mm in grid.spacing_mm), "no spacing"
    yield from (volume.array, volume.affine)


def _channels(path: str) -> Iterator[Any]:
    for address in channels_of(path)[:100]:
        yield from _scan(address)


def _folder(path: str) -> Iterator[Any]:
    found = find_scans(path)
    for address in found:
        yield from _scan(address)
    yield len(found)


def _cases(path: str) -> Iterator[Any]:
    cases = usable_cases(read_cases(path))
    for case in cases.cases:
        yield repr((case.id, case.patient, case.split, case.class_name, case.labelled))
        yield from (read_volume(image).array for image in case.images)
        if case.label is not None:
            yield read_volume(case.label, label=True).array
    yield repr(cases.labels)


def _network(path: str) -> Iterator[Any]:
    read_seen(path)
    network = load_trained(path)
    yield repr((network.task, network.labels, network.preprocessing, network.intensity))
    yield from (value.numpy() for value in network.module.state_dict().values())


def _state(path: str) -> Iterator[Any]:
    held = read_weights(path)
    known = recognised(held)
    state = held.tensors if known is None else known.tensors
    for name in sorted(state):
        yield repr((name, tuple(state[name].shape), state[name].dtype))


def _plan(path: str) -> Iterator[Any]:
    yield repr(read_plan(path))


def _run(path: str) -> Iterator[Any]:
    record = read_run(path)
    yield repr((record.config, record.metrics, record.manifest))


def _cache(path: str) -> Iterator[Any]:
    cache = open_cache(path)
    assert isinstance(cache.digest, str)
    for scan in cache:
        for level, shape in enumerate(scan.level_shapes):
            yield scan.read((-3, 0, 0), (shape[0] + 3, *shape[1:]), level)
        scan.foreground_ratio((0, 0, 0), scan.shape)
        if scan.has_label:
            yield scan.read_label((0, 0, 0), scan.shape)
        yield from (scan.class_locations[value] for value in sorted(scan.class_locations))
        yield repr((scan.case.id, scan.spacing_mm, scan.statistics, sorted(scan.num_voxels.items())))
    yield repr(sorted(cache.fingerprints().items()))


READERS: dict[str, Callable[[str], Iterator[Any]]] = {
    "scan": _scan,
    "channels": _channels,
    "folder": _folder,
    "cases": _cases,
    "network": _network,
    "state": _state,
    "plan": _plan,
    "run": _run,
    "cache": _cache,
}


def read(kind: str, path: str) -> Outcome:
    """Read a source, whatever it raises."""
    before = _memory_bytes("VmRSS")
    _forget_peaks()
    started = time.monotonic()
    try:
        digest = hashlib.sha256()
        for part in READERS[kind](path):
            digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else str(part).encode())
        outcome = Outcome("read", digest.hexdigest())
    except Mim3dError as error:
        outcome = Outcome("refused", str(error))
    except Exception:
        outcome = Outcome("foreign", traceback.format_exc(limit=-8))
    taken = max(0, _memory_bytes("VmHWM") - before)
    return Outcome(outcome.result, outcome.text, time.monotonic() - started, taken)


def _processes() -> list[str]:
    """This process and those that it started."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return ["self", *(children.read_text().split() if children.exists() else [])]


def _memory_bytes(field: str) -> int:
    total = 0
    for process in _processes():
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
    return total


def _forget_peaks() -> None:
    for process in _processes():
        try:
            Path(f"/proc/{process}/clear_refs").write_text("5")
        except OSError:
            continue


def main() -> None:
    """Answer requests, a JSON list of kind and path in each line, until there are no more."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MORE_BYTES, resource.RLIM_INFINITY))
    for line in sys.stdin:
        kind, path = json.loads(line)
        print(json.dumps(asdict(read(kind, path))), file=answers, flush=True)


if __name__ == "__main__":
    main()
