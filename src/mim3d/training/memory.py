"""What a training step needs in memory, counted before the first one by a step on fake tensors.

Fake tensors have a shape, a type and a device but no values. Nothing is computed and no memory is taken, but the
storages that would be alive are counted, including those that the backward pass waits for.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from mim3d.core.resources import (
    available_memory_bytes,
    choose_accelerator,
    in_words,
    peak_memory_bytes,
    resident_memory_bytes,
)
from mim3d.objective import Objective
from mim3d.training.optim import WeightAverage, build_optimizer
from mim3d.training.plan import effective_batch
from mim3d.training.precision import DTYPES
from mim3d.training.schedule import Optimisation, make_schedule
from mim3d.training.settings import LoopSettings

#: Shape and type of each tensor of one sample, by batch key.
SampleShapes = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

#: What is taken beyond the tensors, as a share of them. On a CPU it is the heap, which training keeps and which gets
#: holes: it held 1.0 to 1.3 times the tensors of pre-training, nano to small. For a GPU, whose allocator wastes less,
#: it is an allowance and no measurement.
RESERVE = {"cpu": 0.25, "cuda": 0.15}

#: The same where gradients stay between micro-batches (measured: 1.2 to 1.35 times).
ACCUMULATING_RESERVE = {"cpu": 0.35, "cuda": 0.15}

#: And where the library convolves volumes, of which it makes copies in layouts of its own (measured: 1.4 to 1.8 times).
CONVOLVING_RESERVE = {"cpu": 0.8, "cuda": 0.15}

#: Scratch space of libraries and of our own operators, which no tensor outside them shows.
SCRATCH_BYTES = {"cpu": 2**26, "cuda": 5 * 2**28}

#: Resident size of the program where the system does not tell it (measured on Linux: 0.4 GiB).
PROGRAM_BYTES = 2**29

#: Axes of any tensor here: samples, channels and space, with one to spare.
MAX_AXES = 6


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one training process holds when it holds most.

    Attributes:
        parameters: Bytes of parameters and buffers.
        gradients: Bytes of the gradients that are there at that moment.
        optimiser: Bytes of the optimiser's moments and of the average of the weights.
        batch: Bytes of the current micro-batch and of the one before, which pictures are drawn from.
        activations: Bytes of everything else that is computed.
        program: Bytes of the interpreter and its libraries, on the CPU.
        reserve: Bytes that allocators and libraries take besides, an allowance. See ``RESERVE`` and ``SCRATCH_BYTES``.
    """

    parameters: int
    gradients: int
    optimiser: int
    batch: int
    activations: int
    program: int = 0
    reserve: int = 0

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(getattr(self, field.name) for field in fields(self))

    def parts(self) -> str:
        """What the total is made of, in words. Parts that come to nothing are left out."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return ", ".join(f"{name} {in_words(size)}" for name, size in parts.items() if size >= 2**19)


class StepMemory:
    """The memory of a training step, for any number of samples, from steps taken on fake tensors with one and two.

    A step of one or two samples is counted as it is. Everything grows in proportion to the samples or not at all, so
    those two make the line on which all others lie.

    Args:
        build: Builds the objective. It is called on fake tensors, so what it keeps elsewhere must be no tensors.
        sample: Shapes and types of one sample, without the axis of samples.
        loop: Settings of the loop, of which precision and devices matter.
        optim: Settings of the optimiser, filled from the defaults of the method or task.
        scores_bytes: Bytes that a validation holds on the CPU besides the network at work. 0 without a validation.
    Attributes:
        device: ``cpu`` or ``cuda``.
        scores_bytes: As above.
    """

    def __init__(
        self,
        build: Callable[[], Objective],
        sample: SampleShapes,
        loop: LoopSettings,
        optim: Optimisation,
        scores_bytes: int = 0,
    ) -> None:
        self._build, self._sample, self._loop, self._optim = build, sample, loop, optim
        self.scores_bytes = scores_bytes
        self.device = choose_accelerator(loop.accelerator)
        # One dry run for each number of samples.
        self._step = functools.cache(self._dry_run)

    def need(self, batch_size: int, accumulation: int) -> MemoryNeed:
        """Count what a step of ``accumulation`` micro-batches of ``batch_size`` samples needs.

        Raises:
            ConfigError: The objective or the optimiser's settings cannot work.
            Exception: Whatever an objective raises that reads values of tensors in its step.
        """
        step = self._step(batch_size) if batch_size <= 2 else self._step(1).extended(self._step(2), batch_size)
        # Later micro-batches are the first one again, with all gradients there from the beginning.
        moments = [step.update]
        if accumulation == 1:
            moments += [step.forward, step.backward]
        else:
            moments += [(step.forward[0], step.gradients), (step.accumulating, step.gradients)]
        work, gradients = max(moments, key=sum)
        # Processes that train together exchange gradients through a copy of all of them.
        gradients += step.gradients if self._loop.world_size > 1 else 0
        need = MemoryNeed(step.parameters, gradients, step.optimiser, 2 * step.batch, work)
        shares = CONVOLVING_RESERVE if step.convolves else RESERVE if accumulation == 1 else ACCUMULATING_RESERVE
        reserve = int(shares[self.device] * need.total) + SCRATCH_BYTES[self.device]
        # After dry runs: the libraries they load will be there in training too.
        resident = resident_memory_bytes()
        program = 0 if self.device == "cuda" else PROGRAM_BYTES if resident is None else resident
        return replace(need, program=program, reserve=reserve)

    def validation_bytes(self) -> int:
        """Count the bytes of a validation on the CPU.

        Its windows, four at a time without gradients, hold no more than a step of one sample with its reserve: 0.8 to
        1.2 times its tensors, with networks from nano to base.
        """
        return self.need(1, 1).total + self.scores_bytes

    def most_bytes(self, batch_size: int, accumulation: int) -> int:
        """Count the bytes of a step, or of a validation on the CPU where that takes more."""
        step = self.need(batch_size, accumulation).total
        return max(step, self.validation_bytes()) if self.scores_bytes and self.device == "cpu" else step

    def _dry_run(self, num_samples: int) -> "_Step":
        """One step of ``num_samples`` on fake tensors."""
        precision = DTYPES.get(self._loop.precision)
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), _Ledger() as ledger:
            # What copy.deepcopy does to a fake tensor when an objective makes its teacher: a note to torch's own.
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            # Not moved there as the loop does it: modules of fake tensors cannot be moved.
            with torch.device(self.device):
                objective = self._build().train()
                parameters = ledger.live
                average = WeightAverage(objective, self._optim.ema_decay or 0.0).size_bytes
                batch = {
                    key: torch.empty((num_samples, *shape), dtype=dtype) for key, (shape, dtype) in self._sample.items()
                }
            constant = ledger.live
            schedule = make_schedule(
                self._optim, effective_batch=effective_batch(num_samples, self._loop), max_steps=self._loop.max_steps
            )
            optimizer = build_optimizer(objective, schedule, self._loop.precision)
            if self.device == "cuda":
                for group in optimizer.param_groups:
                    # The library's choice for real parameters on a GPU, which it does not make for fake ones.
                    group["foreach"] = not group["fused"]
            ledger.watch_gradients(objective)
            with torch.autocast(self.device, dtype=precision) if precision else nullcontext():
                # At the end of training, when everything learns that ever does.
                loss = objective(batch, 1.0).loss
            forward = ledger.fullest(constant)
            (loss / self._loop.accumulation).backward()
            accumulating, backward = ledger.most_beside_gradients - constant, ledger.fullest(constant)
            torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0, error_if_nonfinite=False)
            optimizer.step()
            moments = sum(_bytes(value) for state in optimizer.state.values() for value in state.values())
            batch_bytes = constant - parameters
            work = (forward, backward, accumulating, ledger.fullest(constant + moments))
            return _Step(parameters, ledger.gradients, moments + average, batch_bytes, *work, ledger.convolves)


def can_be_known(loop: LoopSettings) -> bool:
    """Whether the memory of steps can be counted: on a CPU, and on a GPU that is there."""
    device = choose_accelerator(loop.accelerator)
    return device == "cpu" or (device == "cuda" and torch.cuda.is_available())


def usable_bytes(loop: LoopSettings, limit_bytes: int | None = None) -> int | None:
    """Memory that one training process may hold in all, including what it holds already.

    Args:
        loop: Settings of the loop. Processes of one machine share its memory, each GPU has its own.
        limit_bytes: What the run may use of each machine, or of each GPU. None for what is free.
    Returns:
        A number of bytes. None when it is unknown.
    """
    device = choose_accelerator(loop.accelerator)
    if limit_bytes is not None:
        return limit_bytes // (loop.devices if device == "cpu" else 1)
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free = available_memory_bytes() if device == "cpu" else None
    return None if free is None else (free + (resident_memory_bytes() or 0)) // loop.devices


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that this process has held so far, on its GPU where it trains on one. None when unknown."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else peak_memory_bytes()


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error says that an allocator, of a GPU or of the CPU, had nothing left."""
    said = str(error)
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "DefaultCPUAllocator" in said or "not enough memory" in said


