"""The one contract between learning and the training loop: a module that maps a batch to a loss and named logs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Encoder
from mim3d.core.types import Triple
from mim3d.nn.volumes import token_grid

Batch = dict[str, Tensor]

#: Keeps the numbers of a context apart from those of the global generators, which follow from seed, step and process.
_CONTEXT_STREAM = 1


@dataclass(frozen=True)
class Tokens:
    """Tokens of one kind of volume in a sample.

    Attributes:
        name: Name of the kind: a level of a hierarchy, or ``crop``.
        num_volumes: Volumes of this kind in one sample.
        visible: Tokens of each volume that the encoder is shown.
        hidden: Tokens of each volume that are to be predicted.
    """

    name: str
    num_volumes: int
    visible: int
    hidden: int = 0


def crop_tokens(size: Triple, token_size: Triple) -> tuple[Tokens, ...]:
    """Tokens of ``token_size`` voxels in a sample that is one crop of ``size`` voxels, all of it shown."""
    return (Tokens("crop", 1, math.prod(token_grid(size, token_size))),)


@dataclass(frozen=True)
class StepContext:
    """Which micro-batch of a run an objective sees.

    Attributes:
        seed: Seed of the run.
        step: Number of the optimiser step, from 1.
        rank: Number of the process, from 0.
        micro_batch: Number of the micro-batch within the step and process, from 0.
        encoder_frozen: Whether the schedule lets only what is built on the encoder learn in this step.
    """

    seed: int = 0
    step: int = 0
    rank: int = 0
    micro_batch: int = 0
    encoder_frozen: bool = False

    def generator(self, device: torch.device) -> torch.Generator:
        """A generator on ``device`` for what an objective draws: views, masks, noise.

        What it gives is a function of the context alone: the same when a step is repeated or a run resumed. Every call
        begins anew, so an objective asks for it once in ``forward`` and hands it on.
        """
        words = (self.seed, self.step, self.rank, self.micro_batch)
        (state,) = np.random.SeedSequence(words, spawn_key=(_CONTEXT_STREAM,)).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(state))


@dataclass(frozen=True)
class StepOutput:
    """What one micro-batch gives the loop.

    Attributes:
        loss: Scalar to be minimised.
        logs: Detached scalars by name (``loss/coarse``), which the loop averages.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module, ABC):
    """What the loop trains.

    Everything it holds as parameters and buffers is in the checkpoint. Parameters that ask for no gradient, such as
    those of a momentum teacher, are not trained; :meth:`after_step` changes them.

    Attributes:
        encoder: The network that export takes away.
        tokens_per_sample: Tokens of one sample by kind of volume, printed before training; empty where nobody counted.
        context: Which micro-batch is at hand, set by the loop before ``forward``.
    """

    encoder: Encoder
    tokens_per_sample: tuple[Tokens, ...] = ()
    context: StepContext = StepContext()

    @abstractmethod
    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Map a batch to its loss.

        Views of a batch are made here, on its device, with a generator of ``self.context``.

        Args:
            batch: Tensors by name, on the device.
            progress: Share of training that is done: 0 at the first step, 1 at the last.
        """

    def after_weights(self) -> None:
        """Learn that the encoder was filled with weights, as a teacher does that begins alike; nothing by default."""

    def after_step(self, progress: float) -> None:
        """Update what is not trained by gradient, such as a momentum teacher or a queue; nothing by default.

        Called without gradients after every optimiser step, in every process with the same weights.
        """

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Volumes ``(X, Y, Z)`` worth looking at, by name (``coarse/reconstructed``); none by default.

        It is no part of ``forward``, so that a training step never pays for it.
        """
        return {}
