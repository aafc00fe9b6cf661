"""Confidence intervals by resampling patients (Efron and Tibshirani 1993)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mim3d.core.errors import ConfigError

Floats = npt.NDArray[np.float64]
Interval = list[float] | None

#: Coverage that intervals are made for.
LEVEL = 0.95

#: Counts that are drawn at a time.
_COUNTS_AT_ONCE = 2**22

CONVENTION = (
    "95 % percentile intervals: patients are drawn with replacement, all cases of a patient together, and the score is "
    "computed anew; the interval spans the 2.5 to the 97.5 percentile of num_bootstrap such scores. Draws that leave a "
    "score undefined are passed over; null where fewer than two patients define it, or where num_bootstrap is 0. With "
    "few patients (about 20 or fewer) such intervals are somewhat too short."
)


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        num_bootstrap: How often the patients are drawn anew; 0 makes no intervals.
        seed: Of the draws; the same for every score, so that two methods are compared on the same patients.
    """

    num_bootstrap: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_bootstrap < 0 or self.num_bootstrap in range(1, 100):
            raise ConfigError(
                f"num_bootstrap is {self.num_bootstrap}, which makes no interval; use 0 for none, or 100 and more."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}, but it takes a whole number from 0.")

    def resampled(self, num_patients: int, statistic: Callable[[Floats], Floats]) -> Floats:
        """A statistic under resampling.

        Args:
            num_patients: P of them.
            statistic: Takes how often each patient was drawn, (B, P), and gives (B, ...).

        Returns:
            (num_bootstrap, ...); the draws depend on the seed and the number of patients alone.
        """
        rng = np.random.default_rng(self.seed)
        step = max(1, _COUNTS_AT_ONCE // max(num_patients, 1))
        shares = np.full(num_patients, 1 / num_patients)
        drawn = []
        for start in range(0, self.num_bootstrap, step):
            counts = rng.multinomial(num_patients, shares, size=min(step, self.num_bootstrap - start))
            drawn.append(statistic(counts.astype(np.float64)))
        return np.concatenate(drawn)

    def resampled_means(self, sums: Floats, numbers: Floats) -> Floats:
        """Means (num_bootstrap, ...) under resampling, of what :func:`summed_defined` gives."""

        def means(counts_BP: Floats) -> Floats:
            with np.errstate(invalid="ignore"):
                return np.tensordot(counts_BP, sums, 1) / np.tensordot(counts_BP, numbers, 1)

        return self.resampled(len(sums), means)

    def intervals(self, num_patients: int, statistics: Callable[[Floats], Mapping[str, Floats]]) -> dict[str, Interval]:
        """The interval of each score; None where none can be made.

        Args:
            num_patients: P of them.
            statistics: Takes how often each patient was drawn, (B, P), and gives every score (B,) by its name.
        """
        names = list(statistics(np.ones((1, num_patients))))
        if not self.num_bootstrap or num_patients < 2:
            return dict.fromkeys(names)
        drawn = self.resampled(num_patients, lambda counts_BP: np.stack(list(statistics(counts_BP).values()), axis=1))
        return {name: interval(drawn[:, place]) for place, name in enumerate(names)}


def interval(values: Floats) -> Interval:
    """The percentile interval of resampled values (B,); None where none of them is defined."""
    known = values[np.isfinite(values)]
    if not known.size:
        return None
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(known, [tail, 100 - tail])
    return [float(low), float(high)]


def grouped(names: Sequence[str]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """Distinct names in the order of their first appearance, and the place (N,) of each name among them."""
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return list(places), np.array([places[name] for name in names], dtype=np.int64)


def summed(values: npt.NDArray[Any], groups: npt.NDArray[np.int64], num_groups: int) -> Floats:
    """Sums (P, ...) of values (N, ...) by group."""
    total = np.zeros((num_groups, *values.shape[1:]))
    np.add.at(total, groups, values)
    return total


def summed_defined(values: Floats, groups: npt.NDArray[np.int64], num_groups: int) -> tuple[Floats, Floats]:
    """Sums (P, ...) by group of the values (N, ...) that are not NaN, and how many those are."""
    defined = ~np.isnan(values)
    return summed(np.where(defined, values, 0), groups, num_groups), summed(defined, groups, num_groups)


def plain(value: float) -> float | None:
    """A number as JSON holds it: None instead of NaN."""
    return None if np.isnan(value) else float(value)
