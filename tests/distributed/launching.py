"""Starting commands in several processes, as torchrun and srun do it; machines played by network namespaces."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

#: What a launcher may have left in the environment of the tests themselves.
_LEFT = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

MIM3D = (sys.executable, "-m", "mim3d")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")

SUBNET = "10.213.7"


def plain_environment(**changes: str) -> dict[str, str]:
    """The environment without a launcher's words, with one thread and with ``changes``."""
    kept = {key: value for key, value in os.environ.items() if key not in _LEFT and not key.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **changes}


def start(command: Sequence[str], **changes: str) -> subprocess.Popen[str]:
    """Start a command; its output is one text."""
    return subprocess.Popen(
        list(command),
        env=plain_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 300.0) -> list[tuple[int, str]]:
    """Exit code and output of each; all are killed when one does not end."""
    until = time.monotonic() + timeout_s
    try:
        outputs = [process.communicate(timeout=max(until - time.monotonic(), 0.1))[0] for process in processes]
        return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]
    finally:
        for process in processes:
            process.kill()


def step_variables(rank: int, tasks: int, nodes: int, job: int, machine: str = "127.0.0.1") -> dict[str, str]:
    """What srun tells task ``rank`` of a step."""
    per_node = tasks // nodes
    values: Mapping[str, object] = {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": 0,
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else per_node,
        "SLURM_STEP_NODELIST": machine,
        "SLURM_NTASKS": tasks,
        "SLURM_NNODES": nodes,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank % per_node,
        "SLURM_NODEID": rank // per_node,
    }
    return {name: str(value) for name, value in values.items()}


def srun(command: Sequence[str], tasks: int, nodes: int = 1) -> list[subprocess.Popen[str]]:
    """The command once per task, with the variables that srun would set."""
    # The port follows from the job's number, which must not be that of a test that runs beside this one.
    job = os.getpid() * 13 + int(time.monotonic() * 10)
    return [start(command, **step_variables(rank, tasks, nodes, job)) for rank in range(tasks)]


@contextmanager
def machines(number: int) -> Iterator[list[tuple[str, ...]]]:
    """Network namespaces on one bridge; each is given as the words that run a command in it.

    Machine ``i`` has the address ``SUBNET.(i + 1)`` on its interface ``eth0``.

    Raises:
        OSError: where they are not permitted.
    """
    tag = f"m{os.getpid() % 10000}"
    names = [f"{tag}n{index}" for index in range(number)]
    try:
        _ip(f"link add {tag} type bridge", f"link set {tag} up")
        for index, name in enumerate(names):
            _ip(
                f"netns add {name}",
                f"link add {tag}v{index} type veth peer name eth0 netns {name}",
                f"link set {tag}v{index} master {tag}",
                f"link set {tag}v{index} up",
                f"-n {name} addr add {SUBNET}.{index + 1}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
            )
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", tag], capture_output=True, check=False)


def _ip(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"ip {command}: {done.stderr.strip()}")
