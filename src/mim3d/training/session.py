"""A run in progress: what happens between two optimiser steps, and the state that a checkpoint carries."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning_fabric
import torch

from mim3d.core.errors import CheckpointError, ConfigError, Mim3dError, first_line, note_exit_code
from mim3d.core.names import number_of
from mim3d.core.progress import Progress, clock
from mim3d.core.resources import in_words
from mim3d.core.run_folder import Run
from mim3d.core.warned import UnfinishedWarning, record_said
from mim3d.distributed.heartbeat import BETWEEN, Heartbeat
from mim3d.distributed.stopping import requeue
from mim3d.objective import Batch, Objective
from mim3d.training.checkpoint import Checkpoints, read_checkpoint, restore_weights
from mim3d.training.launch import DeviceBatches
from mim3d.training.memory import is_out_of_memory, peak_bytes
from mim3d.training.meter import BadSteps, Meter, NonFiniteError, Throughput, summary
from mim3d.training.optim import WeightAverage
from mim3d.training.plan import TrainingPlan
from mim3d.training.settings import LoopSettings

#: First steps of a session, which are slower than all others, and the steps after them whose time is measured.
WARMING_STEPS, MEASURED_STEPS = 2, 10

#: Seconds of training below which nobody wants to know beforehand, and above which one wants to know what fits.
SHORT_S, DAY_S, HOUR_S = 60.0, 86400.0, 3600.0

Validate = Callable[[Objective], dict[str, float]]
OnCheckpoint = Callable[[Objective, int], None]


@dataclass(frozen=True)
class Hooks:
    """What the caller of the loop wants done between steps.

    Attributes:
        validate: Scores the objective, by name.
        best_by: Name of the score by which the best weights are kept. Higher is better.
        on_checkpoint: Called with the objective and the step after each checkpoint.
        patience: Validations without a better score after which training ends.
    Raises:
        ConfigError: The best weights are to be kept or waited for, but there is no score to go by.
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


def expected_time(step_s: float, steps_left: int, device: str, *, is_limited: bool = False) -> list[str]:
    """How long the steps that are left will take, and where that is more than a day, what fits into an hour.

    Args:
        step_s: Seconds of one step, as measured.
        steps_left: Steps still to be taken.
        device: What they are taken on, for people.
        is_limited: Whether the session has a time limit already.
    """
    left_s = step_s * steps_left
    if left_s < SHORT_S:
        return []
    lines = [f"expected: {clock(left_s)} (h:mm:ss) for {steps_left:,} more steps of {step_s:.2g} s"]
    if left_s <= DAY_S or is_limited:
        return lines
    fitting = int(HOUR_S / step_s)
    # Two digits are what so short a measurement is good for.
    fitting -= fitting % 10 ** max(0, len(str(fitting)) - 2)
    fits = f"--max_steps {fitting} fits into an hour, with a whole schedule; " if fitting else ""
    return [
        *lines,
        f"that is more than a day on {device}: {fits}--max_time 1:00:00 stops after one, and --resume true goes on",
    ]


