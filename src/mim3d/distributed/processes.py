"""The processes of one run: how torchrun or srun has started them, and how the others wait for the first one.

A command runs from its beginning in every process. The first process makes what all of them need on disk. The others
wait for it through a key-value store, at the address where the processes meet for training anyway, and learn there when
the first one has failed.
"""

import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mim3d.core.errors import ConfigError, Mim3dError
from mim3d.core.names import number_of

#: Importing a large environment from a busy network disk takes minutes, and not the same time in every process.
_CONNECT_TIMEOUT = timedelta(minutes=10)

#: How long a failed first process stays, so that the others can read why it failed.
_FAREWELL_S = 20.0

_POLL_S = 0.5


@dataclass(frozen=True)
class ProcessRank:
    """The place of this process among all processes of a run.

    Attributes:
        launcher: What started the processes: ``torchrun``, ``srun``, or ``mim3d`` where Fabric starts them.
        rank: Number of this process among all processes.
        local_rank: Number of this process among those of its machine.
        node_rank: Number of its machine.
        devices: Number of processes on each machine.
        num_nodes: Number of machines.
    """

    launcher: Literal["torchrun", "srun", "mim3d"]
    rank: int
    local_rank: int
    node_rank: int
    devices: int
    num_nodes: int

    @property
    def world_size(self) -> int:
        """Number of all processes."""
        return self.devices * self.num_nodes

    @property
    def num_at_start(self) -> int:
        """Number of processes that begin at once: all, or one on each machine where Fabric starts the others."""
        return self.num_nodes if self.launcher == "mim3d" else self.world_size


