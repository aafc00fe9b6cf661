"""Tables for a paper: escaping, rounding, and that LaTeX holds together."""

import pytest

from mim3d.reporting.paper_tables import Column, PaperTable, difference_cell, latex, markdown, p_cell, value_cell
from mim3d.reporting.rendering import number

DICE = Column("dice", "Dice", 3)


def test_names_are_escaped_in_both_forms():
    table = PaperTable("t", "100 % of a_b & <c>", ["Label", "x_1"], [[r"left|right_{#}$~^\ *", "1"]])
    tex, md = latex([table]), markdown([table])
    assert r"left\textbar{}right\_\{\#\}\$\textasciitilde{}\textasciicircum{}\textbackslash{} *" in tex
    assert r"\caption{100 \% of a\_b \& $<$c$>$}" in tex
    assert r"left\|right\_\{\#\}$\~^\\ \*" in md
    row = md.splitlines()[-1]
    assert row.replace(r"\|", "").count("|") == 3


def test_every_row_of_a_latex_table_has_the_columns_it_declares():
    table = PaperTable("t", "c", ["Label", "a", "b"], [["one", "1", "2"], ["Mean", "3", "4"]], has_mean=True)
    lines = latex([table]).splitlines()
    assert r"\begin{tabular}{lrr}" in lines
    assert [line.count("&") for line in lines if line.endswith(r"\\")] == [2, 2, 2]
    assert lines.index(r"\midrule", lines.index(r"\midrule") + 1) == lines.index(r"Mean & 3 & 4 \\") - 1
    assert sum(line.startswith(r"\begin") for line in lines) == sum(line.startswith(r"\end") for line in lines)


@pytest.mark.parametrize(
    ("values", "stds", "ends", "expected"),
    [
        ({"dice": 0.88349}, {"dice": 0.0405}, {"dice": [0.8712, 0.9]}, "0.883 ± 0.041 [0.871, 0.900]"),
        ({"dice": 1.0}, {}, {}, "1.000"),
        ({"dice": None}, {"dice": None}, {"dice": None}, "–"),
        ({"dice": 0.5}, {"dice": 0.0}, {"dice": None}, "0.500 ± 0.000"),
    ],
)
def test_a_value_its_deviation_and_interval_have_the_same_decimals(values, stds, ends, expected):
    assert value_cell(values, stds, ends, DICE) == expected


def test_differences_carry_their_sign_and_zero_has_none():
    assert difference_cell({"difference": 0.0123, "ci95": [-0.002, 0.03]}, DICE) == "+0.012 [−0.002, 0.030]"
    assert difference_cell({"difference": -0.0123, "ci95": None}, DICE) == "−0.012"
    assert difference_cell({"difference": -0.0001, "ci95": None}, DICE) == "0.000"
    assert difference_cell({"difference": None, "ci95": None}, DICE) == "–"
    assert number(-0.0004, 3) == "0.000"


def test_small_p_values_are_told_as_such():
    assert [p_cell(p) for p in (0.0004, 0.001, 0.04567, 1.0, None)] == ["<0.001", "0.001", "0.046", "1.000", "–"]
