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

from mim3d.core.errors import CheckpointError, ConfigError, Mim3dError
from mim3d.core.progress import clock
from mim3d.core.resources import in_words
from mim3d.distributed.heartbeat import BETWEEN, Heartbeat
from mim3d.distributed.stopping import requeue
from mim3d.objective import Batch, Objective
from mim3d.training.averaging import Average
from mim3d.training.bad_steps import BudgetSpentError, NonFiniteError
from mim3d.training.checkpoint import Checkpoints, read_checkpoint, restore_weights
from mim3d.training.memory import peak_bytes
from mim3d.training.meter import Meter, Throughput
from mim3d.training.plan import Plan
from mim3d.training.progress import Display
from mim3d.training.settings import LoopSettings, RunFolder

Validate = Callable[[Objective], dict[str, float]]
OnCheckpoint = Callable[[Objective, int], None]


@dataclass(frozen=True)
class Hooks:
    """What the caller of the loop wants done on the way.

    Raises:
        ConfigError: when the best is to be kept, but nothing is validated; when patience has no score to go by.
    """

    validate: Validate | None = None
    best_by: str | None = None
    on_checkpoint: OnCheckpoint | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.best_by is not None and self.validate is None:
            raise ConfigError(f"best_by is '{self.best_by}', but there is no validation; leave it out.")
        if self.patience is not None and self.best_by is None:
            raise ConfigError(f"patience is {self.patience}, but no score is validated by; leave it out.")


