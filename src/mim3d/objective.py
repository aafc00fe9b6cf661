"""The one contract between learning and engine: a module that maps a batch to a loss and named logs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from mim3d.backbones.base import Encoder

Batch = dict[str, Tensor]


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
