"""Processes, devices, precision, compilation, seeds, and the way of batches to the device.

This is the only place that sets up Lightning Fabric.
"""

import functools
import logging
import random
import warnings
from collections.abc import Generator, Iterator
from datetime import timedelta
from typing import Any

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.wrappers import _FabricModule as FabricModule
from torch import Tensor, nn

from mim3d.core.errors import ConfigError, Mim3dError, first_line
from mim3d.core.names import number_of
from mim3d.core.resources import choose_accelerator, choose_device
from mim3d.distributed.processes import choose_processes, export_to_torch, launched_rank
from mim3d.kernels.machine import find_compiler, keep_freed_memory
from mim3d.nn.blocks import ConvBlock, TransformerBlock
from mim3d.objective import Batch, Objective
from mim3d.training.settings import BatchSource, LoopSettings

__all__ = ["DeviceBatches", "FabricModule", "StepModule", "check_machine", "compile_blocks", "launch", "seed_step"]

# torch leaves it without types.
_cuda: Any = torch.cuda

# The other processes wait while the first one validates, so the usual half hour is too short.
_PATIENCE = timedelta(hours=3)

#: Shapes of input that a kind of block is compiled for: three or more stages times the levels of a hierarchy, and those
#: of validation; beyond the library's limit of 8 a block would silently not be compiled.
NUM_SHAPES = 64


class InputKeepingMixedPrecision(MixedPrecision):
    """Mixed precision by autocast alone, so that the targets of a reconstruction stay float32."""

    def convert_input(self, data: Any) -> Any:
        """Leave the inputs as they are."""
        return data


class StepModule(nn.Module):
    """An objective whose output is a plain tuple, as Fabric and DistributedDataParallel want it.

    Args:
        objective: Computes loss and logs.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute loss and detached logs of one micro-batch."""
        output = self.objective(batch, progress)
        return output.loss, {name: value.detach() for name, value in output.logs.items()}


def launch(loop: LoopSettings) -> lightning_fabric.Fabric:
    """Start the processes that train, and return this one's Fabric.

    With several devices every further process runs the same command from its beginning. None of them writes.

    Raises:
        ConfigError: The machine lacks what was asked for.
        Mim3dError: The processes do not find each other.
    """
    check_machine(loop)
    accelerator, place = choose_accelerator(loop.accelerator), launched_rank()
    # Fabric's own reader of SLURM's variables takes a shell inside an allocation for a task, and then waits for others
    # that never come. What is read here of real tasks is handed on as torchrun would.
    plugins: list[Any] = [LightningEnvironment() if place is None else TorchElasticEnvironment()]
    if place is not None:
        export_to_torch(place)
    assert loop.precision != "auto", "what auto comes to is chosen before there are several processes"
    if loop.precision != "32-true":
        device = accelerator if accelerator in ("cpu", "mps") else "cuda"
        plugins.append(InputKeepingMixedPrecision(usable_precision(loop.precision, device), device))  # type: ignore[arg-type]
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=accelerator,
            # Networks may hold parameters that one objective does not train, such as mask tokens during fine-tuning,
            # and others that some batches leave out.
            strategy="auto" if loop.world_size == 1 else DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE),
            devices=loop.devices,
            num_nodes=loop.num_nodes,
            plugins=plugins,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"devices {loop.devices}, num_nodes {loop.num_nodes}, accelerator '{loop.accelerator}' and "
            f"precision '{loop.precision}' do not work on this machine: {' '.join(str(error).split())}"
        ) from error
    # It numbers every process on a line of its own; the run's first lines say how many there are.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Of a weight with one input channel, whose strides can be written in two ways for the same memory.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        reason = first_line(error)
        raise Mim3dError(
            f"The {fabric.world_size} processes of this run did not find each other ({reason}); look whether one of "
            "them has ended before, and whether the network lets them reach MASTER_ADDR at MASTER_PORT."
        ) from error
    if fabric.device.type == "cpu":
        keep_freed_memory()
    allow_tf32(loop.tf32)
    return fabric


class DeviceBatches(Iterator[Batch]):
    """The micro-batches of this process, on its device.

    Args:
        fabric: Lightning Fabric of this process.
        source: Where the micro-batches come from.
        effective_batch: Samples per optimiser step over all processes.
        done: Optimiser steps that were done before.
    """

    def __init__(self, fabric: lightning_fabric.Fabric, source: BatchSource, effective_batch: int, done: int) -> None:
        self._fabric = fabric
        self._source = source
        self._effective_batch = effective_batch
        self._read: Iterator[Batch] = iter(())
        self._batches = self._read
        self.restart_after(done)

    def __next__(self) -> Batch:
        return next(self._batches)

    def restart_after(self, done: int) -> None:
        """Close the readers and go back to the first micro-batch after optimiser step ``done``."""
        for batches in (self._batches, self._read):
            if isinstance(batches, Generator):
                batches.close()
        first_sample, fabric = done * self._effective_batch, self._fabric
        self._read = self._source.batches(first_sample, rank=fabric.global_rank, world_size=fabric.world_size)
        self._batches = on_device(fabric, self._read)


