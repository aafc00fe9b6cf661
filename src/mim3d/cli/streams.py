"""Standard output and error that cannot end the work: closed, on a full disk, or with nobody who reads them."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class _Lasting(io.TextIOBase):
    """A stream whose writes may fail. After the first that does, what is written is dropped.

    Args:
        stream: The stream.
        name: What it is called in the sentence about the failure.
        ends_on_pipe: Whether a reader that has gone ends the command, as is usual for standard output.
    """

    def __init__(self, stream: TextIO, name: str, *, ends_on_pipe: bool) -> None:
        self._stream, self._name, self._ends_on_pipe = stream, name, ends_on_pipe
        self._lost = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream, which displays ask for."""
        return self._stream.encoding

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not self._lost:
            try:
                self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        if not self._lost:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError) and self._ends_on_pipe:
            raise error
        self._lost = True
        if self._stream is not sys.__stderr__:
            print(f"mim3d: {self._name} cannot be written to ({error}); going on without it", file=sys.stderr)
        # What Python flushes at its end must not fail once more.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Let failures of standard output and error not end the work; afterwards the streams are those of before."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The next file to be opened would get the number, and receive what libraries print.
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    output, errors = (stream or open(os.devnull, "w", encoding="utf-8") for stream in before)  # noqa: SIM115
    sys.stdout = _Lasting(output, "standard output", ends_on_pipe=True)
    sys.stderr = _Lasting(errors, "standard error", ends_on_pipe=False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
