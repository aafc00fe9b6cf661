"""Which part of an encoder learns: all of it, none, or more and more of it from its output down to the stem."""

import math
from typing import Self

import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Encoder
from mim3d.core.errors import BothSetError, ConfigError
from mim3d.objective import Objective


def check_freezing(freeze_encoder: bool, unfreeze_ratio: float | None) -> None:
    """Refuse settings that cannot work.

    Raises:
        ConfigError: The ratio is out of range, or the encoder stays frozen all the same.
    """
    if unfreeze_ratio is None:
        return
    if not 0 < unfreeze_ratio <= 1:
        raise ConfigError(f"unfreeze_ratio is {unfreeze_ratio}; it must be above 0 and at most 1, such as 0.3.")
    if freeze_encoder:
        raise BothSetError("freeze_encoder", "unfreeze_ratio")


def freezing_lines(freeze_encoder: bool, unfreeze_ratio: float | None, learns: str) -> list[str]:
    """Return what is printed before training; nothing where the whole encoder learns from the beginning.

    Args:
        freeze_encoder: Whether the encoder never learns.
        unfreeze_ratio: Share of training after which all of it does.
        learns: What learns beside it, with its verb.
    """
    if freeze_encoder:
        return [f"the encoder is frozen: {learns} trained"]
    if unfreeze_ratio is not None:
        return [
            f"the encoder is frozen at first: its layers begin to learn one after the other, from its output down to "
            f"the stem, until all learn after {unfreeze_ratio:.0%} of training"
        ]
    return []


class FreezingObjective(Objective):
    """An objective whose encoder may learn later than what is built on it, or never.

    Layers that do not learn have no gradients and are in evaluation mode. A parameter without a gradient is left alone
    by the optimiser, its weight decay included.

    Args:
        encoder: Gives the feature maps. Which of its parameters learn is set again whenever that changes.
        freeze_encoder: Whether no layer ever learns.
        unfreeze_ratio: Share of training after which all layers learn, one after the other until then, the output first
            and the stem last (gradual unfreezing, Howard & Ruder 2018). None lets all learn from the beginning, but for
            the steps in which the schedule keeps the encoder frozen (:attr:`StepContext.encoder_frozen`).
    """

    def __init__(self, encoder: Encoder, *, freeze_encoder: bool = False, unfreeze_ratio: float | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self._unfreeze_ratio = unfreeze_ratio
        # What never asks for gradients, such as fixed positions, must not begin to.
        self._fixed = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
        # Before training every layer counts as learning that ever will, so that optimiser and processes know of it.
        self._num_learning = self._most_learning = 0 if freeze_encoder else encoder.num_layers + 1
        if freeze_encoder:
            self._let_learn(0)

    def unfreeze(self, progress: float) -> None:
        """Let those layers learn that do at ``progress`` (0 at the first step of training, 1 at the last)."""
        if not self.training:
            return
        learning = 0 if self.context.encoder_frozen else self._most_learning
        if self._unfreeze_ratio is not None:
            layers = self.encoder.num_layers + 1
            # Rounded first: 0.6 / 0.8 of four layers are three, not 2.9999999999999996.
            learning = min(learning, math.floor(round(progress / self._unfreeze_ratio * layers, 9)))
        if learning != self._num_learning:
            self._let_learn(learning)

    def _let_learn(self, number: int) -> None:
        """Let the uppermost layers learn, that many of them."""
        self._num_learning = number
        lowest = self.encoder.num_layers + 1 - number
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(name not in self._fixed and self.encoder.layer_of(name) >= lowest)
        _set_modes(self.encoder, learns=number > 0)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; what of the encoder is frozen stays in evaluation mode."""
        super().train(mode)
        if mode:
            _set_modes(self.encoder, learns=self._num_learning > 0)
        return self

    def features(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        """Return the encoder's maps; without gradients where all of it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._num_learning > 0):
            return self.encoder.feature_maps(volume_BCXYZ)


def _set_modes(module: nn.Module, *, learns: bool) -> None:
    """Training mode where a parameter of the module learns; what has none goes with the module around it."""
    parameters = list(module.parameters())
    module.training = any(parameter.requires_grad for parameter in parameters) if parameters else learns
    for child in module.children():
        _set_modes(child, learns=module.training)