@dataclass
class Session:
    """One process's part in a run; everything here happens between two steps.

    Attributes:
        best: step and values of the best validation so far.
        stale: validations since then.
        speed: clock of this session and those before it.
        step: the last optimiser step that is done.
        updating: whether weights are being changed, so that they are those of no step.
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
    average: Average
    heart: Heartbeat
    best: dict[str, float] | None = None
    stale: int = 0
    speed: Throughput = field(default_factory=Throughput)
    step: int = 0
    updating: bool = False

    def resume(self) -> int:
        """Take up the newest checkpoint, drop what was written after it, and return its step (0: none).

        Raises:
            CheckpointError: when it does not fit, or every one is damaged.
            ConfigError: when more steps have gone wrong already than may.
        """
        path: Path | None = self.fabric.broadcast(self.checkpoints.newest() if self.fabric.is_global_zero else None)
        step = self.step = 0 if path is None else self._take_up(path)
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
        micro_batches = self.loop.accumulation / content["accumulation"]
        self.meter.restore(content["meter"], self.fabric.global_rank, self.fabric.world_size, micro_batches)
        self.meter.bad_steps.restore(content["bad_steps"])
        self.average.load_state_dict(content.get("average", {}))
        self.best, self.stale = content["best"], content.get("stale", 0)
        self.speed = Throughput(content["elapsed_s"])
        return int(content["step"])

    def log(self, step: int) -> None:
        """Write one line of metrics: means since the last one.

        Raises:
            NonFiniteError: when a term or the gradient was not finite, and none may be passed over.
        """
        means = self.meter.read()
        self.meter.reset()
        skipped = self.meter.bad_steps.num_skipped
        faults = {"skipped_steps": skipped} if skipped else {}
        self._require_usable_scale(step)
        rate = self.plan.schedule.learning_rate_at(step)
        # Counted by the allocator or the system: the device is not asked.
        held = peak_bytes(self.fabric.device)
        memory = {} if held is None else {"memory_bytes": held}
        values = {**means, "learning_rate": rate, **self.speed.read(), **memory, **faults}
        self.run.log(step, values)
        self.display.show(step, values)

    def validate(self, step: int) -> None:
        """Score the objective, if it is to be, and keep its weights when they are the best so far.

        Raises:
            ConfigError: when ``best_by`` is none of the scores.
        """
        if self.hooks.validate is None:
            return
        self.heart.at(step, "validates")
        with self.speed.paused():
            scores: dict[str, float] = {}
            if self.fabric.is_global_zero:
                with self._looking():
                    scores = {name: float(value) for name, value in self.hooks.validate(self.objective).items()}
            scores = self.fabric.broadcast(scores)
            self.run.log(step, {f"val/{name}": value for name, value in scores.items()})
            self.display.say(f"step {step}  " + "  ".join(f"val/{name} {value:.4f}" for name, value in scores.items()))
            if self.hooks.best_by is not None:
                self._keep_best(step, scores, self.hooks.best_by)

    def _keep_best(self, step: int, scores: dict[str, float], best_by: str) -> None:
        if not self._is_best(scores, best_by):
            self.stale += 1
            return
        self.best, self.stale = {"step": step, **scores}, 0
        if self.fabric.is_global_zero:
            with self.average.in_place():
                self.checkpoints.save_best(step, self.objective, scores)

    def _is_best(self, scores: dict[str, float], best_by: str) -> bool:
        if best_by not in scores:
            raise ConfigError(f"best_by is '{best_by}', but validation gives {', '.join(scores) or 'nothing'}.")
        # Compared so that a score which is not a number is never the best one.
        return scores[best_by] > (-math.inf if self.best is None else self.best[best_by])

    def picture(self, step: int, batch: Batch) -> None:
        """Let the objective of the first process draw what it sees in ``batch``."""
        self.heart.at(step, "draws pictures")
        if self.fabric.is_global_zero:
            with self.speed.paused(), self._looking():
                pictures = {name: _as_array(volume) for name, volume in self.objective.pictures(batch).items()}
            if pictures:
                self.run.save_pictures(step, pictures)

    def save(self, step: int) -> None:
        """Write a checkpoint; a collective call.

        Raises:
            NonFiniteError: instead of saving weights that are not finite, or when a term was not and none may be.
            Mim3dError: when it cannot be written.
        """
        self.heart.at(step, "writes a checkpoint")
        with self.speed.paused():
            window = self.meter.state()
            self._require_finite_weights(step)
            if self.fabric.is_global_zero:
                self.checkpoints.save(step, self._state(window))
                self.export(step)
        self.heart.at(step, BETWEEN)

    def _state(self, window: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "meter": window,
            "bad_steps": self.meter.bad_steps.state(),
            "average": self.average.state_dict(),
            "best": self.best,
            "stale": self.stale,
            "elapsed_s": self.speed.elapsed_s,
            "effective_batch": self.plan.effective_batch,
            "accumulation": self.loop.accumulation,
        }

    def export(self, step: int) -> None:
        """Let the caller of the loop take what it wants of the weights, in the first process."""
        if self.fabric.is_global_zero and self.hooks.on_checkpoint is not None:
            with self._looking():
                self.hooks.on_checkpoint(self.objective, step)

    def forget_step(self, step: int) -> None:
        """Undo what a step that failed before the optimiser left behind, so that it can be taken once more."""
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.forget(step)
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and scaler._per_optimizer_states:
            # Gradients that it has unscaled are gone; the same scale holds for those to come.
            scaler.update(scaler.get_scale())

    def rescue(self) -> None:
        """Save the state after the last whole step, when the one after it fails in this process.

        Not collective, as others may never come: only the first process saves, and of the metrics since the last line
        its own. Weights that are half updated are past saving; so is what a broken device holds.
        """
        saved = self.checkpoints.last_step() or 0
        if not self.fabric.is_global_zero or self.updating or self.step <= saved:
            return
        try:
            self.forget_step(self.step + 1)
            window = self.meter.state_alone()
            self._require_finite_weights(self.step)
            path = self.checkpoints.save(self.step, self._state(window))
        except (RuntimeError, MemoryError, OSError, Mim3dError) as error:
            self.display.say(f"the state after step {self.step} could not be saved: {' '.join(str(error).split())}")
            return
        self.display.say(f"step {self.step + 1} failed; the state before it is saved ({path})")

    def all_done(self, step: int) -> str | None:
        """Why there is nothing left to train after ``step``, the same in every process; None when there is."""
        if step >= self.loop.max_steps:
            return f"all {self.loop.max_steps} steps are done"
        if self.hooks.patience is not None and self.stale >= self.hooks.patience:
            return f"no better {self.hooks.best_by} in {self.stale} validations, after step {step}"
        return None

    def end(self, step: int, reason: str, *, to_be_continued: bool = False) -> None:
        """Leave the averaged weights, note the peak of memory, and say how it ended; a collective call.

        Args:
            step: the last one done.
            reason: why it was the last.
            to_be_continued: a scheduler stopped the run, and is asked to start it again.
        """
        self.heart.at(step, "ends")
        self.average.take_place()
        self.fabric.barrier()
        peak = peak_bytes(self.fabric.device)
        self.run.note({"peak_memory_bytes": peak})
        if self.all_done(step):
            held = "" if peak is None else f"; at most {in_words(peak)} of memory"
            self.display.say(f"{reason}, in {clock(self.speed.elapsed_s)}{held}")
        else:
            self.display.say(
                f"stopped after step {step} of {self.loop.max_steps}, because {reason}; its checkpoint is in "
                f"{self.checkpoints.folder}. To go on: {self.run.how_to_resume}"
            )

        if to_be_continued and self.fabric.is_global_zero:
            asked = requeue()
            if asked is not None:
                self.display.say(asked)

    def explained(self, error: NonFiniteError) -> NonFiniteError:
        """The same error with where things stand and what to do; a collective call where a budget is spent."""
        go_on = "Start"
        if isinstance(error, BudgetSpentError):
            # The first process may still be at the checkpoint that is told of.
            self.fabric.barrier()
            go_on = f"Go on with a larger --max_bad_steps ({self.run.how_to_resume}), or start"
        rate = self.plan.schedule.learning_rate_at(error.step)
        lower = [f"a lower learning rate (it was {rate:.3g} at that step)"]
        if math.isinf(self.plan.schedule.clip_norm):
            lower.append("clip_norm 1")
        if self.loop.precision != "32-true":
            lower.append(f"precision 32-true (it was {self.loop.precision})")
        advice = (
            f" Training stopped; {self._kept()}. {go_on} a new run with {', or '.join(lower)}; "
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
        """Averaged weights, evaluation mode, no gradients, the run's precision; all as it was afterwards."""
        self.objective.eval()
        try:
            with self.average.in_place(), torch.no_grad(), self.fabric.autocast():
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
