"""Bars on terminals, plain lines elsewhere."""

import io
import re

import pytest

from mim3d.core import progress
from mim3d.core.progress import Progress, clock, counted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal in the place of stderr; pytest would take that of a fixture back."""
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return shown


def test_a_terminal_gets_a_bar_with_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with Progress("step {done}/{total}", 8) as bar:
        bar.begin(2)
        bar.say("a line [with] brackets")
        bar.update(5, "second")
        bar.update(5, "third")
    text = terminal.getvalue()
    assert "a line [with] brackets" in text
    assert "step 5/8" in text
    assert "third" in text


def test_elsewhere_there_are_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("{done}", 8) as bar:
        bar.update(5)
        bar.say("a line")
    assert capsys.readouterr().err == "a line\n"


def test_a_silent_bar_shows_nothing_even_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with Progress("{done}", 8, silent=True, eager=True) as bar:
        bar.say("a line")
        bar.update(3)
    assert terminal.getvalue() == ""


def test_the_first_and_the_last_line_are_shown_where_that_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("{done} of {total} scans", 3, eager=True) as shown:
        for done in (0, 0.5, 1, 2, 3, 3):
            shown.update(done, "a case")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["0.5 of 3 scans", "a case"], ["3 of 3 scans", "a case"]]
    with Progress("{done} of {total} scans", 3) as shown:
        for done in (0, 0.5, 1, 2, 3):
            shown.update(done, "a case")
    assert capsys.readouterr().err == ""


def test_no_plain_line_is_printed_twice(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    with Progress("{done} of {total} scans", 2) as shown:
        for done in (1, 1, 1.08333, 2, 2.0):
            shown.update(done)
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "1 of 2 scans",
        "1.1 of 2 scans",
        "2 of 2 scans",
    ]


def test_counting_passes_items_on_and_tells_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    assert list(counted("abc", 3, "caching")) == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines()[-1] == "caching 3/3  0:00:00 left"


def test_counting_shows_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    assert list(counted(range(3), 3, "caching")) == [0, 1, 2]
    assert "caching 3/3" in terminal.getvalue()


def test_a_clock_has_hours() -> None:
    assert clock(3725.4) == "1:02:05"


@pytest.mark.parametrize("columns", ["80", "160"])
def test_a_narrow_terminal_shows_the_time_left_and_all_that_is_told(
    monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    told = "loss 4.4810  lr 1.00e-04  3.51 samples/s  25% waiting for data  35.0 GiB held"
    with Progress("step {done}/{total}", 100_000) as bar:
        bar.update(0, told)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "step 0/100000" in plain
    assert "-:--:--" in plain
    assert told in plain
