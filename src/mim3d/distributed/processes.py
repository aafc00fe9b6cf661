"""The processes of one run: what torchrun or srun says of them, and how all but the first wait for it.

A command runs from its beginning in every process. What they share on disk is made by the first; the others wait, by a
key-value store at the address where they will meet for training anyway, and learn there when the first one has failed.
"""

import os
import socket
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from mim3d.core.errors import ConfigError, Mim3dError

#: Importing a large environment from a busy network disk takes minutes, and not the same in every process.
_UNTIL_THE_FIRST_ANSWERS = timedelta(minutes=10)

#: How long a failed first process stays to tell the others why.
_FAREWELL_S = 20.0

_POLL_S = 0.5


@dataclass(frozen=True)
class Launched:
    """Where a launcher has put this process.

    Attributes:
        by: ``torchrun``, ``srun``, or ``mim3d`` for processes that Fabric starts on one machine.
        rank: number of this process among all.
        local_rank: number among those of its machine.
        node_rank: number of its machine.
        devices: processes on each machine.
        num_nodes: machines.
    """

    by: Literal["torchrun", "srun", "mim3d"]
    rank: int
    local_rank: int
    node_rank: int
    devices: int
    num_nodes: int

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.devices * self.num_nodes

    @property
    def num_meeting(self) -> int:
        """Processes that begin at once: all, or where mim3d starts the others later, one on each machine."""
        return self.num_nodes if self.by == "mim3d" else self.world_size


def launched() -> Launched | None:
    """What torchrun or srun says of this process; None where no launcher has started several.

    A step of one task (``srun --pty bash``) counts as none: what is started there may start processes itself.

    Raises:
        ConfigError: when the machines have different numbers of processes.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment and "LOCAL_WORLD_SIZE" in environment:
        return _by_torchrun(environment)
    if "SLURM_STEP_ID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _by_srun(environment)
    return None


def _by_torchrun(environment: Mapping[str, str]) -> Launched:
    devices, world_size = int(environment["LOCAL_WORLD_SIZE"]), int(environment["WORLD_SIZE"])
    num_nodes = int(environment.get("GROUP_WORLD_SIZE", world_size // devices))
    if devices * num_nodes != world_size:
        raise ConfigError(
            f"torchrun has started {world_size} processes on {num_nodes} machines, {devices} of them on this one; give "
            "every machine the same --nproc_per_node."
        )
    local_rank, node_rank = int(environment["LOCAL_RANK"]), int(environment.get("GROUP_RANK", 0))
    return Launched("torchrun", int(environment["RANK"]), local_rank, node_rank, devices, num_nodes)


def _by_srun(environment: Mapping[str, str]) -> Launched:
    tasks, num_nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    # Such as "4(x2)": four tasks on each of two machines; "4,3" where they differ.
    spread = environment.get("SLURM_STEP_TASKS_PER_NODE", str(tasks // num_nodes))
    if tasks % num_nodes or "," in spread:
        raise ConfigError(
            f"srun has started {tasks} tasks on {num_nodes} machines ({spread}), not as many on each; use "
            "--ntasks-per-node instead of --ntasks."
        )
    rank, local_rank = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
    return Launched("srun", rank, local_rank, int(environment["SLURM_NODEID"]), tasks // num_nodes, num_nodes)


def choose_processes(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    """Processes on each machine, and machines: as given, else as launched, else one.

    Raises:
        ConfigError: when what is given is below 1 or contradicts the launcher, or several machines are asked for
            without one.
    """
    for name, given in (("devices", devices), ("num_nodes", num_nodes)):
        if given is not None and given < 1:
            raise ConfigError(f"{name} is {given}; it must be at least 1.")
    place = launched()
    if place is None:
        chosen = (devices or 1, num_nodes or 1)
        _check_without_launcher(devices, chosen[1])
        return chosen
    for name, given, found in (("devices", devices, place.devices), ("num_nodes", num_nodes, place.num_nodes)):
        if given is not None and given != found:
            raise ConfigError(
                f"{name} is {given}, but {place.by} has started {place.devices} processes on each of "
                f"{place.num_nodes} machines; leave {name} out (or give --{name} {found}), or start as many."
            )
    return place.devices, place.num_nodes


def _check_without_launcher(devices: int | None, num_nodes: int) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if num_nodes > 1 and missing:
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


class Company:
    """The processes of a run before training begins, when the first one makes what the others need.

    Args:
        place: where this one is.
        store: in which they leave word for each other; None where no other waits, as among those that Fabric starts
            once the first has made everything.
    """

    def __init__(self, place: Launched, store: Store | None) -> None:
        self.place = place
        self._store = store
        self._heard = False
        self._met = False

    @property
    def is_first(self) -> bool:
        """Whether this process makes what all need."""
        return self.place.rank == 0

    def announce(self, name: str, value: str) -> None:
        """Tell the others that the first has made ``name``.

        Raises:
            Mim3dError: when another process has failed meanwhile.
        """
        if self._store is not None:
            self._raise_failure(self._store)
            self._store.set(name, value)

    def awaited(self, name: str) -> str | None:
        """What the first announces of ``name``, waiting for it; None where it has made it before this one started.

        Raises:
            Mim3dError: when the first has failed or is gone.
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
            raise _gone(_address()) from error

    def meet(self) -> None:
        """Wait until every process has come to here; the others wait for the first, and the first for all of them.

        Raises:
            Mim3dError: when one has failed on the way, or the first is gone.
        """
        store = self._store
        if store is None:
            return
        if not self.is_first:
            store.add("arrived", 1)
            self.awaited("all")
        else:
            while store.add("arrived", 0) < self.place.num_meeting - 1:
                self._raise_failure(store)
                time.sleep(_POLL_S)
            self.announce("all", "here")
        self._met = True

    def fail(self, sentence: str, *, lingering: bool = True) -> None:
        """Tell the others why this process ends; nothing once all have met, when training has ways of its own.

        Args:
            sentence: why.
            lingering: the first stays a moment, for those that are still starting: the store may end with it.
        """
        store = self._store
        if store is None or self._met:
            return
        try:
            if not store.check(["failed"]):
                store.set("failed", sentence)
            if not self._heard:
                store.add("heard", 1)
            until = time.monotonic() + (_FAREWELL_S if lingering and self.is_first else 0.0)
            while time.monotonic() < until and store.add("heard", 0) < self.place.num_meeting:
                time.sleep(_POLL_S)
        except (RuntimeError, ValueError):
            # Whoever kept the store has gone; there is nobody left to tell.
            return

    def _raise_failure(self, store: Store) -> None:
        if store.check(["failed"]):
            sentence = store.get("failed").decode()
            if not self._heard:
                store.add("heard", 1)
            self._heard = True
            raise Mim3dError(f"process {self.place.rank} ends because another one has failed: {sentence}")


