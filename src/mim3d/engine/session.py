"""A run in progress: what the loop does between steps, and the state that a checkpoint carries."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch
from torch import Tensor

from mim3d.engine.checkpoint import Checkpoints, read_checkpoint, restore_weights
from mim3d.engine.memory import peak_bytes
from mim3d.engine.meter import Meter, NonFiniteError, Throughput
from mim3d.engine.plan import Plan
from mim3d.engine.progress import Display
from mim3d.engine.settings import LoopSettings, RunFolder
from mim3d.errors import CheckpointError, ConfigError, Mim3dError
from mim3d.objective import Batch, Objective
from mim3d.progress import clock
from mim3d.resources import in_words

Validate = Callable[[Objective], dict[str, float]]
OnCheckpoint = Callable[[Objective, int], None]


@dataclass(frozen=True)
class Hooks:
    """What the caller of the loop wants done on the way.

    Raises:
        ConfigError: when the best is to be kept, but nothing is validated.
    """

    validate: Validate | None = None
    best_by: str | None = None
    on_checkpoint: OnCheckpoint | None = None

    def __post_init__(self) -> None:
        if self.best_by is not None and self.validate is None:
            raise ConfigError(f"best_by is '{self.best_by}', but there is no validation; leave it out.")


@dataclass
class Session:
    """One process's part in a run; everything here happens between two steps.

    Attributes:
        best: step and values of the best validation so far.
        speed: clock of this session and those before it.
    """

    fabric: lightning_fabric.Fabric
    objective: Objective
    optimizer: torch.optim.Optimizer
    plan: Plan
    loop: LoopSettings
    run: RunFolder
    display: Display
    checkpoints: Checkpoints
    meter: Meter
    hooks: Hooks
    best: dict[str, float] | None = None
    speed: Throughput = field(default_factory=Throughput)

    def resume(self) -> int:
        """Take up the newest checkpoint, drop what was written after it, and return its step (0: none).

        Raises:
            CheckpointError: when it does not fit, or every one is damaged.
        """
        path: Path | None = self.fabric.broadcast(self.checkpoints.newest() if self.fabric.is_global_zero else None)
        step = 0 if path is None else self._take_up(path)
        if self.fabric.is_global_zero:
            self.checkpoints.drop_after(step)
            self.run.cut_metrics(step)
            self.run.note(self.plan.derived)
        self.display.begin(step)
        for line in self.plan.derivations:
            self.display.say(line)
        if path is not None:
            self.display.say(f"going on from step {step} of {self.loop.max_steps} ({path})")
        return step

    def _take_up(self, path: Path) -> int:
        content = read_checkpoint(path)
        if content["effective_batch"] != self.plan.effective_batch:
            raise CheckpointError(
                f"{path} was written with {content['effective_batch']} samples per step, now there are "
                f"{self.plan.effective_batch}; resume with the same batch size, accumulation and devices."
            )
        restore_weights(self.objective, content, path)
        self.optimizer.load_state_dict(content["optimizer"])
        self.fabric.strategy.precision.load_state_dict(content["precision"])
        self.meter.restore(content["meter"], self.fabric.global_rank)
        self.best = content["best"]
        self.speed = Throughput(content["elapsed_s"])
        return int(content["step"])

    def log(self, step: int) -> None:
        """Write one line of metrics: means since the last one.

        Raises:
            NonFiniteError: when a term or the gradient was not finite since then.
        """
        means = self.meter.read()
        self.meter.reset()
        self._require_usable_scale(step)
        rate = self.plan.schedule.learning_rate_at(step)
        values = {**means, "learning_rate": rate, **self.speed.read()}
        self.run.log(step, values)
        self.display.show(step, values)

    def validate(self, step: int) -> None:
        """Score the objective, if it is to be, and keep its weights when they are the best so far.

        Raises:
            ConfigError: when ``best_by`` is none of the scores.
        """
        if self.hooks.validate is None:
            return
        with self.speed.paused():
            scores: dict[str, float] = {}
            if self.fabric.is_global_zero:
                with self._looking():
                    scores = {name: float(value) for name, value in self.hooks.validate(self.objective).items()}
            scores = self.fabric.broadcast(scores)
            self.run.log(step, {f"val/{name}": value for name, value in scores.items()})
            self.display.say(f"step {step}  " + "  ".join(f"val/{name} {value:.4f}" for name, value in scores.items()))
            if self.hooks.best_by is not None and self._is_best(scores, self.hooks.best_by):
                self.best = {"step": step, **scores}
                if self.fabric.is_global_zero:
                    self.checkpoints.save_best(step, self.objective, scores)

    def _is_best(self, scores: dict[str, float], best_by: str) -> bool:
        if best_by not in scores:
            raise ConfigError(f"best_by is '{best_by}', but validation gives {', '.join(scores) or 'nothing'}.")
        # Compared so that a score which is not a number is never the best one.
        return scores[best_by] > (-math.inf if self.best is None else self.best[best_by])

    def picture(self, step: int, batch: Batch) -> None:
        """Let the objective draw what it sees in ``batch``."""
        if self.fabric.is_global_zero:
            with self.speed.paused(), self._looking():
                pictures = {name: _as_array(volume) for name, volume in self.objective.pictures(batch).items()}
            if pictures:
                self.run.save_pictures(step, pictures)

    def save(self, step: int) -> None:
        """Write a checkpoint; a collective call.

        Raises:
            NonFiniteError: instead of saving weights that are not finite.
            Mim3dError: when it cannot be written.
        """
        with self.speed.paused():
            window = self.meter.state()
            self._require_finite_weights(step)
            if not self.fabric.is_global_zero:
                return
            state: dict[str, Any] = {
                "objective": self.objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "precision": self.fabric.strategy.precision.state_dict(),
                "meter": window,
                "best": self.best,
                "elapsed_s": self.speed.elapsed_s,
                "effective_batch": self.plan.effective_batch,
            }
            self.checkpoints.save(step, state)
            if self.hooks.on_checkpoint is not None:
                with self._looking():
                    self.hooks.on_checkpoint(self.objective, step)

    def end(self, step: int, reason: str) -> None:
        """Wait until every process is done, note the peak of memory, and say how it ended; a collective call."""
        self.fabric.barrier()
        peak = peak_bytes(self.fabric.device)
        self.run.note({"peak_memory_bytes": peak})
        if step >= self.loop.max_steps:
            held = "" if peak is None else f"; at most {in_words(peak)} of memory"
            self.display.say(f"{reason}, in {clock(self.speed.elapsed_s)}{held}")
        else:
            self.display.say(
                f"stopped after step {step} of {self.loop.max_steps}, because {reason}; its checkpoint is in "
                f"{self.checkpoints.folder}. To go on: {self.run.how_to_resume}"
            )

    def explained(self, error: NonFiniteError) -> NonFiniteError:
        """The same error with where things stand and what to do."""
        rate = self.plan.schedule.learning_rate_at(error.step)
        lower = [f"a lower learning rate (it was {rate:.3g} at that step)"]
        if math.isinf(self.plan.schedule.clip_norm):
            lower.append("clip_norm 1")
        if self.loop.precision != "32-true":
            lower.append(f"precision 32-true (it was {self.loop.precision})")
        advice = (
            f" Training stopped; {self._kept()}. Start a new run with {', or '.join(lower)}; "
            "should it happen at the same step again, look for faulty values in the data."
        )
        return NonFiniteError(error.step, error.terms, advice)

    def out_of_memory(self) -> Mim3dError:
        """Where things stand when memory has run out, and what to do."""
        return Mim3dError(
            f"Training ran out of memory; {self._kept()}. Go on where more is free ({self.run.how_to_resume}), or "
            "start a new run with --backbone.recompute true, or with a smaller --batch_size and more --accumulation."
        )

    def _kept(self) -> str:
        step = self.checkpoints.last_step()
        kept = "no checkpoint had been written" if step is None else f"the checkpoint of step {step} is kept"
        return f"{kept} in {self.checkpoints.folder}"

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Evaluation mode without gradients, in the run's precision; training mode again afterwards."""
        self.objective.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                yield
        finally:
            self.objective.train()

    def _require_finite_weights(self, step: int) -> None:
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.objective.parameters() if p.requires_grad])
        if not bool(norm.isfinite()):
            raise NonFiniteError(step, ["a weight"])

    def _require_usable_scale(self, step: int) -> None:
        """Half precision halves its loss scale at each overflow; below 1 that is no longer bad luck."""
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and scaler.get_scale() < 1:
            raise NonFiniteError(step, ["grad_norm"])


def _as_array(volume: Tensor) -> np.ndarray:
    array = volume.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()
