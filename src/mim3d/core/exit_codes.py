"""Exit codes of the command line, and how a command that returns as usual in Python lets its process end with one."""

#: Settings or data were refused, or cases were left out.
REFUSED = 2

#: Training stopped before its end, by its time limit or at a scheduler's request, and goes on with ``--resume true``;
#: ``EX_TEMPFAIL`` of sysexits.h, "try again later".
TO_BE_CONTINUED = 75

#: As shells say it of a process that a signal ended: 128 and the number of SIGINT, SIGPIPE, SIGTERM.
INTERRUPTED = 130
BROKEN_PIPE = 141
TERMINATED = 143

_noted: list[int] = []


def note_exit_code(code: int) -> None:
    """Let the command line end with a code; the first that is noted counts."""
    _noted.append(code)


def take_exit_code() -> int:
    """The code that was noted since this was called last; 0 for none."""
    code = next(iter(_noted), 0)
    _noted.clear()
    return code
