"""Means of the logged terms, kept on the device: reading them is the only time the host waits for it."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim3d.training.bad_steps import BadSteps

#: Values of a window that wait on the device to be summed; beyond, the host waits for the device once.
_MOST_WAITING = 4096


@dataclass
class _Window:
    """Terms that were logged together since the last line.

    Attributes:
        sums: of the finite values, float32, by term.
        counts: how many those are.
        once: whether they are added once in a step, not with every micro-batch.
        waiting: step and values, still on the device, which are not in the sums yet.
    """

    sums: np.ndarray
    counts: np.ndarray
    once: bool
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)


class Meter:
    """Averages terms over the steps between two lines of metrics.

    Args:
        device: where the terms live.
        bad_steps: is told of steps with terms that are not finite; those are left out of the means.
    """

    def __init__(self, device: torch.device, bad_steps: BadSteps | None = None) -> None:
        self._device = device
        self._windows: dict[tuple[str, ...], _Window] = {}
        self.bad_steps = bad_steps or BadSteps()
        self._found: dict[int, list[str]] = {}

    def add(self, step: int, terms: Mapping[str, Tensor], *, once: bool = False) -> None:
        """Add scalars of one micro-batch or, ``once``, of one step; does not wait for the device."""
        names = tuple(terms)
        scalars = [value.detach().reshape(()) for value in terms.values()]
        values = torch.stack([value.to(self._device, torch.float32, non_blocking=True) for value in scalars])
        window = self._windows.get(names)
        if window is None:
            window = self._windows[names] = _new_window(len(names), once)
        if len(window.waiting) >= _MOST_WAITING:
            self._sum(names, window)
        window.waiting.append((step, values))

    def forget(self, step: int) -> None:
        """Leave out what was added for a step that was not finished."""
        for window in self._windows.values():
            window.waiting = [(at, values) for at, values in window.waiting if at != step]

    def read(self) -> dict[str, float]:
        """Means over all processes since the last reset; a collective call.

        A term that was never finite is not a number.

        Raises:
            NonFiniteError: when a step had a value that is not finite, and none may.
        """
        totals: dict[str, float] = {}
        counts: dict[str, float] = {}
        for rows in self.state():
            for row in rows:
                for name, total, count in zip(row["names"], row["sums"], row["counts"], strict=True):
                    totals[name] = totals.get(name, 0.0) + total
                    counts[name] = counts.get(name, 0.0) + count
        return {name: total / counts[name] if counts[name] else math.nan for name, total in totals.items()}

    def reset(self) -> None:
        """Begin the next window."""
        self._windows.clear()

    def state(self) -> list[list[dict[str, Any]]]:
        """The unfinished window of every process, for a checkpoint; a collective call.

        Raises:
            NonFiniteError: when a step had a value that is not finite, and none may.
        """
        return self._noted(_gathered((self.own_state(), self._found)))

    def state_alone(self) -> list[list[dict[str, Any]]]:
        """As :meth:`state`, of this process alone, when others may never come.

        Raises:
            NonFiniteError: when a step had a value that is not finite, and none may.
        """
        return self._noted([(self.own_state(), self._found)])

    def _noted(self, everybody: list[Any]) -> list[list[dict[str, Any]]]:
        """The windows of some processes, once what they found is noted."""
        self._found = {}
        found: dict[int, list[str]] = {}
        for _, of_one in everybody:
            for step, names in of_one.items():
                found.setdefault(step, []).extend(names)
        self.bad_steps.add(found)
        return [rows for rows, _ in everybody]

    def own_state(self) -> list[dict[str, Any]]:
        """The unfinished window of this process alone."""
        for names, window in self._windows.items():
            self._sum(names, window)
        return [
            {"names": list(names), "sums": window.sums.tolist(), "counts": window.counts.tolist(), "once": window.once}
            for names, window in self._windows.items()
        ]

    def restore(
        self, state: list[list[dict[str, Any]]], rank: int, world_size: int = 1, micro_batches: float = 1.0
    ) -> None:
        """Go on with the window that :meth:`state` gave.

        Where it was that of more processes, each takes over the windows of several; of fewer, some begin empty. Either
        way a step counts for as much as those to come.

        Args:
            state: of the processes then.
            rank: of this process.
            world_size: number of processes now.
            micro_batches: of a step in a process now, relative to then.
        """
        self._windows.clear()
        processes = world_size / max(len(state), 1)
        for row in (row for rows in state[rank::world_size] for row in rows):
            window = self._windows.setdefault(tuple(row["names"]), _new_window(len(row["names"]), row["once"]))
            share = processes if row["once"] else processes * micro_batches
            window.sums += np.array(row["sums"], np.float32) * np.float32(share)
            window.counts += np.array(row["counts"]) * share

    def _sum(self, names: tuple[str, ...], window: _Window) -> None:
        """Bring the waiting values into the sums, one by one, as a sum kept on the device would be."""
        if not window.waiting:
            return
        steps, tensors = zip(*window.waiting, strict=True)
        window.waiting = []
        for step, values in zip(steps, torch.stack(tensors).cpu().numpy(), strict=True):
            finite = np.isfinite(values)
            window.sums += np.where(finite, values, np.float32(0))
            window.counts += finite
            if not finite.all():
                bad = [name for name, good in zip(names, finite, strict=True) if not good]
                self._found.setdefault(step, []).extend(bad)


def _new_window(num_terms: int, once: bool) -> _Window:
    return _Window(np.zeros(num_terms, np.float32), np.zeros(num_terms), once)


def gradient_terms(norm: Tensor, precision: str) -> dict[str, Tensor]:
    """What to log of the gradient norm: half precision skips steps that overflow, by design."""
    if precision == "16-mixed":
        return {"skipped_ratio": 1.0 - norm.isfinite().float()}
    return {"grad_norm": norm}


def _gathered(own: Any) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    everybody: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everybody, own)
    return everybody


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
