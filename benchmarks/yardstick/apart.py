"""Parts of a benchmark in processes of their own, each with its share of the time, and rows as a table."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from yardstick.machine import Row


def run_apart(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command; it and all that it has started are ended when the time is used up, or this process stops.

    Args:
        command: What is run.
        seconds: Its share of the time.
        log: File that takes what it prints.

    Returns:
        Why it failed, in one line; empty when it did not.
    """
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:g} s, its share of the time"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "" if code == 0 else (said[-1].strip() if said else f"ended with code {code}")


def read_rows(path: Path) -> list[Row]:
    """Rows that a part has written so far, one a line; half a line is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def print_table(rows: Sequence[Row]) -> None:
    """Rows with the same columns one under the other, below a line with their names."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end].keys() == rows[start].keys():
            continue
        lines = [list(rows[start]), *([str(value) for value in row.values()] for row in rows[start:end])]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  " + "  ".join(word.rjust(width) for word, width in zip(line, widths, strict=True)), flush=True)
        start = end
