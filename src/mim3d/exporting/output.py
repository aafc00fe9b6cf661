"""Where exports may be written, and the packages that they need."""

from collections.abc import Sequence
from pathlib import Path

from mim3d.core.errors import ConfigError

#: Of each format a file, below its folder, by which an earlier export is known.
MARKS = ("card.json", "metadata.json", "configs/metadata.json")


def check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a place that holds anything else, before any work begins.

    Raises:
        ConfigError: a file, or a folder that is not empty: an earlier export without ``overwrite``, or other things.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"{folder} is no folder; choose another --out.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not any((folder / mark).is_file() for mark in MARKS) or (folder / "checkpoints").exists():
        raise ConfigError(f"{folder} holds other things than an export; choose another --out.")
    if not overwrite:
        raise ConfigError(f"{folder} holds an export already; choose another --out, or use --overwrite true.")


def require_packages(names: Sequence[str], what: str, extra: str) -> None:
    """Refuse where packages are not installed.

    Raises:
        ConfigError: naming them, and how to install them.
    """
    from importlib.util import find_spec

    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"{what} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}; install with: "
            f"pip install 'mim3d[{extra}]'."
        )
