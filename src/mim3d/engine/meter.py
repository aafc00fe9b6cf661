"""Means of the logged terms, kept on the device: reading them is the only time the host waits for it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mim3d.errors import Mim3dError

_NEVER = 2**62


class NonFiniteError(Mim3dError):
    """The loss or the gradient stopped being a number.

    Attributes:
        step: the first optimiser step at which it happened.
        terms: what was not finite then.
    """

    def __init__(self, step: int, terms: list[str], advice: str = "") -> None:
        what = "the gradient" if terms == ["grad_norm"] else " and ".join(terms)
        super().__init__(f"At step {step}, {what} became infinite or not a number.{advice}")
        self.step = step
        self.terms = terms


@dataclass
class _Window:
    """Sums of terms that were logged together since the last line."""

    sums: Tensor
    first_bad: Tensor
    count: int = 0


class Meter:
    """Averages terms over the steps between two lines of metrics.

    Args:
        device: where the terms live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._windows: dict[tuple[str, ...], _Window] = {}

    def add(self, step: int, terms: Mapping[str, Tensor]) -> None:
        """Add scalars of one micro-batch or step; does not wait for the device."""
        names = tuple(terms)
        scalars = [value.detach().reshape(()) for value in terms.values()]
        values = torch.stack([value.to(self._device, torch.float32, non_blocking=True) for value in scalars])
        window = self._windows.get(names)
        if window is None:
            window = self._windows[names] = self._new_window(torch.zeros_like(values))
        window.sums += values
        window.first_bad = torch.where(values.isfinite(), window.first_bad, window.first_bad.clamp(max=step))
        window.count += 1

    def read(self) -> dict[str, float]:
        """Means over all processes since the last reset; a collective call.

        Raises:
            NonFiniteError: when any process met a value that is not finite.
        """
        totals: dict[str, float] = {}
        counts: dict[str, int] = {}
        for rows in self.state():
            for row in rows:
                for name, total in zip(row["names"], row["sums"], strict=True):
                    totals[name] = totals.get(name, 0.0) + total
                    counts[name] = counts.get(name, 0) + row["count"]
        return {name: total / counts[name] for name, total in totals.items()}

    def reset(self) -> None:
        """Begin the next window."""
        self._windows.clear()

    def state(self) -> list[list[dict[str, Any]]]:
        """The unfinished window of every process, for a checkpoint; a collective call.

        Raises:
            NonFiniteError: when any process met a value that is not finite.
        """
        state = _gathered(self._rows())
        _refuse_non_finite([row for rows in state for row in rows])
        return state

    def restore(self, state: list[list[dict[str, Any]]], rank: int) -> None:
        """Go on with the window that :meth:`state` gave."""
        self._windows.clear()
        for row in state[rank] if rank < len(state) else []:
            window = self._new_window(torch.tensor(row["sums"], dtype=torch.float32, device=self._device))
            window.count = row["count"]
            self._windows[tuple(row["names"])] = window

    def _new_window(self, sums: Tensor) -> _Window:
        return _Window(sums, torch.full(sums.shape, _NEVER, dtype=torch.int64, device=self._device))

    def _rows(self) -> list[dict[str, Any]]:
        return [
            {
                "names": list(names),
                "sums": window.sums.tolist(),
                "first_bad": window.first_bad.tolist(),
                "count": window.count,
            }
            for names, window in self._windows.items()
        ]


def gradient_terms(norm: Tensor, precision: str) -> dict[str, Tensor]:
    """What to log of the gradient norm: half precision skips steps that overflow, by design."""
    if precision == "16-mixed":
        return {"skipped_ratio": 1.0 - norm.isfinite().float()}
    return {"grad_norm": norm}


def _gathered(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [rows]
    everybody: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybody, rows)
    return everybody


def _refuse_non_finite(rows: list[dict[str, Any]]) -> None:
    step = min((first for row in rows for first in row["first_bad"]), default=_NEVER)
    if step == _NEVER:
        return
    terms = dict.fromkeys(
        name for row in rows for name, first in zip(row["names"], row["first_bad"], strict=True) if first == step
    )
    # The total follows from its terms, and the gradient from the total: name what comes first.
    named = [name for name in terms if name not in ("loss", "grad_norm")]
    raise NonFiniteError(step, named or (["loss"] if "loss" in terms else list(terms)))


class Throughput:
    """Samples per second, and the share of the time that was spent waiting for data.

    Args:
        elapsed_s: training time of earlier sessions.
    """

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._start = time.monotonic() - elapsed_s
        self._window_start = time.monotonic()
        self._waited_s = 0.0
        self._samples = 0

    @property
    def elapsed_s(self) -> float:
        """Seconds of training, earlier sessions included."""
        return time.monotonic() - self._start

    def add_samples(self, number: int) -> None:
        """Count samples over all processes."""
        self._samples += number

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited_s += time.monotonic() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside (a validation, a checkpoint) out of the speed."""
        start = time.monotonic()
        yield
        self._window_start += time.monotonic() - start

    def read(self) -> dict[str, float]:
        """Speed since the last read."""
        now = time.monotonic()
        seconds = max(now - self._window_start, 1e-9)
        values = {
            "time_s": round(now - self._start, 3),
            "samples_per_s": round(self._samples / seconds, 4),
            "data_wait_ratio": round(min(self._waited_s / seconds, 1.0), 4),
        }
        self._window_start, self._waited_s, self._samples = now, 0.0, 0
        return values
