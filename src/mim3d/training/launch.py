"""Processes, devices, precision and seeds: the only place that sets up Lightning Fabric."""

import random
import warnings
from datetime import timedelta
from typing import Any

import lightning_fabric
import numpy as np
import torch
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.strategy import Strategy
from lightning_fabric.utilities.exceptions import MisconfigurationException
from lightning_fabric.wrappers import _FabricModule as FabricModule
from torch import Tensor, nn

from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.distributed.processes import Launched, choose_processes, launched, meeting_place
from mim3d.kernels.allocator import keep_freed_memory
from mim3d.objective import Batch, Objective
from mim3d.training.compiling import require_compiler
from mim3d.training.settings import LoopSettings

__all__ = ["FabricModule", "StepModule", "check_machine", "choose_accelerator", "device_name", "launch", "seed_step"]

# torch leaves it without types.
_cuda: Any = torch.cuda

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
    check_machine(loop)
    accelerator, place = choose_accelerator(loop.accelerator), launched()
    plugins: list[Any] = [LightningEnvironment() if place is None else StartedElsewhere(place)]
    if loop.precision != "32-true":
        device = accelerator if accelerator in ("cpu", "mps") else "cuda"
        plugins.append(InputKeepingMixedPrecision(usable_precision(loop.precision, device), device))  # type: ignore[arg-type]
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=accelerator,
            strategy=_strategy(loop),
            devices=loop.devices,
            num_nodes=loop.num_nodes,
            plugins=plugins,
        )
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"devices {loop.devices}, num_nodes {loop.num_nodes}, accelerator '{loop.accelerator}' and "
            f"precision '{loop.precision}' do not work on this machine: {' '.join(str(error).split())}"
        ) from error
    _meet(fabric)
    if fabric.device.type == "cpu":
        keep_freed_memory()
    allow_tf32(loop.tf32)
    return fabric


def _meet(fabric: lightning_fabric.Fabric) -> None:
    """Start what is still to be started, and wait until all are there.

    Raises:
        Mim3dError: when the others cannot be reached.
    """
    try:
        fabric.launch()
    except torch.distributed.DistError as error:
        reason = str(error).strip().splitlines()[0]
        raise Mim3dError(
            f"The {fabric.world_size} processes of this run did not find each other ({reason}); look whether one of "
            "them has ended before, and whether the network lets them reach MASTER_ADDR at MASTER_PORT."
        ) from error


def _strategy(loop: LoopSettings) -> Strategy | str:
    """How the processes keep their weights the same."""
    if loop.world_size == 1:
        return "auto"
    # Networks may hold parameters that one objective does not train, such as mask tokens during fine-tuning, and others
    # that some batches leave out.
    return DDPStrategy(find_unused_parameters=True, timeout=_PATIENCE)


def check_machine(loop: LoopSettings) -> None:
    """Refuse a device that is not there, and more processes on a machine than it shows GPUs; nothing is started.

    Raises:
        ConfigError: with what SLURM must be asked for, where it hides GPUs from its tasks.
    """
    # Where a launcher has started other numbers than these: a refusal, not a wait for processes that never come.
    choose_processes(loop.devices, loop.num_nodes)
    accelerator = choose_accelerator(loop.accelerator)
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found[accelerator]:
        raise ConfigError(
            f"accelerator is '{loop.accelerator}', but this machine shows no such device; use accelerator "
            f"{' or '.join(name for name, there in found.items() if there)}, or auto."
        )
    if loop.compile:
        require_compiler(accelerator)
    if accelerator != "cuda" or torch.cuda.device_count() >= loop.devices:
        return
    remedy, place = "use fewer --devices", launched()
    if place is not None and place.by == "srun":
        remedy = "ask for --gpus-per-node instead of --gpus-per-task, so that every task sees all of its machine"
    raise ConfigError(f"devices is {loop.devices}, but this process sees {torch.cuda.device_count()} GPUs; {remedy}.")


class StartedElsewhere(ClusterEnvironment):
    """A process that torchrun or srun has started, as Fabric asks about it.

    Fabric's own reader of SLURM's variables takes a shell inside an allocation for a task, and then waits for others
    that never come; this one is for real tasks of one step.

    Args:
        place: where the launcher has put it.
    """

    def __init__(self, place: Launched) -> None:
        super().__init__()
        self._place = place

    @property
    def creates_processes_externally(self) -> bool:
        """All are there already."""
        return True

    @property
    def main_address(self) -> str:
        """Host of the first process."""
        return meeting_place(self._place)[0]

    @property
    def main_port(self) -> int:
        """Port on that host."""
        return meeting_place(self._place)[1]

    @staticmethod
    def detect() -> bool:
        """Whether a launcher has started several processes."""
        return launched() is not None

    def world_size(self) -> int:
        """Processes in all."""
        return self._place.world_size

    def set_world_size(self, size: int) -> None:
        """Nothing: the launcher has decided."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self._place.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing: the launcher has decided."""

    def local_rank(self) -> int:
        """Number of this process on its machine, and of its device."""
        return self._place.local_rank

    def node_rank(self) -> int:
        """Number of this machine."""
        return self._place.node_rank


def usable_precision(precision: str, device: str) -> str:
    """The precision asked for; float16 with loss scaling, and a warning, on a GPU without bfloat16."""
    if precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        warnings.warn("this GPU has no bfloat16; precision 16-mixed (float16 with loss scaling) is used.", stacklevel=2)
        return "16-mixed"
    return precision


def allow_tf32(allowed: bool) -> None:
    """Let float32 products and convolutions on a GPU be computed in TF32, or not; the library allows half of it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


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
    _seed_torch(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))


def _seed_torch(seed: int) -> None:
    """As ``torch.manual_seed``, which formats a traceback at every call where no GPU is in use: a tenth of a ms."""
    torch.default_generator.manual_seed(seed)
    if _cuda.is_initialized():
        _cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def device_name(device: torch.device) -> str:
    """The device in words, for people."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type
