"""What is known of the steps of a run: means of what they log, those that went wrong, and the speed.

Logged terms are kept on the device: reading their means is the only time that the host waits for it. A few steps that
go wrong are skipped with a warning, more of them end the run.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.core.names import number_of
from mim3d.core.resources import in_words

#: Values of a window that wait on the device to be summed; beyond, the host waits for the device once.
_MOST_WAITING = 4096

#: Where one of these is not finite, so is the gradient, and the step was skipped.
_DECIDING = ("loss", "grad_norm")


class NonFiniteError(Mim3dError):
    """The loss or the gradient stopped being a number.

    Args:
        step: The optimiser step at which it happened.
        terms: Names of what was not finite then.
        advice: What to do, for the end of the message.
    """

    def __init__(self, step: int, terms: Sequence[str], advice: str = "") -> None:
        super().__init__(f"At step {step}, {_in_words(terms)} became infinite or not a number.{advice}")
        self.step = step
        self.terms = list(terms)


class BadSteps:
    """The steps of a whole run that were skipped or taken twice.

    Args:
        limit: How many steps may go wrong. 0 ends the run at the first.
        report: Called with one sentence for each bad step.
    Attributes:
        beyond: Error for the first step beyond a limit above 0, with the weights of the good steps. None within it.
    """

    def __init__(self, limit: int = 0, report: Callable[[str], None] = lambda sentence: None) -> None:
        self._limit = limit
        self._report = report
        self._skipped: dict[int, list[str]] = {}
        self._retried: list[int] = []
        self.beyond: NonFiniteError | None = None

    @property
    def num_bad(self) -> int:
        """Number of steps that were skipped or taken twice."""
        return len(self._skipped) + len(self._retried)

    @property
    def num_skipped(self) -> int:
        """Number of steps with something that was not finite."""
        return len(self._skipped)

    def add(self, found: Mapping[int, Sequence[str]]) -> None:
        """Take note of steps at which terms were not finite. Steps that are known already are ignored.

        A limit above 0 that is passed is only noted, see :meth:`require_within_limit`: what is due after the step is
        done first, so that a run which goes on with a higher limit lacks nothing.

        Args:
            found: Names of all that was not finite, by step.
        Raises:
            NonFiniteError: The limit is 0. The error is for the first step, and is raised once all steps are noted.
        """
        at_once: NonFiniteError | None = None
        for step in sorted(found.keys() - self._skipped.keys()):
            # What came first: the total follows from its terms, and the gradient from the total.
            terms = [name for name in dict.fromkeys(found[step]) if name not in _DECIDING]
            terms = terms or (["loss"] if "loss" in found[step] else list(dict.fromkeys(found[step])))
            self._skipped[step] = terms
            if self._limit == 0:
                at_once = at_once or NonFiniteError(step, terms)
            elif self.num_bad > self._limit:
                self.beyond = self.beyond or NonFiniteError(step, terms)
            else:
                fate = "was skipped" if set(_DECIDING) & set(found[step]) else "does not depend on it and was taken"
                self._report(
                    f"warning: at step {step}, {_in_words(terms)} became infinite or not a number; the step {fate} "
                    f"({self.num_bad} of at most {self._limit} bad steps)"
                )
        if at_once is not None:
            raise at_once

    def require_within_limit(self) -> None:
        """Stop a run that has passed its limit.

        Raises:
            NonFiniteError: The limit is passed. The error is for the first step beyond it.
        """
        if self.beyond is not None:
            raise self.beyond

    def may_retry(self, step: int) -> bool:
        """Whether a step that ran out of memory may be taken once more. If so, it is counted."""
        if self.num_bad >= self._limit:
            return False
        self._retried.append(step)
        self._report(
            f"warning: step {step} ran out of memory and is taken once more ({self.num_bad} of at most {self._limit} "
            "bad steps)"
        )
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {"skipped": {step: list(terms) for step, terms in self._skipped.items()}, "retried": list(self._retried)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`.

        Raises:
            ConfigError: More steps have gone wrong already than may.
        """
        self._skipped = {int(step): list(terms) for step, terms in state["skipped"].items()}
        self._retried = list(state["retried"])
        if self.num_bad > self._limit:
            raise ConfigError(
                f"max_bad_steps is {self._limit}, but {number_of(self.num_bad, 'step', 'have')} gone wrong in this run "
                f"already; go on with --max_bad_steps {self.num_bad} or more."
            )


