"""Processes, devices, precision and seeds: the only place that sets up Lightning Fabric."""

import random
import warnings
from datetime import timedelta
from typing import Any

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.wrappers import _FabricModule as FabricModule
from torch import Tensor, nn

from mim3d.engine.settings import LoopSettings
from mim3d.errors import ConfigError
from mim3d.kernels.allocator import keep_freed_memory
from mim3d.objective import Batch, Objective

__all__ = ["FabricModule", "StepModule", "choose_accelerator", "device_name", "launch", "seed_step"]

# The other processes wait while the first one validates, so the usual half hour is too short.
_PATIENCE = timedelta(hours=3)


class InputKeepingMixedPrecision(MixedPrecision):
    """Mixed precision by autocast alone, so that the targets of a reconstruction stay float32."""

    def convert_input(self, data: Any) -> Any:
        """Leave the inputs as they are."""
        return data


class StepModule(nn.Module):
    """An objective whose output is a plain tuple, as Fabric and DistributedDataParallel want it."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and detached logs of one micro-batch."""
        output = self.objective(batch, progress)
        return output.loss, {name: value.detach() for name, value in output.logs.items()}


def launch(loop: LoopSettings) -> lightning_fabric.Fabric:
    """Start the processes that train together, and return this one's Fabric.

    With several devices every further process runs the same command from its beginning; none of them writes.

    Raises:
        ConfigError: when the machine lacks what was asked for.
    """
    accelerator = choose_accelerator(loop.accelerator)
    precision: dict[str, Any] = {"precision": "32-true"}
    if loop.precision != "32-true":
        device = accelerator if accelerator in ("cpu", "mps") else "cuda"
        usable = usable_precision(loop.precision, device)
        precision = {"plugins": [InputKeepingMixedPrecision(usable, device)]}  # type: ignore[arg-type]
    # Networks may hold parameters that one objective does not train: such as mask tokens during fine-tuning.
    several = loop.world_size > 1
    strategy = DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE) if several else "auto"
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=accelerator,
            strategy=strategy,
            devices=loop.devices,
            num_nodes=loop.num_nodes,
            **precision,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"devices {loop.devices}, num_nodes {loop.num_nodes}, accelerator '{loop.accelerator}' and "
            f"precision '{loop.precision}' do not work on this machine: {' '.join(str(error).split())}"
        ) from error
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_freed_memory()
    if fabric.world_size != loop.world_size:
        raise ConfigError(
            f"{fabric.world_size} processes were started, but devices {loop.devices} x num_nodes "
            f"{loop.num_nodes} make {loop.world_size}; give --devices and --num_nodes as they were launched."
        )
    return fabric


def usable_precision(precision: str, device: str) -> str:
    """The precision asked for; float16 with loss scaling, and a warning, on a GPU without bfloat16."""
    if precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn("this GPU has no bfloat16; precision 16-mixed (float16 with loss scaling) is used.", stacklevel=2)
        return "16-mixed"
    return precision


def choose_accelerator(name: str) -> str:
    """The kind of device that a loop of this ``accelerator`` runs on: ``cpu``, ``cuda`` or ``mps``."""
    if name != "auto":
        return "cuda" if name == "gpu" else name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed every global generator as a pure function of (seed, step, rank).

    Done before each step, so that a resumed run draws the same numbers without any stored state, and neither
    a validation nor a picture in between changes what is drawn after it. Step 0 is for building the network.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3, np.uint64)
    torch.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))


def device_name(device: torch.device) -> str:
    """The device in words, for people."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type