@contextmanager
def company(devices: int, num_nodes: int) -> Iterator[Company]:
    """Join the processes of a run; an error on the way is told to all.

    Args:
        devices: processes on each machine.
        num_nodes: machines.
    Raises:
        Mim3dError: when the first process cannot be reached.
    """
    place = launched() or own_place(devices, num_nodes)
    joined = Company(place, _open_store(place))
    try:
        yield joined
    except BaseException as error:
        joined.fail(str(error).strip() or type(error).__name__, lingering=isinstance(error, Exception))
        raise


def own_place(devices: int, num_nodes: int) -> Launched:
    """The place of a process that Fabric's own launcher has started, or will start others from."""
    node_rank, local_rank = (int(os.environ.get(name, 0)) for name in ("NODE_RANK", "LOCAL_RANK"))
    return Launched("mim3d", node_rank * devices + local_rank, local_rank, node_rank, devices, num_nodes)


def _open_store(place: Launched) -> Store | None:
    if place.world_size == 1 or (place.by == "mim3d" and (place.num_nodes == 1 or place.local_rank > 0)):
        return None
    host, port = meeting_place(place)
    # torchrun's agent keeps a store at this address already, over restarts too: each attempt has words of its own.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            host,
            port,
            is_master=place.rank == 0 and not kept,
            timeout=_UNTIL_THE_FIRST_ANSWERS,
            wait_for_workers=False,
            # The store by which the processes meet for training is opened at the same address later.
            multi_tenant=True,
        )
    except (RuntimeError, ValueError) as error:
        raise _gone(f"{host}:{port}") from error
    return PrefixStore(f"mim3d/{attempt}", store)


def meeting_place(place: Launched) -> tuple[str, int]:
    """Host and port at which the processes meet; also set as MASTER_ADDR and MASTER_PORT, as torch wants them.

    Under SLURM, unless those are set, the first machine of the step and a port that follows from job and step.
    """
    environment = os.environ
    if place.by == "srun":
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

        machines = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "127.0.0.1"))
        environment.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(machines))
        number = int(environment.get("SLURM_JOB_ID", "0")) + 7919 * int(environment["SLURM_STEP_ID"])
        # Below the ports that Linux gives to outgoing connections.
        environment.setdefault("MASTER_PORT", str(15000 + number % 15000))
    return environment["MASTER_ADDR"], int(environment["MASTER_PORT"])


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _gone(address: str) -> Mim3dError:
    return Mim3dError(
        f"{socket.gethostname()} does not reach the first process at {address}: it has ended, or the network does not "
        "let it be reached; look at its own message, then at MASTER_ADDR and MASTER_PORT."
    )
