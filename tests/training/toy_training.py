"""A network of a few hundred weights with everything that makes resuming hard, and a script that trains it.

As a script, which tests kill: ``python toy_training.py OUT SETTINGS`` with SETTINGS a JSON object.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mim3d.backbones.contract import Backbone, Encoder
from mim3d.core.run_folder import Run
from mim3d.objective import Batch, Objective, StepOutput
from mim3d.training.launch import seed_step
from mim3d.training.loop import train
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings, TrainResult

FEATURES = 6


class ToyEncoder(Encoder):
    """Tokens of one voxel column each; enough to satisfy the contract."""

    def __init__(self, recipe: Backbone) -> None:
        super().__init__()
        self.recipe, self.strides, self.widths = recipe, (1,), (8,)
        self.proj = nn.Linear(FEATURES, 8)
        self.norm = nn.LayerNorm(8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.position_embedding = nn.Parameter(torch.full((4, 8), 0.1))

    def tokens(self, features: Tensor) -> Tensor:
        return self.norm(self.proj(features))

    def feature_maps(self, volume_BCXYZ: Tensor) -> list[Tensor]:
        return [self.proj(volume_BCXYZ)]


class ToyBackbone(Backbone):
    """Settings of the toy encoder."""

    encoder_class = ToyEncoder
    input_multiple = (1, 1, 1)


class ToyObjective(Objective):
    """Regression with dropout, an exponential moving average, and faults on demand.

    Args:
        dropout: share of hidden activations.
        bad_sample: first feature value at which the named term becomes infinite.
    """

    def __init__(self, dropout: float = 0.5, bad_sample: float | None = None) -> None:
        super().__init__()
        self.encoder = ToyEncoder(ToyBackbone())
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(8, 1)
        self.bad_sample = bad_sample
        self.register_buffer("average", torch.zeros(8, FEATURES))
        self.seen: list[float] = []

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        hidden = self.encoder.tokens(batch["x"]) + self.encoder.position_embedding[0]
        error = (self.head(self.drop(torch.tanh(hidden))) - batch["y"]).square().mean()
        penalty = 0.01 * self.head.weight.square().sum()
        if self.bad_sample is not None and bool((batch["number"] == self.bad_sample).any()):
            penalty = penalty * torch.inf
        if self.training:
            self.seen += batch["number"].tolist()
        return StepOutput(error + penalty, {"loss/error": error.detach(), "loss/penalty": penalty.detach()})

    def after_step(self, progress: float) -> None:
        self.average.lerp_(self.encoder.proj.weight, 0.1 + 0.1 * progress)

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        return {"toy/input": batch["x"][:, :, None], "toy/noise": torch.rand(2, 2, 2)}


class ToySource:
    """Sample ``i`` is a pure function of ``i``; micro-batches are dealt out to the processes in turn."""

    samples_per_epoch = 20

    def __init__(self, batch_size: int = 4, wait_s: float = 0.0) -> None:
        self.batch_size = batch_size
        self.wait_s = wait_s

    def batches(self, first_sample: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        start = first_sample + rank * self.batch_size
        while True:
            time.sleep(self.wait_s)
            samples = [self.sample(number) for number in range(start, start + self.batch_size)]
            yield {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
            start += world_size * self.batch_size

    def sample(self, number: int) -> Batch:
        x = torch.randn(FEATURES, generator=torch.Generator().manual_seed(number))
        return {"x": x, "y": x.sum(0, keepdim=True).sin(), "number": torch.tensor(float(number))}


def toy_score(objective: Objective) -> dict[str, float]:
    """Validation that draws random numbers, which must not leak into training."""
    torch.rand(7)
    batch = next(ToySource(16).batches(10_000))
    return {"dice": float(1 / (1 + objective(batch, 0.0).loss)), "other": 1.0}


OPTIM = Optimisation(learning_rate=0.01, weight_decay=0.1, warmup_steps=3, clip_norm=1.0)


def toy_run(out: Path, **settings: Any) -> tuple[TrainResult, ToyObjective, Run]:
    """Train the toy in ``out``; settings of the loop, and a few of the toy, by name."""
    toy = {name: settings.pop(name) for name in ("dropout", "bad_sample") if name in settings}
    source = ToySource(settings.pop("batch_size", 4), settings.pop("wait_s", 0.0))
    resume, optim = settings.pop("resume", True), settings.pop("optim", OPTIM)
    hooks = {name: settings.pop(name) for name in ("on_checkpoint",) if name in settings}
    if settings.pop("validating", True):
        hooks |= {"validate": toy_score, "best_by": "dice"}
    kept = {"seed": 0, "toy": toy}
    run = Run.create(out, command="pretrain", settings=kept, inputs={"data": "1234"}, resume=resume)
    seed_step(0, 0)
    objective = ToyObjective(**toy)
    loop = LoopSettings(**{"max_steps": 12, "accelerator": "cpu", **settings})
    result = train(objective, source, run=run, loop=loop, optim=optim, **hooks)
    return result, objective, run


def comparable(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of metrics without what depends on the clock."""
    clock = ("time_s", "samples_per_s", "data_wait_ratio", "memory_bytes")
    return [{name: value for name, value in line.items() if name not in clock} for line in metrics]


if __name__ == "__main__":
    outcome, trained, folder = toy_run(Path(sys.argv[1]), **json.loads(sys.argv[2]))
    if folder.writes:
        torch.save(trained.state_dict(), Path(sys.argv[1]) / "final.pt")
        print(json.dumps({"step": outcome.step, "finished": outcome.finished, "seen": trained.seen}))
