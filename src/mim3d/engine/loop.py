"""The only training loop: pre-training and fine-tuning, from the first step to the last."""

from collections.abc import Iterator

import torch

from mim3d.engine.checkpoint import Checkpoints
from mim3d.engine.launch import FabricModule, StepModule, device_name, launch, seed_step
from mim3d.engine.memory import is_out_of_memory
from mim3d.engine.meter import Meter, NonFiniteError, gradient_terms
from mim3d.engine.optim import build_optimizer, clip_gradients, set_learning_rate
from mim3d.engine.plan import make_plan
from mim3d.engine.progress import Display
from mim3d.engine.session import Hooks, OnCheckpoint, Session, Validate
from mim3d.engine.settings import BatchSource, LoopSettings, RunFolder, TrainResult
from mim3d.engine.stop import StopRequests
from mim3d.objective import Batch, Objective
from mim3d.optimisation import Optimisation


def train(
    objective: Objective,
    source: BatchSource,
    *,
    run: RunFolder,
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
        objective: what is trained, in place; on several devices every process ends with the same weights.
        source: micro-batches.
        run: the folder that receives metrics, checkpoints and pictures.
        loop: how long, how often, on what.
        optim: the optimiser's settings, already filled from the defaults of the method or task.
        validate: gives scores by name, logged as ``val/<name>``; called every ``loop.validate_every`` steps
            and after the last, in the first process only, without gradients and in evaluation mode.
        best_by: the score (higher is better) by which the best weights are kept.
        on_checkpoint: called after each checkpoint with the objective and the step, under the same conditions.
    Raises:
        ConfigError: before any work, when the settings cannot work on this machine.
        CheckpointError: when a checkpoint does not fit or none can be read.
        NonFiniteError: when the loss or the gradient stops being finite; earlier checkpoints are kept.
        Mim3dError: when a checkpoint cannot be written, or memory runs out; earlier ones are kept.
    """
    stop = StopRequests(loop.max_time_s)
    fabric = launch(loop)
    plan = make_plan(objective, source, loop, optim, device_name(fabric.device))
    checkpoints = Checkpoints(run.checkpoints_dir, loop.keep_checkpoints)
    if fabric.is_global_zero:
        checkpoints.require_space(objective)
    optimizer = build_optimizer(objective, plan.schedule, loop.precision)
    model, optimizer = fabric.setup(StepModule(objective), optimizer)
    meter = Meter(fabric.device)
    hooks = Hooks(validate, best_by, on_checkpoint)

    with run.exclusive(), stop, Display(loop.max_steps, silent=not fabric.is_global_zero) as display:
        session = Session(fabric, objective, optimizer, plan, loop, run, display, checkpoints, meter, hooks)
        start = session.resume()
        try:
            step, reason = _run_steps(session, model, source, start, stop)
        except NonFiniteError as error:
            raise session.explained(error) from None
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise session.out_of_memory() from error
            raise
        session.end(step, reason)
    return TrainResult(step, step >= loop.max_steps, session.best, reason)


def _run_steps(
    session: Session, model: FabricModule, source: BatchSource, start: int, stop: StopRequests
) -> tuple[int, str]:
    """Every step after ``start``; returns the last one done and why it was the last."""
    loop = session.loop
    finished = f"all {loop.max_steps} steps are done"
    if start >= loop.max_steps:
        return start, finished
    rank, world_size = session.fabric.global_rank, session.fabric.world_size
    batches = source.batches(start * session.plan.effective_batch, rank=rank, world_size=world_size)
    session.objective.train()
    for step in range(start + 1, loop.max_steps + 1):
        seed_step(loop.seed, step, rank)
        batch = _take_step(session, model, batches, step)
        session.display.advance(step)

        last = step == loop.max_steps
        if last or step % loop.log_every == 0:
            session.log(step)
        if loop.pictures_every and (last or step % loop.pictures_every == 0):
            session.picture(step, batch)
        if last or (loop.validate_every and step % loop.validate_every == 0):
            session.validate(step)
        reason = finished if last else stop.reason()
        if reason or step % loop.checkpoint_every == 0:
            session.save(step)
        if reason:
            break
    return step, reason or finished


def _take_step(session: Session, model: FabricModule, batches: Iterator[Batch], step: int) -> Batch:
    """One optimiser step over all its micro-batches, without waiting for the device; returns the last one."""
    fabric, loop, schedule = session.fabric, session.loop, session.plan.schedule
    progress = (step - 1) / max(loop.max_steps - 1, 1)
    set_learning_rate(session.optimizer, schedule.learning_rate_at(step))
    for micro in range(loop.accumulation):
        with session.speed.waiting():
            batch: Batch = fabric.to_device(next(batches))
        with fabric.no_backward_sync(model, enabled=micro + 1 < loop.accumulation):
            loss, logs = model(batch, progress)
            fabric.backward(loss / loop.accumulation)
        session.meter.add(step, {"loss": loss, **logs})
    norm = clip_gradients(fabric, model, session.optimizer, schedule.clip_norm)
    session.meter.add(step, gradient_terms(norm, loop.precision))
    session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        session.objective.after_step(progress)
    session.speed.add_samples(session.plan.effective_batch)
    return batch
