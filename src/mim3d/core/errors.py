"""The errors that a user can meet. Each names the value at fault and the remedy in one sentence."""

from collections.abc import Sequence

from mim3d.core.names import printable


class Mim3dError(Exception):
    """Root of every error that mim3d raises on purpose. The command line prints it as one line.

    As text it is harmless wherever it is printed or stored, whatever the names of files in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(Mim3dError):
    """A setting that cannot work. It is found before any work begins."""


class DataError(Mim3dError):
    """A scan, label, folder or list that cannot be used as it is."""


class DamagedError(DataError):
    """What a cache stores of one scan is missing or damaged. Its other scans can still be used."""


class CheckpointError(Mim3dError):
    """Weights or a run that cannot be read or do not fit."""


def listed(names: Sequence[object], limit: int = 5) -> str:
    """The first few names of a sequence, for a sentence: ``a, b, c and 4 more``."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
