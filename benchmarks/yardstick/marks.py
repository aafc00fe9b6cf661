"""Marks to reach, and ratios that stand beside them without one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from yardstick.machine import Row


@dataclass(frozen=True)
class Ratio:
    """One comparison.

    Attributes:
        title: what is compared.
        value: what was measured.
        at_least: the mark; None where there is none of this kind.
        at_most: the mark; None where there is none of this kind.
        unit: after the value.
    """

    title: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "x"

    @property
    def reached(self) -> bool | None:
        """Whether the mark is; None without one."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def verdict(self) -> str:
        """The mark and ``PASS`` or ``NOT REACHED``; empty without a mark."""
        if self.reached is None:
            return ""
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:.4g}"
        return f"mark: {bound}{self.unit}  {'PASS' if self.reached else 'NOT REACHED'}"

    def row(self) -> Row:
        """For the results."""
        return {**asdict(self), "value": round(self.value, 4), "reached": self.reached}


def print_ratios(heading: str, ratios: Sequence[Ratio]) -> None:
    """One line each."""
    print(f"\n{heading}")
    for ratio in ratios:
        print(f"  {ratio.title:74} {ratio.value:9.3f}{ratio.unit:3} {ratio.verdict}", flush=True)