@dataclass(frozen=True)
class _Step:
    """Bytes of one step on fake tensors. A moment is the work in progress and the gradients that are there beside it.

    Attributes:
        parameters: Bytes of parameters and buffers.
        gradients: Bytes of all gradients.
        optimiser: Bytes of the optimiser's moments and of the average of the weights.
        batch: Bytes of one micro-batch.
        forward: The fullest moment of the forward pass.
        backward: The fullest moment of the backward pass, in which gradients come one by one.
        accumulating: The most work of the backward pass, gradients left out.
        update: The fullest moment of the optimiser's step.
        convolves: Whether the library's convolutions are part of the step.
    """

    parameters: int
    gradients: int
    optimiser: int
    batch: int
    forward: tuple[int, int]
    backward: tuple[int, int]
    accumulating: int
    update: tuple[int, int]
    convolves: bool

    def extended(self, two: Self, num_samples: int) -> Self:
        """The step with ``num_samples``, two or more, on the line through this one (one sample) and ``two``."""

        def at(one: int, other: int) -> int:
            return one + (num_samples - 1) * (other - one)

        gradients = two.backward[1]
        return replace(
            two,
            batch=at(self.batch, two.batch),
            forward=(at(self.forward[0], two.forward[0]), 0),
            backward=(at(sum(self.backward), sum(two.backward)) - gradients, gradients),
            accumulating=at(self.accumulating, two.accumulating),
        )


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps count of the bytes of all storages that operations make and that are still alive.

    Attributes:
        live: Bytes that are alive now.
        gradients: Bytes of gradients of parameters among them.
        most_beside_gradients: The most bytes alive that were no gradients, since the last look.
        convolves: Whether the library has been asked for a convolution.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.gradients = self.most_beside_gradients = 0
        self.convolves = False
        self._fullest = (0, 0)
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            # Half of all calls: every look at a fake tensor's device is one.
            return args[0].fake_device
        self.convolves |= func is torch.ops.aten.convolution.default
        results = func(*args, **(kwargs or {}))
        is_range = getattr(func, "overloadpacket", None) is torch.ops.aten.arange
        if is_range and results.numel() <= MAX_AXES and results.fake_device.type == "cpu":
            # It counts axes, and MONAI's losses read its values.
            with unset_fake_temporarily():
                results = func(*args, **(kwargs or {}))
        self._enter(results)
        return results

    def watch_gradients(self, objective: Objective) -> None:
        """Begin to look for the fullest moment, with gradients counted apart as soon as they are in place."""

        def count(parameter: Tensor) -> None:
            if parameter.grad is not None:
                self.gradients += _bytes(parameter.grad)

        self._fullest, self.most_beside_gradients = (self.live, 0), self.live
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(count)  # type: ignore[no-untyped-call]

    def fullest(self, constant: int) -> tuple[int, int]:
        """The fullest moment since the last look, as work beyond ``constant`` bytes and gradients beside it."""
        live, gradients = self._fullest
        self._fullest, self.most_beside_gradients = (self.live, self.gradients), self.live - self.gradients
        return live - gradients - constant, gradients

    def _enter(self, results: Any) -> None:
        if isinstance(results, Tensor):
            storage = results.untyped_storage()
            key = id(storage)
            if key not in self._known:
                num_bytes = storage.nbytes()
                # A storage keeps its object in Python, and so its place in this table, for as long as it lives.
                self._known[key] = weakref.ref(storage, lambda _: self._leave(key)), num_bytes
                self.live += num_bytes
                self._fullest = max(self._fullest, (self.live, self.gradients))
                self.most_beside_gradients = max(self.most_beside_gradients, self.live - self.gradients)
        elif isinstance(results, (tuple, list)):
            for result in results:
                self._enter(result)

    def _leave(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


def _bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
