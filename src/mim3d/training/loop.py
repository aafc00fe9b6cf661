"""The only training loop: pre-training and fine-tuning, from the first step to the last."""

import warnings
from functools import partial
from typing import Any

import torch

from mim3d.core.progress import Progress
from mim3d.core.resources import device_name
from mim3d.core.run_folder import Run
from mim3d.core.warned import LearningWarning
from mim3d.distributed.heartbeat import BETWEEN, COMPUTING, READING, Heartbeat, is_lost_connection
from mim3d.distributed.stopping import StopRequests
from mim3d.objective import Batch, Objective, StepContext
from mim3d.training.checkpoint import Checkpoints
from mim3d.training.launch import (
    DeviceBatches,
    FabricModule,
    StepModule,
    compile_blocks,
    launch,
    seed_step,
    spare_thin_convolutions,
)
from mim3d.training.memory import is_out_of_memory
from mim3d.training.meter import NonFiniteError, gradient_terms, skip_if_not_finite, spread_non_finite
from mim3d.training.optim import build_optimizer, clip_gradients, set_learning_rate
from mim3d.training.plan import make_plan
from mim3d.training.schedule import TINY_LEARNING_RATE, Optimisation
from mim3d.training.session import Hooks, OnCheckpoint, TrainingSession, Validate
from mim3d.training.settings import BatchSource, LoopSettings, TrainResult


def train(
    objective: Objective,
    source: BatchSource,
    *,
    run: Run,
    loop: LoopSettings,
    optim: Optimisation,
    validate: Validate | None = None,
    best_by: str | None = None,
    on_checkpoint: OnCheckpoint | None = None,
) -> TrainResult:
    """Train ``objective`` until ``loop.max_steps``, the time limit or a signal.

    Goes on from the run's newest checkpoint, if there is one: at the sample where that run stopped, drawing
    the same numbers. On a CPU the weights and metrics are the same bits as those of a run never stopped.

    Args:
        objective: What is trained, in place. On several devices every process ends with the same weights, and with
            ``optim.ema_decay`` these are the averaged ones.
        source: Where micro-batches come from.
        run: Folder that receives metrics, checkpoints and pictures.
        loop: How long, how often and on what to train.
        optim: Settings of the optimiser, already filled from the defaults of the method or task.
        validate: Gives scores by name, which are logged as ``val/<name>``. It is called every ``loop.validate_every``
            steps and after the last, in the first process only, without gradients and in evaluation mode.
        best_by: Name of the score, higher is better, by which the best weights are kept.
        on_checkpoint: Called after each checkpoint with the objective and the step, under the same conditions.
    Raises:
        ConfigError: The settings cannot work on this machine. Raised before any work.
        CheckpointError: A checkpoint does not fit or none can be read.
        NonFiniteError: The loss or the gradient stopped being finite more often than ``loop.max_bad_steps``. The
            weights of the good steps are saved first, unless that is 0.
        Mim3dError: A checkpoint cannot be written, or memory ran out. Earlier checkpoints are kept.
    """
    stop = StopRequests(loop.max_time_s, loop.started_at)
    fabric = launch(loop)
    plan = make_plan(objective, source, loop, optim, device_name(fabric.device))
    rate = plan.schedule.learning_rate
    if fabric.is_global_zero and 0 < rate < TINY_LEARNING_RATE:
        warnings.warn(
            f"The learning rate is {rate:.3g}, by which next to nothing is learned; give --optim.learning_rate (1e-3 "
            "for small networks) or a larger batch.",
            category=LearningWarning,
            stacklevel=2,
        )
    checkpoints = Checkpoints(run.checkpoints_dir, loop.keep_checkpoints)
    if fabric.is_global_zero:
        checkpoints.require_space(objective, averaged=plan.schedule.ema_decay > 0)
    if loop.compile:
        compile_blocks(objective)
    if fabric.device.type == "cpu" and loop.precision != "32-true":
        spare_thin_convolutions(objective)
    model = fabric.setup_module(StepModule(objective))
    optimizer: Any = fabric.setup_optimizers(build_optimizer(objective, plan.schedule, loop.precision))
    hooks = Hooks(validate, best_by, on_checkpoint, loop.patience or None)

    silent = not fabric.is_global_zero
    with (
        run.exclusive(),
        stop,
        # Validations and checkpoints come seldom and take long: the speed is averaged over minutes.
        Progress("step {done}/{total}", loop.max_steps, silent=silent, eager=True, steady_s=300) as display,
        Heartbeat(fabric.global_rank, fabric.world_size, display.say, loop.rank_timeout_s) as heartbeat,
    ):
        session = TrainingSession(
            fabric=fabric,
            objective=objective,
            optimizer=optimizer,
            plan=plan,
            loop=loop,
            run=run,
            checkpoints=checkpoints,
            hooks=hooks,
            display=display,
            heartbeat=heartbeat,
        )
        start = session.resume()
        try:
            step, reason = _run_steps(session, model, source, start, stop)
        except NonFiniteError as error:
            raise session.with_advice(error) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise session.out_of_memory() from error
            if fabric.world_size > 1 and is_lost_connection(error):
                raise session.lost_process(error) from error
            raise
        session.end(step, reason, exit_code=stop.exit_code, to_be_continued=stop.to_be_continued)
    return TrainResult(step, session.finished(step) is not None, session.best, reason)


