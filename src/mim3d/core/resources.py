"""What the machine has: cores, memory as the system and its control groups count it, and devices to compute on."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from mim3d.core.errors import ConfigError

if TYPE_CHECKING:
    import torch

_ROOT = Path("/")

#: Where control groups of either version are mounted, and the names of their files: limit, use, statistics.
_GROUP_FILES = {
    "sys/fs/cgroup": ("memory.max", "memory.current", "memory.stat"),
    "sys/fs/cgroup/memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}

#: File pages that count as used in a group but are given back when memory is short; the older version's names too.
_RECLAIMABLE = (("total_inactive_file", "inactive_file"), ("total_active_file", "active_file"))

#: Name that a user gives -> kind of device.
KINDS = {"cpu": "cpu", "cuda": "cuda", "gpu": "cuda", "mps": "mps"}


#: Share of the available memory that this thread, or what else runs in its context, may count on.
_share: ContextVar[float] = ContextVar("share of memory", default=1.0)


@contextmanager
def sharing_memory(share: float) -> Iterator[None]:
    """Let this thread count on a share of the available memory alone, as others need the rest at the same time.

    Args:
        share: The share, above 0 and at most 1.
    """
    token = _share.set(share)
    try:
        yield
    finally:
        _share.reset(token)


def in_words(num_bytes: int) -> str:
    """Write a number of bytes for people, as ``3 MiB`` or ``7.0 GiB``."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1000 else f"{size / 1024:.1f} TiB"


def num_cores(root: Path = _ROOT) -> int:
    """Number of cores that this process may use: those it may run on, and no more than its control groups grant.

    Args:
        root: Folder that the system's files lie in. It is another than ``/`` in tests alone.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *_cores_of_groups(root)])


def limit_threads() -> None:
    """Let PyTorch compute by no more threads than there are cores for this process, unless OMP_NUM_THREADS is set.

    PyTorch counts the machine's cores. In a container that is granted four of 64, its threads would wait for each
    other.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (granted := num_cores()):
        torch.set_num_threads(granted)


def available_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that this process can still get: free and reclaimable, and within the limits of its control groups.

    Args:
        root: Folder that the system's files lie in. It is another than ``/`` in tests alone.

    Returns:
        Bytes, of which a thread in :func:`sharing_memory` is told its share. None where the system does not say;
        without ``/proc`` all memory of the machine counts as available.
    """
    limits = list(_left_in_groups(root))
    free_kib = _fields(root / "proc/meminfo").get("MemAvailable")
    free = total_memory_bytes() if free_kib is None else free_kib * 1024
    least = min(limits if free is None else [*limits, free], default=None)
    return None if least is None else int(least * _share.get())


def total_memory_bytes() -> int | None:
    """Memory of the whole machine; None where the system does not say."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def resident_memory_bytes(root: Path = _ROOT) -> int | None:
    """Memory that this process holds now, in bytes; None where the system does not say."""
    kib = _fields(root / "proc/self/status").get("VmRSS")
    return None if kib is None else kib * 1024


def peak_memory_bytes(root: Path = _ROOT) -> int | None:
    """The most memory that this process has ever held, in bytes; None where the system does not say."""
    kib = _fields(root / "proc/self/status").get("VmHWM")
    return None if kib is None else kib * 1024


def num_oom_kills(root: Path = _ROOT) -> int | None:
    """How often the system has ended a process for lack of memory, as far as it is known here; None where it is not."""
    events = [root / mount / group / "memory.events" for mount in _GROUP_FILES for group in _groups(root)]
    counts = [_fields(path).get("oom_kill") for path in (*events, root / "proc/vmstat")]
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _left_in_groups(root: Path) -> Iterator[int]:
    """What each control group around this process leaves: its own and all above it, as every limit holds."""
    for mount, names in _GROUP_FILES.items():
        for group in _groups(root):
            limit, used = (_number(root / mount / group / name) for name in names[:2])
            if limit is not None and used is not None:
                held = _fields(root / mount / group / names[2])
                cached = sum(next((held[name] for name in pair if name in held), 0) for pair in _RECLAIMABLE)
                yield max(0, limit - used + cached)


def _cores_of_groups(root: Path) -> Iterator[int]:
    """Cores that each control group around this process grants, by its share of time, rounded up."""
    for group in _groups(root, "cpu"):
        try:
            quota, period = (root / "sys/fs/cgroup" / group / "cpu.max").read_text(encoding="ascii").split()
        except (OSError, ValueError):
            older = root / "sys/fs/cgroup/cpu" / group
            quota, period = (str(_number(older / f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            yield math.ceil(int(quota) / int(period))


def _groups(root: Path, controller: str = "memory") -> list[Path]:
    """This process's groups and those above, as folders below a mount; a container may see only the topmost."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    named = [path for _, names, path in fields if names == "" or controller in names.split(",")]
    paths = [Path(*(part for part in name.split("/") if part not in ("", ".."))) for name in named]
    return list(dict.fromkeys(group for path in [*paths, Path()] for group in (path, *path.parents)))


def _number(path: Path) -> int | None:
    """The whole number in a file; None without one (``max`` stands for no limit)."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _fields(path: Path) -> dict[str, int]:
    """Lines such as ``MemAvailable:  123 kB`` or ``active_file 123`` as numbers by name."""
    try:
        rows = [line.replace(":", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def choose_accelerator(name: str) -> str:
    """The kind of device for an ``accelerator`` setting: ``cpu``, ``cuda`` or ``mps``.

    Args:
        name: One of :data:`KINDS`, or ``auto`` for the fastest kind that this machine has.
    """
    return next(kind for kind, there in _available().items() if there) if name == "auto" else KINDS[name]


def choose_device(name: str) -> "torch.device":
    """The device for an ``accelerator`` setting, once it is known to be there; threads are limited on the way.

    Args:
        name: One of :data:`KINDS`, or ``auto`` for the fastest kind that this machine has.
    Raises:
        ConfigError: An unknown name, or a device that this machine lacks.
    """
    import torch

    if name not in ("auto", *KINDS):
        raise ConfigError(f"accelerator is '{name}'; use one of auto, {', '.join(KINDS)}.")
    kind, available = choose_accelerator(name), _available()
    if not available[kind]:
        there = " or ".join(other for other, found in reversed(available.items()) if found)
        raise ConfigError(
            f"accelerator is '{name}', but this machine shows no such device; use accelerator {there}, or auto."
        )
    limit_threads()
    return torch.device(kind)


def device_name(device: "torch.device") -> str:
    """The device in words, for people."""
    import torch

    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _available() -> dict[str, bool]:
    """Whether this machine has each kind of device, the fastest kinds first."""
    import torch

    return {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
