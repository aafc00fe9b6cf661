"""What a run was made with: code, packages and hardware; nothing that names a person, a machine or a path of it."""

import os
import platform
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import mim3d
from mim3d.core.resources import num_cores, total_memory_bytes

_PACKAGE = Path(mim3d.__file__).resolve().parent
_GIT_PATIENCE_S = 10


def environment() -> dict[str, Any]:
    """Collect command line, code version, package versions and hardware, for the manifest of a run."""
    return {"command_line": command_line(), "code": code_version(), "versions": versions(), "hardware": hardware()}


def command_line() -> str | None:
    """The words that this process was started by, as a shell takes them; None where Python code called a command."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    ours = program.name == "mim3d" or program.parts[-2:] == ("mim3d", "__main__.py")
    return shlex.join(["mim3d", *sys.argv[1:]]) if ours else None


@cache
def code_version() -> dict[str, Any]:
    """Version of mim3d. In a git checkout also its commit, and whether tracked files differ from that."""
    version = {"mim3d": mim3d.__version__}
    top = _git("rev-parse", "--show-toplevel")
    # An environment inside somebody else's repository must not pass for that repository's code.
    if top is None or Path(top).resolve() / "src" / "mim3d" != _PACKAGE:
        return version
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {**version, "commit": _git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _git(*words: str) -> str | None:
    """What a git command prints; None where there is no git, no repository, or no answer."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), *words], capture_output=True, text=True, timeout=_GIT_PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def versions() -> dict[str, str]:
    """Versions of mim3d, of Python, and of all installed packages that mim3d needs or can use."""
    try:
        declared = metadata.requires("mim3d") or []
    except metadata.PackageNotFoundError:
        declared = []
    # Tools for the development of mim3d are left out.
    used = [line for line in declared if not re.search(r"extra == ['\"]dev['\"]", line)]
    names = {match[0] for line in used if (match := re.match(r"[\w.-]+", line))}
    found = {"mim3d": mim3d.__version__, "python": platform.python_version()}
    for name in ["torch", *sorted(names)]:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def hardware() -> dict[str, Any]:
    """Describe processor, memory and GPUs, and whatever else decides how numbers are rounded."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cudnn: Any = torch.backends.cudnn
    gpus = [torch.cuda.get_device_properties(index) for index in range(num_gpus)]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _found(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor(),
        "cpu_count": os.cpu_count(),
        "usable_cores": num_cores(),
        "num_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": total_memory_bytes(),
        "gpus": [gpu.name for gpu in gpus],
        "gpu_memory_bytes": [gpu.total_memory for gpu in gpus],
        "gpu_driver": _found(r"Kernel Module.*?\s(\d+\.\d[\d.]*)", "/proc/driver/nvidia/version") if gpus else None,
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": cudnn.version() if gpus else None,
    }


def _found(pattern: str, path: str) -> str | None:
    """What the group of a pattern matches in a file of the system; None without a match or a file."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else None