def on_device(fabric: lightning_fabric.Fabric, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each on the device when it is given.

    On a GPU they travel on a stream of their own. A batch is asked for once the step before it is enqueued, so that its
    way to the device, and its conversion there, overlap with that step. The step that uses it waits for it on the
    device, never on the host. The ring of the loader asks for a slot's next batch when that stream is done with it,
    since it records its events on the stream that is current while a batch is asked for.
    """
    if fabric.device.type != "cuda":
        for batch in batches:
            yield fabric.to_device(batch)
        return
    uploads = _cuda.Stream(fabric.device)
    while True:
        with _cuda.stream(uploads):
            batch = fabric.to_device(next(batches))
        computing = _cuda.current_stream(fabric.device)
        computing.wait_stream(uploads)
        for value in batch.values():
            # Its memory is the upload stream's; it must not be given to a later batch while this step reads it.
            value.record_stream(computing)
        yield batch


def check_machine(loop: LoopSettings) -> None:
    """Refuse devices and compilers that are not there, before anything is started.

    Raises:
        ConfigError: The device or a compiler is missing, or a machine shows fewer GPUs than it has processes. The
            message says what SLURM must be asked for where it hides GPUs from its tasks.
    """
    # Where a launcher has started other numbers than these: a refusal, not a wait for processes that never come.
    choose_processes(loop.devices, loop.num_nodes)
    accelerator = choose_device(loop.accelerator).type
    if loop.compile and accelerator == "cpu" and find_compiler() is None:
        raise ConfigError("compile is true, but this machine has no C++ compiler; install one, or leave it out.")
    if accelerator == "cuda" and torch.cuda.device_count() < loop.devices:
        remedy, place = "use fewer --devices", launched_rank()
        if place is not None and place.launcher == "srun":
            remedy = "ask for --gpus-per-node instead of --gpus-per-task, so that every task sees all of its machine"
        raise ConfigError(
            f"devices is {loop.devices}, but this process sees {number_of(torch.cuda.device_count(), 'GPU')}; {remedy}."
        )


def usable_precision(precision: str, device: str) -> str:
    """The precision asked for; for a run that began in bfloat16, on a GPU without it, float16 with loss scaling."""
    if precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn("this GPU has no bfloat16; precision 16-mixed (float16 with loss scaling) is used.", stacklevel=2)
        return "16-mixed"
    return precision


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on a GPU be computed in TF32, or not. torch itself allows half of it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def compile_blocks(module: nn.Module) -> int:
    """Let ``torch.compile`` compile every convolution and transformer block when it is first used.

    Blocks of one kind and shape share what is compiled for them, so that it takes seconds where a whole network takes
    minutes. Names and values of parameters stay as they are.

    Returns:
        The number of blocks.
    Raises:
        ConfigError: The network has no such blocks.
    """
    blocks = [part for part in module.modules() if isinstance(part, (ConvBlock, TransformerBlock))]
    if not blocks:
        raise ConfigError("compile is true, but this network has no blocks that mim3d compiles; leave it out.")
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, NUM_SHAPES)
    for block in blocks:
        block.compile(dynamic=False)
    return len(blocks)


def spare_thin_convolutions(module: nn.Module) -> None:
    """Let dense convolutions of maps thinner than their kernel compute in float32 on a CPU, whatever the precision.

    In bfloat16 the library's gradient of their weights holds memory that nobody wrote, infinite values among it (oneDNN
    of torch 2.13, with the first axis of the map shorter than the kernel; every other shape is right).
    """
    for part in module.modules():
        if type(part) is nn.Conv3d and part.kernel_size[0] > 1:
            part.forward = functools.partial(_convolved, part)  # type: ignore[method-assign]


def _convolved(convolution: nn.Conv3d, features: Tensor) -> Tensor:
    if features.shape[2] >= convolution.kernel_size[0]:
        return nn.Conv3d.forward(convolution, features)
    with torch.autocast("cpu", enabled=False):
        return nn.Conv3d.forward(convolution, features.float())


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed every global generator as a pure function of (seed, step, rank).

    This is done before each step, so that a resumed run draws the same numbers without any stored state, and neither a
    validation nor a picture in between changes what is drawn after it. Step 0 is for building the network.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3, np.uint64)
    # Not by torch.manual_seed, which formats a traceback at every call where no GPU is in use: a tenth of a ms.
    torch.default_generator.manual_seed(int(words[0]))
    if _cuda.is_initialized():
        _cuda.manual_seed_all(int(words[0]))
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))
