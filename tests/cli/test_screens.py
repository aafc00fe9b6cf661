"""What commands print, as wide as a terminal is: nothing is cut, and what can be copied stays in one piece."""

import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import pytest

from mim3d import cli
from mim3d.core.progress import fitted
from mim3d.tasks.evaluation import print_tables, printed_table


@pytest.mark.parametrize("columns", [80, 120, 200])
@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_no_flag_is_broken_in_its_help(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= columns and "``" not in text
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    for name in cli.COMMANDS[command].signature(command).hints:
        assert f"--{name}" in flags or any(flag.startswith(f"--{name}.") for flag in flags)
    if command == "finetune":
        assert {"--task.augmentation.low_resolution_prob", "--task.augmentation.rotation_degrees"} <= set(flags)
        assert re.search(r"\n {4,}Probability of a loss of resolution", text) or columns > 120


@contextmanager
def terminal(columns: int) -> Iterator[TextIO]:
    controller, device = pty.openpty()
    fcntl.ioctl(device, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with os.fdopen(device, "w") as stream:
        yield stream
    os.close(controller)


LINES = (
    "plan: spacing_mm of each scan, intensity z-score, patch_size 40 56 40, batch_size 2, max_steps 6, positive_ratio "
    "0.33, flip_axes X, Y, Z, rotation_degrees 15 15 15",
    "1 of 2 folds are finished; go on with: mim3d finetune --out runs/with_a_long_name/of_the_data --resume true",
    "      (why: the run's plan.yaml, or --verbose true; change it by flags or --plan, whatever its width is)",
    f"{'x' * 80} {'y' * 79} z",
)


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
@pytest.mark.parametrize("line", LINES)
def test_a_terminal_breaks_lines_between_words_and_commands_are_copied_whole(columns: int, line: str) -> None:
    with terminal(columns) as stream:
        shown = fitted(line, stream)
    rows = [shown[start : start + columns] for start in range(0, len(shown), columns)]
    assert " ".join(" ".join(row.split()) for row in rows).split() == line.split() == shown.split()
    assert "\n" not in shown


def test_what_is_longer_than_a_row_stays_whole_and_pipes_get_lines_as_they_are() -> None:
    path = "/data/" + "a" * 100
    with terminal(80) as stream:
        assert fitted(f"the list is in {path} and complete", stream).split() == [
            *("the", "list", "is", "in", path, "and", "complete")
        ]
        assert fitted("first line\n" + LINES[0], stream).startswith("first line\nplan: spacing_mm")
    with open(os.devnull, "w") as stream:
        assert fitted(LINES[0], stream) == LINES[0]


TITLE = "Difference to /data/a_folder/with_a_long_name/of_the_predictions, 3 cases"
NAMES = ("left upper lobe of the lung, apical part", "left upper lobe of the lung, anterior part", "spleen")


@pytest.mark.parametrize("columns", [40, 80, 120, None])
def test_tables_cut_neither_numbers_nor_names(columns: int | None, monkeypatch, capsys) -> None:
    if columns is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(columns))
    table = printed_table(TITLE, "Label", ["Dice"] * 7)
    numbers = [f"{number / 7:.4f}" for number in range(21)]
    for place, name in enumerate(NAMES):
        table.add_row(name, *numbers[place * 7 : place * 7 + 7])
    print_tables([table])
    title, *shown = capsys.readouterr().out.splitlines()
    assert title == TITLE
    assert re.findall(r"\d\.\d+", "\n".join(shown)) == numbers
    names = re.sub(r"[\s\d.]", "", "".join(shown))
    assert all(name.replace(" ", "") in names for name in NAMES)
    assert all(line == line.rstrip() for line in shown)
    assert columns != 80 or max(map(len, shown)) <= 80
    # A pipe has a line for each row.
    assert columns is not None or len(shown) <= len(NAMES) + 4
