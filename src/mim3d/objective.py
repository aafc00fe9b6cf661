"""The one contract between learning and engine: a module that maps a batch to a loss and named logs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from mim3d.backbones.contract import Encoder
from mim3d.core.types import Triple
from mim3d.nn.patches import token_grid

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Tokens:
    """Tokens of one kind of volume in a sample.

    Attributes:
        name: of the kind: a level of a hierarchy, ``crop``.
        num_volumes: volumes of this kind in one sample.
        visible: tokens of each that the encoder is shown.
        hidden: tokens of each that are to be predicted.
    """

    name: str
    num_volumes: int
    visible: int
    hidden: int = 0


def crop_tokens(size: Triple, token_size: Triple) -> tuple[Tokens, ...]:
    """Tokens of ``token_size`` voxels in a sample that is one crop of ``size`` voxels, all of it shown."""
    return (Tokens("crop", 1, math.prod(token_grid(size, token_size))),)


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives the loop.

    Attributes:
        loss: scalar to be minimised.
        logs: detached scalars by name (``loss/coarse``); the loop averages them.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """What the loop trains; ``encoder`` is what export takes away."""

    encoder: Encoder

    #: Tokens of one sample by kind of volume, to be told before training; empty where nobody counted them.
    tokens_per_sample: tuple[Tokens, ...] = ()

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Map a batch to its loss; ``progress`` runs from 0 at the first step to 1 at the last."""

    def after_step(self, progress: float) -> None:
        """Update what is not trained by gradient (moving averages, queues); nothing by default."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Volumes ``(X, Y, Z)`` worth looking at, by name (``coarse/reconstructed``); none by default.

        Apart from ``forward`` so that a training step never pays for them.
        """
        return {}
