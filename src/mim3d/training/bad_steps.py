"""Steps that went wrong: a few of them in a run are skipped with a warning, more of them end it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mim3d.core.errors import ConfigError, Mim3dError

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


class BudgetSpentError(NonFiniteError):
    """More steps went wrong than may. The weights are those of the good steps."""


class BadSteps:
    """The steps of a whole run that were skipped or taken twice.

    Args:
        limit: How many steps may go wrong. 0 ends the run at the first.
        report: Called with one sentence for each bad step.
    Attributes:
        beyond: Error for the first step beyond a limit above 0. None within the limit.
    """

    def __init__(self, limit: int = 0, report: Callable[[str], None] = lambda sentence: None) -> None:
        self._limit = limit
        self._report = report
        self._skipped: dict[int, list[str]] = {}
        self._retried: list[int] = []
        self.beyond: BudgetSpentError | None = None

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
                self.beyond = self.beyond or BudgetSpentError(step, terms)
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
            BudgetSpentError: The limit is passed. The error is for the first step beyond it.
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
                f"max_bad_steps is {self._limit}, but {self.num_bad} steps of this run have gone wrong already; go on "
                f"with --max_bad_steps {self.num_bad} or more."
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
