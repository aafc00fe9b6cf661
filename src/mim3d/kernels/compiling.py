"""Compile a C++ source of ours for the machine at hand, once."""

import hashlib
import os
import shutil
import subprocess
import warnings
from pathlib import Path

from mim3d.core.files import atomic_file

#: Optimised for this very processor; no fast-math, so that results do not depend on the compiler's mood.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")

#: Longest time a compilation may take.
TIMEOUT_S = 120


def compile_library(source: Path) -> Path | None:
    """The shared library made from ``source``; None where there is no C++ compiler, or it fails (with a warning).

    Kept in the user's cache folder under a digest of the source, the compiler and the processor, so that machines
    sharing a home folder never load each other's code.
    """
    compiler = find_compiler()
    if compiler is None:
        return None
    try:
        target = _cache_folder() / f"{source.stem}-{_digest(source, compiler)}.so"
        if not target.exists():
            _compile(compiler, source, target)
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip()
        reason = detail.splitlines()[0] if detail else type(error).__name__
        warnings.warn(
            f"{source.name} could not be compiled with {compiler} ({reason}); the slower PyTorch path is used.",
            stacklevel=2,
        )
        return None
    return target


def find_compiler() -> str | None:
    """A C++ compiler on the search path."""
    return shutil.which("g++") or shutil.which("clang++")


def _cache_folder() -> Path:
    folder = Path.home() / ".cache" / "mim3d"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def _digest(source: Path, compiler: str) -> str:
    described = subprocess.run(
        [compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    # The compiler says its version and what "native" means here on the standard error.
    content = "\0".join((source.read_text(encoding="utf-8"), described.stderr, *FLAGS))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _compile(compiler: str, source: Path, target: Path) -> None:
    with atomic_file(target, remedy=None) as built:
        subprocess.run(
            [compiler, *FLAGS, str(source), "-o", str(built)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=True,
        )
