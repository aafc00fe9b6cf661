"""The errors that a user can meet, each one sentence with the value at fault and the remedy; and exit codes."""

from collections.abc import Sequence

from mim3d.core.names import printable

#: Exit code of the command line where settings or data were refused, or cases were left out.
REFUSED = 2

#: Training stopped before its end, by its time limit or at a scheduler's request, and goes on with ``--resume true``;
#: ``EX_TEMPFAIL`` of sysexits.h, "try again later".
TO_BE_CONTINUED = 75

#: As shells say it of a process that a signal ended: 128 and the number of SIGINT, SIGPIPE, SIGTERM.
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

_noted: list[int] = []


class Mim3dError(Exception):
    """Root of every error that mim3d raises on purpose. The command line prints it as one line.

    As text it is harmless wherever it is printed or stored, whatever the names of files in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(Mim3dError):
    """A setting that cannot work. It is found before any work begins."""


class BothSetError(ConfigError):
    """Two settings that exclude each other are both set; each is given by its name, with its value where that helps."""

    def __str__(self) -> str:
        return printable(f"{' and '.join(self.args)} are both set; give only one of them.")


class DataError(Mim3dError):
    """A scan, label, folder or list that cannot be used as it is."""


class TooLargeError(DataError):
    """A scan, or what is computed of it, is larger than the memory that is left for it."""


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


def note_exit_code(code: int) -> None:
    """Let the command line end with a code; the first that is noted counts."""
    _noted.append(code)


def take_exit_code() -> int:
    """The code that was noted since this was called last; 0 for none."""
    code = next(iter(_noted), 0)
    _noted.clear()
    return code
