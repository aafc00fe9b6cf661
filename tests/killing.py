"""Training that is ended in the middle, as by Ctrl-C."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mim3d.objective import Objective


@contextmanager
def killed_after(objective: type[Objective], steps: int) -> Iterator[None]:
    """Let the training of an objective end with a KeyboardInterrupt once so many of its steps are done; it must."""
    after_step, calls = objective.after_step, []

    def killed(self: Objective, progress: float) -> None:
        after_step(self, progress)
        calls.append(progress)
        if len(calls) == steps:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(objective, "after_step", killed)
        yield
