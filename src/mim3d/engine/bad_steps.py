"""Steps that went wrong: a few in a run are passed over and told of, more of them end it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mim3d.errors import Mim3dError

#: Where one of these is not finite, so is the gradient, and the step was skipped.
_DECIDING = ("loss", "grad_norm")


class NonFiniteError(Mim3dError):
    """The loss or the gradient stopped being a number.

    Attributes:
        step: the optimiser step at which it happened.
        terms: what was not finite then.
    """

    def __init__(self, step: int, terms: Sequence[str], advice: str = "") -> None:
        super().__init__(f"At step {step}, {_in_words(terms)} became infinite or not a number.{advice}")
        self.step = step
        self.terms = list(terms)


class BudgetSpentError(NonFiniteError):
    """More steps went wrong than may be passed over; the weights are those of the good ones."""


class BadSteps:
    """The steps of a whole run that were skipped or taken twice.

    Args:
        limit: how many may be; 0 stops at the first.
        tell: told one sentence of each.
    """

    def __init__(self, limit: int = 0, tell: Callable[[str], None] = lambda sentence: None) -> None:
        self._limit = limit
        self._tell = tell
        self._skipped: dict[int, list[str]] = {}
        self._retried: list[int] = []

    @property
    def num_skipped(self) -> int:
        """Steps with something that was not finite."""
        return len(self._skipped)

    def add(self, found: Mapping[int, Sequence[str]]) -> None:
        """Take note of steps at which terms were not finite; those already known are passed over.

        Args:
            found: step -> all that was not finite.
        Raises:
            NonFiniteError: for the first step beyond the limit, once all of them are noted.
        """
        fresh = sorted(found.keys() - self._skipped.keys())
        beyond: NonFiniteError | None = None
        for step in fresh:
            terms = _causes(found[step])
            self._skipped[step] = terms
            if self._spent > self._limit:
                kind = BudgetSpentError if self._limit else NonFiniteError
                beyond = beyond or kind(step, terms)
            else:
                fate = "was skipped" if set(_DECIDING) & set(found[step]) else "does not depend on it and was taken"
                self._tell(
                    f"warning: at step {step}, {_in_words(terms)} became infinite or not a number; the step {fate} "
                    f"({self._spent} of at most {self._limit} bad steps)"
                )
        if beyond is not None:
            raise beyond

    def may_retry(self, step: int) -> bool:
        """Whether a step that ran out of memory may be taken once more; then it is counted."""
        if self._spent >= self._limit:
            return False
        self._retried.append(step)
        self._tell(
            f"warning: step {step} ran out of memory and is taken once more ({self._spent} of at most {self._limit} "
            "bad steps)"
        )
        return True

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": {step: list(terms) for step, terms in self._skipped.items()}, "retried": list(self._retried)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self._skipped = {int(step): list(terms) for step, terms in state["skipped"].items()}
        self._retried = list(state["retried"])

    @property
    def _spent(self) -> int:
        return len(self._skipped) + len(self._retried)


def with_gradient_of_its_kind(loss: Tensor) -> Tensor:
    """The same loss to the bit; its gradient is not a number where the loss is not finite.

    Summed over the processes the gradient then tells each of them, and no process goes another way than the others.
    """
    value = loss.detach()
    return loss * (value - value + 1.0)


def skip_if_not_finite(optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
    """Let the coming fused step leave weights, moments and step counts alone if the gradient's norm is not finite.

    Decided on the device, without waiting for it. An optimiser that is not fused belongs to a gradient scaler, which
    does the same.
    """
    # Fabric's wrapper would keep what is set on it to itself.
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    if inner.param_groups[0].get("fused"):
        inner.found_inf = norm.detach().isfinite().logical_not().float().reshape(())


def _causes(terms: Sequence[str]) -> list[str]:
    """What came first: the total follows from its terms, and the gradient from the total."""
    named = [name for name in dict.fromkeys(terms) if name not in _DECIDING]
    return named or (["loss"] if "loss" in terms else list(dict.fromkeys(terms)))


def _in_words(terms: Sequence[str]) -> str:
    return "the gradient" if list(terms) == ["grad_norm"] else " and ".join(terms)