def _run_steps(
    session: TrainingSession, model: FabricModule, source: BatchSource, start: int, stop: StopRequests
) -> tuple[int, str]:
    """Every step after ``start``; returns the last one done and why it was the last."""
    loop = session.loop
    done = session.finished(start)
    if done is not None:
        # A kill between the last checkpoint and the export that belongs to it left an older one.
        session.export(start)
        return start, done
    batches = DeviceBatches(session.fabric, source, session.plan.effective_batch, start)
    session.objective.train()
    for step in range(start + 1, loop.max_steps + 1):
        batch = session.attempt(step, batches, partial(_take_step, session, model, batches, step))
        session.step = step
        session.display.advance(step)
        session.forecast(step)

        last = step == loop.max_steps
        if last or (loop.log_every and step % loop.log_every == 0):
            session.log(step)
        if loop.pictures_every and (last or step % loop.pictures_every == 0):
            session.save_pictures(step, batch)
        if last or (loop.validate_every and step % loop.validate_every == 0):
            session.validate(step)
        reason = session.finished(step) or stop.reason()
        bad_steps = session.bad_steps
        is_due = loop.checkpoint_every and step % loop.checkpoint_every == 0
        if reason or bad_steps.beyond or is_due:
            session.save(step)
        bad_steps.require_within_limit()
        if reason:
            break
    return step, str(reason)


def _take_step(session: TrainingSession, model: FabricModule, batches: DeviceBatches, step: int) -> Batch:
    """One optimiser step over all its micro-batches, without waiting for the device; returns the last one."""
    fabric, loop, schedule = session.fabric, session.loop, session.plan.schedule
    progress = (step - 1) / max(loop.max_steps - 1, 1)
    seed_step(loop.seed, step, fabric.global_rank)
    set_learning_rate(session.optimizer, schedule.learning_rate_at(step))
    for micro in range(loop.accumulation):
        session.heartbeat.at(step, READING)
        with session.speed.waiting():
            batch = next(batches)
        session.heartbeat.at(step, COMPUTING)
        frozen = step <= schedule.frozen_steps
        session.objective.context = StepContext(loop.seed, step, fabric.global_rank, micro, frozen)
        with fabric.no_backward_sync(model, enabled=micro + 1 < loop.accumulation):
            loss, logs = model(batch, progress)
            fabric.backward(spread_non_finite(loss) / loop.accumulation)
        session.meter.add(step, {"loss": loss, **logs})
    norm = clip_gradients(fabric, model, session.optimizer, schedule.clip_norm)
    session.meter.add(step, gradient_terms(norm, loop.precision), once=True)
    skip_if_not_finite(session.optimizer, norm)
    session.updating = True
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    session.average.update(step)
    with torch.no_grad():
        session.objective.after_step(progress)
    session.updating = False
    session.heartbeat.at(step, BETWEEN)
    session.speed.add_samples(session.plan.effective_batch)
    return batch
