"""A network of which some batches leave parts out, and a script that trains it.

As a script: ``python uneven_training.py OUT SETTINGS`` with SETTINGS a JSON object.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim3d.core.run_folder import Run
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.training.launch import seed_step
from mim3d.training.loop import train
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from tests.training.toy_training import ToyBackbone, ToyEncoder, ToySource


class Block(nn.Module):
    """A residual layer with a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class UnevenObjective(Objective):
    """Regression through two blocks.

    Args:
        sometimes: whether a further layer takes part in one micro-batch of four, and in none of every other step.
    """

    def __init__(self, sometimes: bool = True) -> None:
        super().__init__()
        self.encoder = ToyEncoder(ToyBackbone())
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.extra = nn.Linear(8, 8)
        self.never = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(8, 1)
        self.sometimes = sometimes
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        hidden = self.encoder.tokens(batch["x"])
        for block in self.blocks:
            hidden = block(hidden)
        if not self.sometimes or int(batch["number"][0]) % 16 == 2:
            hidden = hidden + self.extra(hidden)
        error = (self.scale * self.head(hidden) - batch["y"]).square().mean()
        return StepOutput(error, {"loss/error": error.detach()})

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"uneven/input": self.encoder.tokens(batch["x"])[:, :, None]}


def uneven_run(out: Path, *, sometimes: bool = True, batch_size: int = 2, **settings: Any) -> UnevenObjective:
    """Train in ``out`` and give back what was trained."""
    run = Run.create(out, command="pretrain", settings={"seed": 0}, inputs={"data": "1234"}, resume=True)
    seed_step(0, 0)
    objective = UnevenObjective(sometimes)
    loop = LoopSettings(**{"max_steps": 6, "accelerator": "cpu", "log_every": 1, "checkpoint_every": 3, **settings})
    optim = Optimisation(learning_rate=0.01, weight_decay=0.1, clip_norm=1.0)
    train(
        objective,
        ToySource(batch_size),
        run=run,
        loop=loop,
        optim=optim,
        validate=lambda trained: {"score": float(-trained(next(ToySource(16).batches(10_000)), 0.0).loss)},
        best_by="score",
    )
    return objective


if __name__ == "__main__":
    trained = uneven_run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    torch.save(trained.state_dict(), Path(sys.argv[1]) / f"final_{os.environ.get('LOCAL_RANK', '0')}.pt")
