"""An exponential moving average of the weights: steadier than the last ones, validated and exported in their place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mim3d.core.errors import CheckpointError
from mim3d.training.optimisation import average_decay


class Average:
    """The average of every trained parameter over the steps (Polyak & Juditsky 1992; exponential, as in TensorFlow).

    Kept in float32, on the device of the parameters. Buffers are no weights: those of the last step count.

    Args:
        module: what is trained, once it is where it is trained: its parameters must not be replaced any more.
        decay: of the average, see ``average_decay``; 0 keeps none, and nothing here costs anything then.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad} if decay else {}
        self._names, self._weights = list(trained), list(trained.values())
        self._averages = [weight.detach().to(torch.float32, copy=True) for weight in self._weights]

    @property
    def size_bytes(self) -> int:
        """Bytes of the average."""
        return sum(average.numel() * average.element_size() for average in self._averages)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimiser step ``step`` (1 is the first); never waits for the device."""
        if self._averages:
            share = 1 - average_decay(self._decay, step)
            torch._foreach_lerp_(self._averages, [weight.float() for weight in self._weights], share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The average in the place of the weights; afterwards, whatever happens, the weights again, bit for bit."""
        if not self._averages:
            yield
            return
        kept = [weight.detach().clone() for weight in self._weights]
        try:
            self.take_place()
            yield
        finally:
            self._fill(kept)

    def take_place(self) -> None:
        """Replace the weights by the average, for good."""
        self._fill(self._averages)

    def state_dict(self) -> dict[str, Tensor]:
        """The average of every trained parameter by name."""
        return dict(zip(self._names, self._averages, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from an average.

        Raises:
            CheckpointError: when it is one of other parameters.
        """
        odd = sorted(state.keys() ^ set(self._names))
        if odd:
            raise CheckpointError(
                f"The checkpoint's average of the weights and the network differ in {len(odd)} parameters, such as "
                f"{odd[0]}; resume with the ema_decay the run was started with."
            )
        for name, average in self.state_dict().items():
            average.copy_(state[name])

    @torch.no_grad()
    def _fill(self, values: list[Tensor]) -> None:
        for weight, value in zip(self._weights, values, strict=True):
            weight.copy_(value)
