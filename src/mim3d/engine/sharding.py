"""Weights spread over the processes (FSDP), and the whole ones that are looked at, saved and exported.

Fully sharded data parallelism (Zhao et al., "PyTorch FSDP", VLDB 2023), by torch's ``fully_shard``: every process keeps
a slice of each parameter, its gradient and its moments, and has a block whole only while it computes with it. What
leaves the processes is whole again, so that a checkpoint fits any number of them, sharded or not.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mim3d.errors import ConfigError
from mim3d.objective import Objective


def shard(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Spread the parameters of ``module`` over a mesh of one or two axes, the first of them that of the data.

    Each member of a module list, which is a block of a network or of a decoder, is gathered by itself when it is
    called; what lies outside of blocks is gathered once for the whole step. Members without parameters are left alone.
    """
    processes = mesh["data_parallel"] if mesh.ndim > 1 else mesh
    for part in list(module.modules()):
        if isinstance(part, nn.ModuleList):
            for block in part:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=processes)
    fully_shard(module, mesh=processes)
    return module


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is spread over processes; any other as it is. A collective call for the former."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_sharding(device_type: str, objective: Objective | None, *, averaged: bool) -> None:
    """Refuse what FSDP cannot train; settings alone are checked by :class:`LoopSettings`.

    Args:
        device_type: on what it would train.
        objective: what it would train; None where that is not built yet.
        averaged: whether an average of the weights is kept.
    Raises:
        ConfigError: for a device without collective operations, or weights that something else than the optimiser reads
            or changes at every step.
    """
    if device_type not in ("cpu", "cuda"):
        reason, remedy = f"{device_type} devices cannot exchange slices", "use strategy auto"
    elif averaged:
        reason, remedy = "optim.ema_decay averages whole weights at every step", "use strategy ddp, or ema_decay 0"
    elif objective is not None and type(objective).after_step is not Objective.after_step:
        reason = f"{type(objective).__name__} updates weights outside the optimiser, for which they must be whole"
        remedy = "use strategy ddp"
    else:
        return
    raise ConfigError(f"strategy fsdp does not work here: {reason}; {remedy}.")


class Weights:
    """The objective as it is trained, and as it is whole.

    Args:
        whole: on every process; filled by :meth:`gather`.
        trained: what takes the steps: ``whole`` itself, or a copy of it to be sharded.
    """

    def __init__(self, whole: Objective, trained: Objective) -> None:
        self.whole = whole
        self.trained = trained

    @classmethod
    def of(cls, objective: Objective, *, sharded: bool) -> "Weights":
        """The objective itself, or beside it a copy that may be sharded."""
        return cls(objective, copy.deepcopy(objective) if sharded else objective)

    @property
    def sharded(self) -> bool:
        """Whether no process holds all that is trained."""
        return self.trained is not self.whole

    @torch.no_grad()
    def gather(self) -> None:
        """Bring the trained weights into the whole objective, in every process; a collective call."""
        if self.sharded:
            trained = self.trained.state_dict()
            for name, value in self.whole.state_dict().items():
                value.copy_(whole_tensor(trained[name]))

    @torch.no_grad()
    def scatter(self) -> None:
        """Take the trained weights from the whole objective, each process its slices."""
        if self.sharded:
            trained = self.trained.state_dict()
            for name, value in self.whole.state_dict().items():
                trained[name].copy_(_like(trained[name], value))

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The optimiser's state with whole moments, as an unsharded run has it; a collective call."""
        content: dict[str, Any] = optimizer.state_dict()
        if self.sharded:
            content["state"] = {
                index: {name: whole_tensor(value).cpu() for name, value in moments.items()}
                for index, moments in content["state"].items()
            }
        return content

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> None:
        """Give the optimiser a state with whole moments, each process its slices."""
        if not self.sharded:
            optimizer.load_state_dict(dict(content))
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {
            index: {
                # A count of steps is no moment of any weight.
                name: _like(parameters[index], value) if value.ndim else value
                for name, value in moments.items()
            }
            for index, moments in content["state"].items()
        }
        optimizer.load_state_dict({**content, "state": state})

    @contextmanager
    def shown_on(self, device: torch.device) -> Iterator[None]:
        """Have the whole objective on ``device``; a copy goes back to the host, whose memory is larger."""
        if not self.sharded:
            yield
            return
        self.whole.to(device)
        try:
            yield
        finally:
            self.whole.to("cpu")


def _like(sample: Tensor, value: Tensor) -> Tensor:
    """A whole tensor spread as ``sample`` is, without a message: every process has all of it."""
    if not isinstance(sample, DTensor):
        return value
    value = value.to(sample.device, sample.dtype)
    return distribute_tensor(value, sample.device_mesh, sample.placements, src_data_rank=None)