def spread_non_finite(loss: Tensor) -> Tensor:
    """The same loss to the bit, with a gradient that is not a number where the loss is not finite.

    Summed over the processes the gradient then shows it to each of them, and all of them skip the step.
    """
    value = loss.detach()
    return loss * (value - value + 1.0)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let the coming fused step leave weights, moments and step counts alone if the gradient's norm is not finite.

    This is decided on the device, without waiting for it. An optimiser that is not fused belongs to a gradient scaler,
    which does the same.
    """
    # Fabric's wrapper would keep what is set on it to itself.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if inner.param_groups[0].get("fused"):
        inner.found_inf = norm.detach().isfinite().logical_not().float().reshape(())


def _in_words(terms: Sequence[str]) -> str:
    return "the gradient" if list(terms) == ["grad_norm"] else " and ".join(terms)


@dataclass
class _Window:
    """Terms that were logged together since the last line.

    Attributes:
        sums: Sum of the finite values of each term, float32.
        counts: Number of the finite values of each term.
        once: Whether the terms are added once in a step, not with every micro-batch.
        waiting: Step and values that are still on the device, and not in the sums yet.
    """

    sums: np.ndarray
    counts: np.ndarray
    once: bool
    waiting: list[tuple[int, Tensor]] = field(default_factory=list)


class Meter:
    """Averages terms over the steps between two lines of metrics.

    Args:
        device: Device of the terms.
        bad_steps: Takes note of steps with terms that are not finite. Those are left out of the means.
    """

    def __init__(self, device: torch.device, bad_steps: BadSteps | None = None) -> None:
        self._device = device
        self._windows: dict[tuple[str, ...], _Window] = {}
        self._bad_steps = bad_steps or BadSteps()
        self._found: dict[int, list[str]] = {}

    def add(self, step: int, terms: Mapping[str, Tensor], *, once: bool = False) -> None:
        """Add scalars of one micro-batch or, with ``once``, of one step. Does not wait for the device."""
        names = tuple(terms)
        scalars = [value.detach().reshape(()) for value in terms.values()]
        values = torch.stack([value.to(self._device, torch.float32, non_blocking=True) for value in scalars])
        window = self._window(names, once)
        if len(window.waiting) >= _MOST_WAITING:
            self._sum(names, window)
        window.waiting.append((step, values))

    def forget(self, step: int) -> None:
        """Leave out what was added for a step that was not finished."""
        for window in self._windows.values():
            window.waiting = [(at, values) for at, values in window.waiting if at != step]

    def read(self) -> dict[str, float]:
        """Compute the means over all processes since the last reset. A collective call.

        Returns:
            The mean of each term by name. A term that was never finite is not a number.
        Raises:
            NonFiniteError: A step had a value that is not finite, and no step may be skipped.
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

    def state(self, *, alone: bool = False) -> list[list[dict[str, Any]]]:
        """The unfinished window of every process, for a checkpoint. A collective call unless ``alone``.

        Args:
            alone: Whether to give the window of this process alone, where the others may never come.
        Raises:
            NonFiniteError: A step had a value that is not finite, and no step may be skipped.
        """
        for names, window in self._windows.items():
            self._sum(names, window)
        rows = [
            {"names": list(names), "sums": window.sums.tolist(), "counts": window.counts.tolist(), "once": window.once}
            for names, window in self._windows.items()
        ]
        everybody: list[Any] = [(rows, self._found)]
        if not alone and torch.distributed.is_available() and torch.distributed.is_initialized():
            everybody = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(everybody, (rows, self._found))
        self._found = {}
        found: dict[int, list[str]] = {}
        for _, found_by_one in everybody:
            for step, names_of_step in found_by_one.items():
                found.setdefault(step, []).extend(names_of_step)
        self._bad_steps.add(found)
        return [rows_of_one for rows_of_one, _ in everybody]

    def restore(
        self, state: list[list[dict[str, Any]]], rank: int, world_size: int = 1, micro_batches: float = 1.0
    ) -> None:
        """Go on with the window that :meth:`state` gave.

        Where it was the window of more processes, each takes over those of several; of fewer, some begin empty. Either
        way a step counts for as much as those to come.

        Args:
            state: Windows of all processes at that time.
            rank: Number of this process.
            world_size: Number of processes now.
            micro_batches: Micro-batches of a step in a process now, relative to that time.
        """
        self._windows.clear()
        processes = world_size / max(len(state), 1)
        for row in (row for rows in state[rank::world_size] for row in rows):
            window = self._window(tuple(row["names"]), row["once"])
            share = processes if row["once"] else processes * micro_batches
            window.sums += np.array(row["sums"], np.float32) * np.float32(share)
            window.counts += np.array(row["counts"]) * share

    def _window(self, names: tuple[str, ...], once: bool) -> _Window:
        if names not in self._windows:
            self._windows[names] = _Window(np.zeros(len(names), np.float32), np.zeros(len(names)), once)
        return self._windows[names]

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


def gradient_terms(norm: Tensor, precision: str) -> dict[str, Tensor]:
    """What to log of the gradient norm. Half precision skips steps that overflow, by design."""
    if precision == "16-mixed":
        return {"skipped_ratio": 1.0 - norm.isfinite().float()}
    return {"grad_norm": norm}


class Throughput:
    """Samples per second, and the share of the time that was spent waiting for data.

    Args:
        elapsed_s: Training time of earlier sessions.
    """

    def __init__(self, elapsed_s: float = 0.0) -> None:
        self._start = time.monotonic() - elapsed_s
        self._window_start = time.monotonic()
        self._paused_s = elapsed_s
        self._waited_s = 0.0
        self._samples = 0

    @property
    def stepping_s(self) -> float:
        """Seconds of this session that were spent on steps: pauses are left out."""
        return self.elapsed_s - self._paused_s

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
        passed = time.monotonic() - start
        self._window_start += passed
        self._paused_s += passed

    def read(self) -> dict[str, float]:
        """The speed since the last read, as it is logged."""
        now = time.monotonic()
        seconds = max(now - self._window_start, 1e-9)
        values = {
            "time_s": round(now - self._start, 3),
            "samples_per_s": round(self._samples / seconds, 4),
            "data_wait_ratio": round(min(self._waited_s / seconds, 1.0), 4),
        }
        self._window_start, self._waited_s, self._samples = now, 0.0, 0
        return values


def summary(values: Mapping[str, float]) -> str:
    """One line of metrics for people: loss, learning rate, speed, waiting for data and, where known, memory held."""
    memory = values.get("memory_bytes")
    return (
        f"loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"{values['samples_per_s']:.3g} samples/s  {values['data_wait_ratio']:.0%} waiting for data"
        + ("" if memory is None else f"  {in_words(int(memory))} held")
    )