def launched_rank() -> ProcessRank | None:
    """Read how torchrun or srun has started this process.

    A step of one task (``srun --pty bash``) is not a launch: a command in it may start processes itself.

    Returns:
        The rank of this process, or None where no launcher has started several processes.
    Raises:
        ConfigError: The machines have different numbers of processes.
    """
    variables = os.environ
    if "TORCHELASTIC_RUN_ID" in variables and "LOCAL_WORLD_SIZE" in variables:
        devices, world_size = int(variables["LOCAL_WORLD_SIZE"]), int(variables["WORLD_SIZE"])
        num_nodes = int(variables.get("GROUP_WORLD_SIZE", world_size // devices))
        if devices * num_nodes != world_size:
            raise ConfigError(
                f"torchrun has started {world_size} processes on {num_nodes} machines, {devices} of them on this one; "
                "give every machine the same --nproc_per_node."
            )
        local_rank, node_rank = int(variables["LOCAL_RANK"]), int(variables.get("GROUP_RANK", 0))
        return ProcessRank("torchrun", int(variables["RANK"]), local_rank, node_rank, devices, num_nodes)
    if "SLURM_STEP_ID" in variables and int(variables.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        tasks, num_nodes = int(variables["SLURM_STEP_NUM_TASKS"]), int(variables.get("SLURM_STEP_NUM_NODES", "1"))
        # Such as "4(x2)": four tasks on each of two machines; "4,3" where they differ.
        spread = variables.get("SLURM_STEP_TASKS_PER_NODE", str(tasks // num_nodes))
        if tasks % num_nodes or "," in spread:
            raise ConfigError(
                f"srun has started {number_of(tasks, 'task')} on {number_of(num_nodes, 'machine')} ({spread}), not as "
                "many on each; use --ntasks-per-node instead of --ntasks."
            )
        rank, local_rank, node_rank = (int(variables[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "NODEID"))
        return ProcessRank("srun", rank, local_rank, node_rank, tasks // num_nodes, num_nodes)
    return None


def choose_processes(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    """Choose the number of processes: as given, else as a launcher has started them, else one.

    Args:
        devices: Processes on each machine, where they are given.
        num_nodes: Machines, where they are given.
    Returns:
        The number of processes on each machine, and the number of machines.
    Raises:
        ConfigError: A number is below 1 or contradicts the launcher, or several machines are asked for and no launcher
            connects them.
    """
    for name, given in (("devices", devices), ("num_nodes", num_nodes)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} is {given}; it must be at least 1.")
    place = launched_rank()
    if place is not None:
        for name, given, found in (("devices", devices, place.devices), ("num_nodes", num_nodes, place.num_nodes)):
            if given is not None and given != found:
                raise ConfigError(
                    f"{name} is {given}, but {place.launcher} has started {number_of(place.devices, 'process')} on "
                    f"each of {number_of(place.num_nodes, 'machine')}; leave {name} out (or give --{name} {found}), or "
                    "start as many."
                )
        return place.devices, place.num_nodes
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if num_nodes is not None and num_nodes > 1 and missing:
        raise ConfigError(
            f"num_nodes is {num_nodes}, but nothing tells the machines of each other; start them by torchrun or srun, "
            f"or set {', '.join(missing)} on each."
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if devices is None and tasks.isdigit() and int(tasks) > 1 and "LOCAL_RANK" not in os.environ:
        warnings.warn(
            f"SLURM has room for {tasks} tasks here, but this process was not started by srun and trains alone; put "
            "srun before mim3d, or say how many with --devices.",
            stacklevel=2,
        )
    return devices or 1, num_nodes or 1


class Processes:
    """The processes of a run before training begins, while the first one makes what the others need.

    Args:
        place: Rank of this process.
        store: Key-value store through which the processes talk. None where no other process waits: Fabric starts its
            processes only after the first one has made everything.
    """

    def __init__(self, place: ProcessRank, store: Store | None) -> None:
        self.place = place
        self._store = store
        self._acknowledged = False
        self._met = False

    @property
    def is_first(self) -> bool:
        """Whether this process makes what all processes need."""
        return self.place.rank == 0

    def announce(self, name: str, value: str) -> None:
        """Tell the others that the first process has made ``name``.

        Raises:
            Mim3dError: Another process has failed meanwhile.
        """
        if self._store is not None:
            self._raise_failure(self._store)
            self._store.set(name, value)

    def wait_for(self, name: str) -> str | None:
        """Wait until the first process announces ``name``.

        Returns:
            The announced value. None where the first process made it before this one was started.
        Raises:
            Mim3dError: The first process has failed or cannot be reached.
        """
        store = self._store
        if store is None:
            return None
        try:
            while not store.check([name]):
                self._raise_failure(store)
                time.sleep(_POLL_S)
            return store.get(name).decode()
        except (RuntimeError, ValueError) as error:
            raise _unreachable(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}") from error

    def barrier(self) -> None:
        """Wait until every process has come to this line.

        Raises:
            Mim3dError: A process has failed before, or the first one cannot be reached.
        """
        store = self._store
        if store is None:
            return
        if not self.is_first:
            store.add("arrived", 1)
            self.wait_for("all")
        else:
            while store.add("arrived", 0) < self.place.num_at_start - 1:
                self._raise_failure(store)
                time.sleep(_POLL_S)
            self.announce("all", "here")
        self._met = True

    def fail(self, reason: str, *, linger: bool = True) -> None:
        """Tell the others why this process ends. Does nothing after the barrier, when training has its own ways.

        Args:
            reason: Why this process ends.
            linger: Whether the first process stays a moment for those that are still starting. The store may end with
                it.
        """
        store = self._store
        if store is None or self._met:
            return
        try:
            if not store.check(["failed"]):
                store.set("failed", reason)
            if not self._acknowledged:
                store.add("heard", 1)
            until = time.monotonic() + (_FAREWELL_S if linger and self.is_first else 0.0)
            while time.monotonic() < until and store.add("heard", 0) < self.place.num_at_start:
                time.sleep(_POLL_S)
        except (RuntimeError, ValueError):
            # The process that keeps the store has ended: nobody is left to be told.
            return

    def _raise_failure(self, store: Store) -> None:
        if store.check(["failed"]):
            reason = store.get("failed").decode()
            if not self._acknowledged:
                store.add("heard", 1)
            self._acknowledged = True
            raise Mim3dError(f"process {self.place.rank} ends because another one has failed: {reason}")


@contextmanager
def join_processes(devices: int, num_nodes: int) -> Iterator[Processes]:
    """Join the processes of a run, and tell all of them when this one fails.

    Args:
        devices: Number of processes on each machine.
        num_nodes: Number of machines.
    Raises:
        Mim3dError: The first process cannot be reached.
    """
    place = launched_rank()
    if place is None:
        node_rank, local_rank = (int(os.environ.get(name, 0)) for name in ("NODE_RANK", "LOCAL_RANK"))
        place = ProcessRank("mim3d", node_rank * devices + local_rank, local_rank, node_rank, devices, num_nodes)
    store: Store | None = None
    # Fabric starts its processes on one machine only after the first one has made everything.
    alone = place.launcher == "mim3d" and (place.num_nodes == 1 or place.local_rank > 0)
    if place.world_size > 1 and not alone:
        export_to_torch(place)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent keeps a store at this address already, over restarts too: each attempt has keys of its own.
        kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        is_master = place.rank == 0 and not kept
        try:
            # The store by which the processes meet for training is opened at the same address later: multi_tenant.
            tcp = TCPStore(
                host, port, is_master=is_master, timeout=_CONNECT_TIMEOUT, wait_for_workers=False, multi_tenant=True
            )
        except (RuntimeError, ValueError) as error:
            raise _unreachable(f"{host}:{port}") from error
        store = PrefixStore(f"mim3d/{attempt}", tcp)
    processes = Processes(place, store)
    try:
        yield processes
    except BaseException as error:
        processes.fail(str(error).strip() or type(error).__name__, linger=isinstance(error, Exception))
        raise


def export_to_torch(place: ProcessRank) -> None:
    """Set the variables by which torch finds the other processes, where srun has started them; torchrun sets its own.

    Unless MASTER_ADDR and MASTER_PORT are set, the processes meet on the first machine of the step, at a port that
    follows from the numbers of job and step.
    """
    if place.launcher != "srun":
        return
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

    variables = os.environ
    machines = variables.get("SLURM_STEP_NODELIST", variables.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    variables.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(machines))
    number = int(variables.get("SLURM_JOB_ID", "0")) + 7919 * int(variables["SLURM_STEP_ID"])
    # Below the ports that Linux gives to outgoing connections.
    variables.setdefault("MASTER_PORT", str(15000 + number % 15000))
    variables |= {"RANK": str(place.rank), "LOCAL_RANK": str(place.local_rank), "GROUP_RANK": str(place.node_rank)}
    variables["WORLD_SIZE"] = str(place.world_size)


def _unreachable(address: str) -> Mim3dError:
    return Mim3dError(
        f"{socket.gethostname()} does not reach the first process at {address}: it has ended, or the network does not "
        "let it be reached; look at its own message, then at MASTER_ADDR and MASTER_PORT."
    )