@dataclass(kw_only=True)
class TrainingSession:
    """One process's part in a run, between two optimiser steps.

    Attributes:
        fabric: Lightning Fabric of this process.
        objective: What is trained.
        optimizer: The optimiser, as Fabric has wrapped it.
        plan: Numbers that follow from the settings.
        loop: Settings of the loop.
        run: Folder that receives metrics and pictures.
        checkpoints: Checkpoints of the run.
        hooks: What the caller of the loop wants done.
        display: Shows a person how far the run is.
        heartbeat: Tells the other processes how far this one is.
        bad_steps: Steps of the run that went wrong.
        meter: Means of the logged terms since the last line of metrics.
        average: Average of the weights.
        speed: Clock of this session and of those before it.
        best: Step and scores of the best validation so far.
        stale: Number of validations since then.
        step: The last optimiser step that is done.
        begun: The step that this session began after, and its time on steps when those that are measured began.
        updating: Whether weights are being changed, so that they belong to no step.
    """

    fabric: lightning_fabric.Fabric
    objective: Objective
    optimizer: torch.optim.Optimizer
    plan: TrainingPlan
    loop: LoopSettings
    run: Run
    checkpoints: Checkpoints
    hooks: Hooks
    display: Progress
    heartbeat: Heartbeat
    bad_steps: BadSteps = field(init=False)
    meter: Meter = field(init=False)
    average: WeightAverage = field(init=False)
    speed: Throughput = field(default_factory=Throughput)
    best: dict[str, float] | None = None
    stale: int = 0
    step: int = 0
    begun: tuple[int, float] = (0, 0.0)
    updating: bool = False

    def __post_init__(self) -> None:
        self.bad_steps = BadSteps(self.loop.max_bad_steps, self.display.say)
        self.meter = Meter(self.fabric.device, self.bad_steps)
        self.average = WeightAverage(self.objective, self.plan.schedule.ema_decay)

    def resume(self) -> int:
        """Restore the newest checkpoint and drop what was written after it.

        Returns:
            The checkpoint's step. 0 where there is none.
        Raises:
            CheckpointError: The checkpoint does not fit, or every one is damaged.
            ConfigError: More steps have gone wrong already than the settings allow.
        """
        path: Path | None = self.fabric.broadcast(self.checkpoints.newest() if self.fabric.is_global_zero else None)
        if path is not None:
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
            self.bad_steps.restore(content["bad_steps"])
            self.average.load_state_dict(content.get("average", {}))
            self.best, self.stale = content["best"], content.get("stale", 0)
            self.speed = Throughput(content["elapsed_s"])
            self.step = int(content["step"])
        self.begun = self.step, 0.0
        if self.fabric.is_global_zero:
            self.checkpoints.drop_after(self.step)
            self.run.cut_metrics(self.step)
            self.run.note(self.plan.derived)
        self.display.begin(self.step)
        for line in (*self.plan.summary, *(self.plan.derivations if self.loop.verbose else ())):
            self.display.say(line)
        if path is not None:
            self.display.say(f"going on from step {self.step} of {self.loop.max_steps} ({path})")
        return self.step

    def attempt(self, step: int, batches: DeviceBatches, take: Callable[[], Batch]) -> Batch:
        """Take a step. One that runs out of memory is taken once more with the same random numbers.

        A process among several gets no second try, as the others would not know of it.

        Args:
            step: Number of the step.
            batches: Gives the step its micro-batches.
            take: Takes the step.
        Returns:
            What ``take`` returned.
        Raises:
            Exception: What ``take`` raised. The state before the step is saved first.
        """
        try:
            return take()
        except Exception as error:
            short = isinstance(error, (RuntimeError, MemoryError)) and is_out_of_memory(error)
            alone = self.fabric.world_size == 1
            if not (short and alone and not self.updating and self.bad_steps.may_retry(step)):
                self._rescue()
                raise
        # Out of the handler: the error holds on to the tensors of the failed step.
        self._forget_step(step)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        batches.restart_after(step - 1)
        try:
            return take()
        except Exception:
            self._rescue()
            raise

    def _forget_step(self, step: int) -> None:
        """Undo what a step that failed before the optimiser left behind, so that it can be taken once more."""
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.forget(step)
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and scaler._per_optimizer_states:
            # Gradients that it has unscaled are gone; the same scale holds for those to come.
            scaler.update(scaler.get_scale())

    def _rescue(self) -> None:
        """Save the state after the last whole step, when the one after it fails in this process.

        Not collective, as others may never come: only the first process saves, with its own metrics since the last
        line. Weights that are half updated cannot be saved, nor can what a broken device holds.
        """
        saved = self.checkpoints.last_step() or 0
        if not self.fabric.is_global_zero or self.updating or self.step <= saved:
            return
        try:
            self._forget_step(self.step + 1)
            window = self.meter.state(alone=True)
            self._require_finite_weights(self.step)
            path = self.checkpoints.save(self.step, self._state(window))
        except (RuntimeError, MemoryError, OSError, Mim3dError) as error:
            self.display.say(f"the state after step {self.step} could not be saved: {' '.join(str(error).split())}")
            return
        self.display.say(f"step {self.step + 1} failed; the state before it is saved ({path})")

    def log(self, step: int) -> None:
        """Write one line of metrics: means since the last one.

        Raises:
            NonFiniteError: A term or the gradient was not finite, and no step may be skipped.
        """
        means = self.meter.read()
        self.meter.reset()
        skipped = self.bad_steps.num_skipped
        faults = {"skipped_steps": skipped} if skipped else {}
        # Half precision halves its loss scale at each overflow; below 1 that is no longer bad luck.
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and scaler.get_scale() < 1:
            raise NonFiniteError(step, ["grad_norm"])
        rate = self.plan.schedule.learning_rate_at(step)
        # Counted by the allocator or the system: the device is not asked.
        held = peak_bytes(self.fabric.device)
        memory = {} if held is None else {"memory_bytes": held}
        values = {**means, "learning_rate": rate, **self.speed.read(), **memory, **faults}
        self.run.log(step, values)
        self.display.update(step, summary(values))

    def forecast(self, step: int) -> None:
        """Say once in a session, after ten measured steps, how long the others will take."""
        first, mark_s = self.begun
        if step - first not in (WARMING_STEPS, WARMING_STEPS + MEASURED_STEPS) or not self.fabric.is_global_zero:
            return
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize(self.fabric.device)
        if step - first == WARMING_STEPS:
            self.begun = first, self.speed.stepping_s
            return
        step_s = (self.speed.stepping_s - mark_s) / MEASURED_STEPS
        self.run.note({"seconds_per_step": round(step_s, 4)})
        left, device = self.loop.max_steps - step, str(self.plan.derived["device"])
        for line in expected_time(step_s, left, device, is_limited=self.loop.max_time_s is not None):
            self.display.say(line)

    def save_pictures(self, step: int, batch: Batch) -> None:
        """Let the objective of the first process draw what it sees in ``batch``."""
        self.heartbeat.at(step, "draws pictures")
        if self.fabric.is_global_zero:
            with self.speed.paused(), self._evaluating():
                volumes = {name: volume.detach().cpu() for name, volume in self.objective.pictures(batch).items()}
                # numpy has no bfloat16.
                pictures = {name: (v.float() if v.is_floating_point() else v).numpy() for name, v in volumes.items()}
            if pictures:
                self.run.save_pictures(step, pictures)

    def validate(self, step: int) -> None:
        """Score the objective, if it is to be, and keep its weights when they are the best so far.

        Raises:
            ConfigError: ``best_by`` is none of the scores.
        """
        if self.hooks.validate is None:
            return
        self.heartbeat.at(step, "validates")
        with self.speed.paused():
            scores: dict[str, float] = {}
            if self.fabric.is_global_zero:
                with self._evaluating():
                    scores = {name: float(value) for name, value in self.hooks.validate(self.objective).items()}
            scores = self.fabric.broadcast(scores)
            self.run.log(step, {f"val/{name}": value for name, value in scores.items()})
            self.display.say(f"step {step}  " + "  ".join(f"val/{name} {value:.4f}" for name, value in scores.items()))
            best_by = self.hooks.best_by
            if best_by is None:
                return
            if best_by not in scores:
                raise ConfigError(f"best_by is '{best_by}', but validation gives {', '.join(scores) or 'nothing'}.")
            # Compared so that a score which is not a number is never the best one.
            if not scores[best_by] > (-math.inf if self.best is None else self.best[best_by]):
                # Before the first score that is a number there is nothing to be better than.
                self.stale += self.best is not None
                return
            self.best, self.stale = {"step": step, **scores}, 0
            if self.fabric.is_global_zero:
                with self.average.in_place():
                    self.checkpoints.save_best(step, self.objective, scores)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients, the run's precision. Everything is as before afterwards."""
        self.objective.eval()
        try:
            with self.average.in_place(), torch.no_grad(), self.fabric.autocast():
                yield
        finally:
            self.objective.train()

    def save(self, step: int) -> None:
        """Write a checkpoint and export the weights. A collective call.

        Raises:
            NonFiniteError: The weights are not finite, or a term was not and no step may be skipped. Nothing is saved.
            Mim3dError: The checkpoint cannot be written.
        """
        self.heartbeat.at(step, "writes a checkpoint")
        with self.speed.paused():
            window = self.meter.state()
            self._require_finite_weights(step)
            if self.fabric.is_global_zero:
                self.checkpoints.save(step, self._state(window))
                self.export(step)
        self.heartbeat.at(step, BETWEEN)

    def _state(self, window: list[list[dict[str, Any]]]) -> dict[str, Any]:
        """What a checkpoint carries."""
        return {
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "meter": window,
            "bad_steps": self.bad_steps.state(),
            "average": self.average.state_dict(),
            "best": self.best,
            "stale": self.stale,
            "elapsed_s": self.speed.elapsed_s,
            "effective_batch": self.plan.effective_batch,
            "accumulation": self.loop.accumulation,
        }

    def _require_finite_weights(self, step: int) -> None:
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.objective.parameters() if p.requires_grad])
        if not bool(norm.isfinite()):
            raise NonFiniteError(step, ["a weight"])

    def export(self, step: int) -> None:
        """Let the caller of the loop take what it wants of the weights, in the first process."""
        if self.fabric.is_global_zero and self.hooks.on_checkpoint is not None:
            with self._evaluating():
                self.hooks.on_checkpoint(self.objective, step)

    def finished(self, step: int) -> str | None:
        """Say why there is nothing left to train after ``step``, the same in every process. None when there is."""
        if step >= self.loop.max_steps:
            return "the only step is done" if self.loop.max_steps == 1 else f"all {self.loop.max_steps} steps are done"
        if self.hooks.patience is not None and self.stale >= self.hooks.patience:
            return f"no better {self.hooks.best_by} in {number_of(self.stale, 'validation')}, after step {step}"
        return None

    def end(self, step: int, reason: str, *, exit_code: int, to_be_continued: bool = False) -> None:
        """Leave the averaged weights, note the peak of memory, and say how it ended. A collective call.

        Args:
            step: The last step that was done.
            reason: Why it was the last.
            exit_code: What the command line ends with where this was not the last step of the run.
            to_be_continued: Whether a scheduler stopped the run, which is then asked to start it again.
        """
        self.heartbeat.at(step, "ends")
        self.average.replace_weights()
        self.fabric.barrier()
        peak = peak_bytes(self.fabric.device)
        self.run.note({"peak_memory_bytes": peak})
        if self.finished(step):
            held = "" if peak is None else f"; at most {in_words(peak)} of memory"
            self.run.drop_warnings(UnfinishedWarning)
            self.display.say(f"{reason}, in {clock(self.speed.elapsed_s)}{held}")
        else:
            stopped = f"stopped after step {step} of {self.loop.max_steps}, because {reason}"
            # Of several processes the others end as usual, lest whoever started them takes it for a crash.
            if self.fabric.is_global_zero:
                note_exit_code(exit_code)
                record_said(UnfinishedWarning.kind, f"{stopped}.")
            self.display.say(
                f"{stopped}; its checkpoint is in {self.checkpoints.folder}. To go on: {self.run.how_to_resume}"
            )
        if to_be_continued and self.fabric.is_global_zero:
            answer = requeue()
            if answer is not None:
                self.display.say(answer)

    def with_advice(self, error: NonFiniteError) -> NonFiniteError:
        """The same error with where things stand and what to do. A collective call where a budget is spent."""
        go_on = "Start"
        if error is self.bad_steps.beyond:
            # The first process may still be writing the checkpoint that the message names.
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
        """An error that says where things stand when memory has run out, and what to do."""
        return Mim3dError(
            f"Training ran out of memory; {self._kept()}. Go on where more is free ({self.run.how_to_resume}), or "
            "start a new run with --backbone.recompute true, or with a smaller --batch_size and more --accumulation."
        )

    def lost_process(self, error: BaseException) -> Mim3dError:
        """An error that says where things stand when another process of the run has ended, and what to do."""
        return Mim3dError(
            f"Process {self.fabric.global_rank} of {self.fabric.world_size} lost the others during step "
            f"{self.step + 1} ({first_line(error)[:200]}): one of them ended, and says last why, or its machine cannot "
            f"be reached; {self._kept()}. Go on: {self.run.how_to_resume}"
        )

    def _kept(self) -> str:
        step = self.checkpoints.last_step()
        kept = "no checkpoint had been written" if step is None else f"the checkpoint of step {step} is kept"
        return f"{kept} in {self.checkpoints.folder}"
