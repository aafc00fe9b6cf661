"""The errors a user can meet: each carries the value at fault and the remedy."""

from collections.abc import Sequence


class Mim3dError(Exception):
    """Root of every error mim3d raises on purpose; the command line prints it as one line."""


class ConfigError(Mim3dError):
    """A setting that cannot work, found before any work begins."""


class DataError(Mim3dError):
    """A scan, label, folder or list that cannot be used as it is."""


class DamagedError(DataError):
    """What a cache stores of one scan is missing or damaged; its other scans can still be used."""


class CheckpointError(Mim3dError):
    """Weights or a run that cannot be read, or that do not fit."""


def listed(names: Sequence[object], limit: int = 5) -> str:
    """The first few names of a sequence, for a sentence: ``a, b, c and 4 more``."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
