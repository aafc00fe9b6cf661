"""Numbers in the cells of a paper's table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Column:
    """A score, its title, and its decimals."""

    key: str
    title: str
    decimals: int


def value_cell(values: Mapping[str, Any], stds: Mapping[str, Any], intervals: Mapping[str, Any], column: Column) -> str:
    """``0.883 ± 0.041 [0.871, 0.895]``, with what of it is known; a dash without a value."""
    value, std = values.get(column.key), stds.get(column.key)
    if value is None:
        return "–"
    text = rounded(value, column.decimals)
    if std is not None:
        text += f" ± {rounded(std, column.decimals)}"
    return text + _interval(intervals.get(column.key), column.decimals)


def difference_cell(row: Mapping[str, Any], column: Column) -> str:
    """``+0.012 [0.003, 0.021]``; a dash without a difference."""
    value = row["difference"]
    if value is None:
        return "–"
    text = rounded(value, column.decimals)
    sign = "" if text.startswith("−") or float(text) == 0 else "+"
    return sign + text + _interval(row["ci95"], column.decimals)


def p_cell(p: float | None) -> str:
    """A p value to three decimals, or that it is smaller."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def rounded(value: float, decimals: int) -> str:
    """A number with a true minus sign, none before a zero."""
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _interval(ends: Sequence[float] | None, decimals: int) -> str:
    return "" if ends is None else f" [{rounded(ends[0], decimals)}, {rounded(ends[1], decimals)}]"
