"""Images read by native code in a process of its own, where damaged bytes can crash, hang or fill it and nothing else.

The process is started at the first image, answers one request after another, and is ended and started again when it
does not answer in time. It is ``image_reader.py``, which knows nothing of mim3d.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import DataError

#: Seconds that an image may take, and bytes of the file and of its voxels for which there is one second more.
DEADLINE_S = 8.0
_FILE_BYTES_PER_S = 2**20
_VOXEL_BYTES_PER_S = 2**26

#: Memory that a reader may take, in sizes of the voxels: they lie in several buffers, and as double precision.
_MAX_COPIES = 8

#: Seconds in which the process must have started, on a slow disk too.
_START_S = 120.0


class _ReadingProcess:
    """The process and the pipes to it, as long as it lives."""

    def __init__(self) -> None:
        program = str(Path(__file__).with_name("image_reader.py"))
        # Nothing is imported from the working folder (-P).
        self._process = subprocess.Popen(
            [sys.executable, "-P", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.owner = os.getpid()
        self._receive(1, time.monotonic() + _START_S)

    def ask(self, request: dict[str, Any], deadline_s: float) -> tuple[dict[str, Any], bytearray]:
        """The answer to a request, and the bytes that follow it."""
        assert self._process.stdin is not None
        until = time.monotonic() + deadline_s
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        head = self._receive(int.from_bytes(self._receive(4, until), "little"), until)
        answer: dict[str, Any] = json.loads(head)
        return answer, self._receive(answer.get("num_bytes", 0), until)

    def _receive(self, num_bytes: int, until: float) -> bytearray:
        assert self._process.stdout is not None
        pipe, received = self._process.stdout.fileno(), bytearray(num_bytes)
        start, view = 0, memoryview(received)
        while start < num_bytes:
            if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError
            count = os.readv(pipe, [view[start:]])
            if count == 0:
                raise EOFError
            start += count
        return received

    def end(self) -> str:
        """End the process, whatever it is doing; a phrase of how it ended if it had done so by itself."""
        if self.owner != os.getpid():
            return "ended"
        self._process.kill()
        self._process.communicate()
        code = self._process.returncode
        return f"ended with {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


_current: _ReadingProcess | None = None
_lock = threading.Lock()


def _read_through(path: str) -> int:
    """Bring a file into the memory of the system, so that no deadline runs while a disk is slow; its size in bytes."""
    size_bytes = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                size_bytes += len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}).") from error
    return size_bytes


def read_apart(path: str, image_io: str, size_bytes: int) -> npt.NDArray[Any]:
    """Read an image with SimpleITK in a process of its own.

    Args:
        path: The file; it must be a regular one.
        image_io: Name of the reader in SimpleITK.
        size_bytes: Size of the voxels that the header claims; it bounds the time and the memory that may be taken.

    Returns:
        The voxels as SimpleITK gives them, slowest axis first.

    Raises:
        DataError: The image cannot be read, its reader crashed, or it took too long.
    """
    global _current
    deadline_s = DEADLINE_S + _read_through(path) / _FILE_BYTES_PER_S + size_bytes / _VOXEL_BYTES_PER_S
    with _lock:
        try:
            # A forked process shares the pipes of its parent, which belong to the parent alone.
            if _current is None or _current.owner != os.getpid():
                _current = _ReadingProcess()
                atexit.register(_current.end)
            request = {"path": os.path.abspath(path), "image_io": image_io, "max_bytes": _MAX_COPIES * size_bytes}
            answer, voxels = _current.ask(request, deadline_s)
        except BaseException as error:
            ending = "could not be started"
            if _current is not None:
                atexit.unregister(_current.end)
                ending = _current.end()
                _current = None
            if isinstance(error, TimeoutError):
                raise DataError(f"{path}: the pixels cannot be decoded in {deadline_s:.0f} s.") from error
            if isinstance(error, EOFError | OSError | ValueError):
                raise DataError(f"{path}: the pixels cannot be decoded (SimpleITK {ending} on them).") from error
            raise
    if "error" in answer:
        raise DataError(f"{path}: the pixels cannot be decoded ({answer['error']}).")
    return np.frombuffer(voxels, dtype=answer["dtype"]).reshape(answer["shape"])
