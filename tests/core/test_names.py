"""Names from files: as names of files, on a terminal, and in tables; hostile ones do no harm anywhere."""

import csv
import sys

import pytest

from mim3d.core.errors import DataError
from mim3d.core.files import read_csv, write_csv
from mim3d.core.names import (
    MAX_NAME_BYTES,
    file_name,
    is_file_name,
    joined_name,
    number_of,
    printable,
    same_name,
    unescaped,
)
from mim3d.core.progress import Progress, say

HOSTILE = [
    "a\x1b[31mred\x1b[0m",
    "a\nmim3d: all is well",
    "bell\x07\x08\x7f",
    "evil\u202egnp.exe",
    "zero\u200bwidth\ufeff",
    "line\u2028end",
    "c1\x9b31m",
    "no utf-8 \udcff",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_terminal_would_obey_is_written_as_an_escape_and_can_be_undone(name):
    shown = printable(name)
    assert shown.isprintable() and shown != name
    assert unescaped(shown) == name


@pytest.mark.parametrize("name", ["Leber_01.β", "肝臓 1", "می\u200cخواهم", "a b;c,d'e"])
def test_names_in_any_script_are_printed_as_they_are(name):
    assert printable(name) == name


def test_errors_lines_and_progress_are_harmless_whatever_a_file_is_called(capsys):
    for name in HOSTILE:
        assert str(DataError(f"{name}: no such file.")).isprintable()
        say(name)
        with Progress("{done}", 1, eager=True) as progress:
            progress.update(1, name)
            progress.say(name)
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (*out.split("\n"), *err.split("\n")))
    assert len(out.splitlines()) == len(HOSTILE)


@pytest.mark.parametrize(
    "name", [*HOSTILE, "..", "../../etc/passwd", "-rf", "con", "CON.1", "a" * 300, " . ", "=1+1", ""]
)
def test_any_text_becomes_the_name_of_a_file(name):
    assert is_file_name(file_name(name)), file_name(name)
    assert is_file_name(joined_name([name, "ct"]))


def test_names_that_are_fine_stay_as_they_are():
    for name in ("case.0_0000", "CT", "patient-1", "Äpfel_β", "icon.1", "com"):
        assert file_name(name) == name and is_file_name(name)


def test_long_names_are_cut_and_stay_different():
    first, second = file_name("x" * 300), file_name("x" * 301)
    assert first != second and max(map(len, (first, second))) <= MAX_NAME_BYTES
    assert len(file_name("肝" * 200).encode()) <= MAX_NAME_BYTES


def test_names_that_some_file_systems_take_for_the_same_count_as_the_same():
    assert same_name("CT_\u00e4") == same_name("ct_a\u0308") == same_name("Ct_A\u0308")


def test_a_table_holds_no_formula_and_is_read_back_as_it_was(tmp_path):
    texts = [
        "=1+1",
        "+cmd",
        "-2+3",
        "@SUM(A1)",
        "'=1",
        "''+1",
        "'quoted'",
        "＝1",
        "plain",
        "a,b;c",
        'say "x"',
        "-",
        "",
        "a;=1+1;'=x",
        ";@x",
        "1;-2",
    ]
    numbers = ["-0.5", "+1e-3", "-inf"]
    write_csv(tmp_path / "t.csv", ["=head", *texts[1:]], [texts, [*numbers, -1.5, None, *texts[5:]]])
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    # Where numbers have decimal commas, spreadsheets part cells at ";".
    parts = [part for cell in cells for part in cell.split(";")]
    formulas = [part for part in parts if part.startswith(("=", "+", "-", "@", "\t", "\r", "＝"))]
    assert formulas == ["-2", "-2", *numbers, "-1.5", "-2"]
    (_, head), (_, first), (_, second) = read_csv(tmp_path / "t.csv")
    assert head[0] == "=head" and first == texts
    assert second[:5] == [*numbers, "-1.5", ""]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_holds_escapes_in_the_place_of_control_characters(tmp_path, name):
    write_csv(tmp_path / "t.csv", ["name"], [[name]])
    assert all(line.isprintable() for line in (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines())
    assert unescaped(read_csv(tmp_path / "t.csv")[1][1][0]) == name


def test_warnings_and_errors_of_the_command_line_are_harmless(tmp_path, capsys, monkeypatch):
    from mim3d.cli import main

    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["cache", str(tmp_path / "no\x1b[31m\u202e"), "--out", str(tmp_path / "c")]) == 2
    err = capsys.readouterr().err
    assert "\\x1b[31m\\u202e" in err and all(line.isprintable() for line in err.splitlines())


def test_a_number_has_its_noun_and_its_verb() -> None:
    assert [number_of(n, "scan", "are") for n in (0, 1, 2)] == ["0 scans are", "1 scan is", "2 scans are"]
    assert number_of(1, "case", "were", of=3) == "1 of 3 cases was"
    assert number_of(1, "case", "were", of=1) == "1 of 1 case was"
    assert number_of(2000, "copy", "have", of=3000) == "2,000 of 3,000 copies have"
