"""The program of the process that reads images with native code, see ``reading_process.py``.

It is run as a script and imports nothing of mim3d. A request is a line of JSON; an answer is the length of a JSON
object in four bytes, the object, and the bytes of the voxels.
"""

import json
import os
import re
import resource
import signal
import sys
from typing import Any

#: Memory beside the voxels that the libraries may take while they read.
_FREE_BYTES = 2**29


def main() -> None:
    """Answer requests until there are no more."""
    # A terminal and a scheduler send these to every process; whoever asks for images answers them, and ends this one.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not lie between the answers.
    os.dup2(2, 1)
    import SimpleITK as sitk

    answers.write(b"\0")
    answers.flush()
    for line in sys.stdin.buffer:
        answer, voxels = _read(sitk, json.loads(line))
        head = json.dumps(answer).encode()
        answers.write(len(head).to_bytes(4, "little") + head)
        answers.write(voxels)
        answers.flush()


def _read(sitk: Any, request: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    _bound_memory(request["max_bytes"] + _FREE_BYTES)
    try:
        reader = sitk.ImageFileReader()
        reader.SetImageIO(request["image_io"])
        reader.SetFileName(request["path"])
        voxels = sitk.GetArrayFromImage(reader.Execute())
    except Exception as error:  # Whatever the library raises is the answer.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Without the addresses of objects in memory, which say nothing.
        return {"error": re.sub(r"\(0x[0-9a-f]+\)", "", lines[-1]) if lines else type(error).__name__}, b""
    return {"dtype": voxels.dtype.str, "shape": voxels.shape, "num_bytes": voxels.nbytes}, voxels.data


def _bound_memory(more_bytes: int) -> None:
    """Let the process take this much memory beyond what it has; a system without the figures sets no bound."""
    try:
        with open("/proc/self/statm", encoding="ascii") as figures:
            taken = int(figures.read().split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        bound = taken + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    main()
