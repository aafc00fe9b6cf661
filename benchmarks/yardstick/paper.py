"""A model on paper of many GPUs: what they hold, exchange and read in a step, and which memory, network and disks do.

Gradients are summed by rings (Patarasuk & Yuan, J. Parallel Distrib. Comput. 2009): every process sends and receives
``2 (N - 1) / N`` times their bytes. Where a machine has several GPUs, the ring enters and leaves it once, so that this
is also what passes each machine's network card. DistributedDataParallel sends a bucket while the backward pass goes on
below it (Li et al., VLDB 2020); only the last bucket has nothing left to hide behind.

Every process holds all weights, so that the memory of one GPU bounds the network. Activations are counted by a step on
fake tensors (``mim3d.training.memory``) and extended to other sizes as networks get wider: parameters grow with the
square of the width, activations with the width.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from mim3d.training.memory import RESERVE, SCRATCH_BYTES, StepMemory
from mim3d.training.schedule import Optimisation
from mim3d.training.settings import LoopSettings
from yardstick.batches import hybrid, mim_with_children, random_batch
from yardstick.flops import count_flops
from yardstick.machine import Row

GPUS = (8, 16, 32, 64, 128, 256, 512)
GPUS_PER_MACHINE = 8
SAMPLES_PER_GPU = 4
#: Network of each machine, in Gbit/s.
NETWORKS = (10, 25, 100, 200, 400)
#: What one GPU sustains of the needed operations, in TFLOP/s: an assumption, high, since a quick step needs most.
SUSTAINED_TFLOPS = 50.0
#: Share of a step in which gradients come about: two of three parts of its operations.
BACKWARD_SHARE = 2 / 3
BUCKET_BYTES = 25 * 2**20
#: One hop of a ring: an assumption.
HOP_S = 10e-6
#: Memory-to-memory between the GPUs of a machine, in Gbyte/s: an assumption (NVLink of an A100 is 300 each way).
IN_MACHINE_GB_PER_S = 150.0
MARK = 0.95
#: Memory of a GPU, in GB.
GPU_MEMORIES = (24, 40, 80, 141)
#: Float32 weights, gradients and AdamW's two moments, and the buckets through which gradients are exchanged.
BYTES_PER_PARAMETER = 4 + 4 + 2 * 4 + 4
LARGEST = "huge"


@dataclass(frozen=True)
class Step:
    """One step of one GPU.

    Attributes:
        parameters: numbers that are trained.
        gradient_bytes: their gradients, float32.
        seconds: of its computation.
        read_bytes: from disk, of its samples.
        read_ms: one reading process's time for one sample.
    """

    parameters: int
    gradient_bytes: int
    seconds: float
    read_bytes: float
    read_ms: float


def paper_step(results: Path) -> Step:
    """The step of MiM with ``hybrid_base`` on the full hierarchy.

    Args:
        results: folder of ``data_loading_cpu.json``.
    """
    recipe = hybrid("base")
    method = mim_with_children(recipe.token_size, 4)
    objective = method.build(recipe)
    parameters = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    seconds = SAMPLES_PER_GPU * count_flops(method, recipe).needed / (SUSTAINED_TFLOPS * 1e12)
    rows = json.loads((results / "data_loading_cpu.json").read_text())["rows"]
    read_ms = next(
        row["mim3d_ms"]
        for row in rows
        if row["part"] == "loader" and row["root"] == [192, 192, 192] and row["num_workers"] == 1 and row["cold"]
    )
    return Step(parameters, 4 * parameters, seconds, SAMPLES_PER_GPU * sample_bytes(rows), read_ms)


def sample_bytes(rows: list[Row]) -> float:
    """Stored bytes that a sample of one root and four children touches, each 96^3 voxels at its resolution.

    Whole blocks of 32^3 are read: a crop of n voxels touches n + 31 along an axis on average. Crops that share blocks
    need less.
    """
    stored = next(row["bytes"] for row in rows if row["part"] == "build" and row["store"] == "mim3d 8-bit")
    voxels = next(row["voxels"] for row in rows if row["part"] == "voxels")
    per_voxel = stored / (voxels * (1 + 1 / 8 + 1 / 64))
    return 5 * (96 + 31) ** 3 * per_voxel


def exchange_s(step: Step, gpus: int, network_gbit_per_s: float) -> float:
    """Seconds of one ring all-reduce of all gradients."""
    sent = 2 * (gpus - 1) / gpus * step.gradient_bytes
    slowest = IN_MACHINE_GB_PER_S * 1e9
    if gpus > GPUS_PER_MACHINE:
        slowest = min(slowest, network_gbit_per_s * 1e9 / 8)
    buckets = -(-step.gradient_bytes // BUCKET_BYTES)
    return sent / slowest + buckets * 2 * (gpus - 1) * HOP_S


def efficiency(step: Step, gpus: int, network_gbit_per_s: float) -> float:
    """Share of the time that is computation; the exchange hides behind the backward pass but for its last bucket."""
    exchange = exchange_s(step, gpus, network_gbit_per_s)
    last = exchange * min(1.0, BUCKET_BYTES / step.gradient_bytes)
    hidden = min(exchange - last, BACKWARD_SHARE * step.seconds)
    return step.seconds / (step.seconds + exchange - hidden)


def needed_gbit_per_s(step: Step, gpus: int) -> float | None:
    """Network of each machine from which on the efficiency is 95 %; None where no network is enough."""
    if efficiency(step, gpus, 1e9) < MARK:
        return None
    low, high = 0.01, 1e6
    for _ in range(100):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if efficiency(step, gpus, middle) >= MARK else (middle, high)
    return high


@dataclass(frozen=True)
class Held:
    """What the largest network holds in a step of one sample, with bfloat16 and recomputation.

    Attributes:
        encoder: Parameters of the encoder.
        parameters: Parameters that pre-training trains, those of the decoder included.
        activation_bytes: Bytes of everything that is computed, when they are most.
    """

    encoder: int
    parameters: int
    activation_bytes: int

    def needed_bytes(self, parameters: float) -> float:
        """Memory of one of several GPUs that train a network of this kind with that many parameters."""
        activations = self.activation_bytes * math.sqrt(parameters / self.parameters)
        tensors = BYTES_PER_PARAMETER * parameters + activations
        return (1 + RESERVE["cuda"]) * tensors + SCRATCH_BYTES["cuda"]

    def most_parameters(self, memory_bytes: float) -> float:
        """Parameters of the largest network of this kind that fits."""
        low, high = 1.0, memory_bytes
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.needed_bytes(middle) <= memory_bytes else (low, middle)
        return low


def paper_held() -> Held:
    """What MiM with the largest network on the full hierarchy holds."""
    recipe = replace(hybrid(LARGEST), recompute=True)
    method = mim_with_children(recipe.token_size, 4)
    sample = {key: (tuple(value.shape[1:]), value.dtype) for key, value in random_batch(method, recipe, 1).items()}
    loop = LoopSettings(max_steps=1, accelerator="cpu", precision="bf16-mixed", devices=2)
    optim = Optimisation(learning_rate=1e-4, weight_decay=0.05)
    need = StepMemory(lambda: method.build(recipe), sample, loop, optim).need(1, 1)
    objective = method.build(recipe)
    trained = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    encoder = sum(parameter.numel() for parameter in recipe.build().parameters())
    return Held(encoder, trained, need.activations)


def print_paper() -> None:
    """Print assumptions and tables as they stand in docs/concepts/scaling.md."""
    step = paper_step(Path(__file__).parents[1] / "results")
    print(
        f"{step.parameters / 1e6:.1f} M trained parameters: {step.gradient_bytes / 1e6:.0f} MB of gradients a step, in "
        f"{-(-step.gradient_bytes // BUCKET_BYTES)} buckets. {SAMPLES_PER_GPU} samples per GPU: {step.seconds:.3f} s a "
        f"step at {SUSTAINED_TFLOPS:g} TFLOP/s; {step.read_bytes / SAMPLES_PER_GPU / 1e6:.1f} MB read per sample.\n"
    )
    print(_table(_network_lines(step)) + "\n")
    print(_table(_disk_lines(step)) + "\n")
    held = paper_held()
    print(
        f"hybrid_{LARGEST}: {held.encoder / 1e6:.0f} M parameters, {16 * held.encoder / 1e9:.1f} GB with gradients and "
        f"moments; with its decoder {held.parameters / 1e6:.0f} M and {16 * held.parameters / 1e9:.1f} GB, "
        f"{BYTES_PER_PARAMETER * held.parameters / 1e9:.1f} GB with buckets, {held.activation_bytes / 1e9:.1f} GB of "
        f"activations, {held.needed_bytes(held.parameters) / 1e9:.1f} GB in all.\n"
    )
    print(_table(_memory_lines(held)))


def _network_lines(step: Step) -> list[list[str]]:
    """Efficiency by number of GPUs and network."""
    heads = ["GPUs", "machines", "MB sent by each", *(f"{network} Gbit/s" for network in NETWORKS), "95 % needs"]
    lines = [heads]
    for gpus in GPUS:
        inside = gpus <= GPUS_PER_MACHINE
        needed = needed_gbit_per_s(step, gpus)
        last = "no network" if inside else "more than bandwidth" if needed is None else f"{needed:.0f} Gbit/s"
        sent = f"{2 * (gpus - 1) / gpus * step.gradient_bytes / 1e6:.0f}"
        shares = (f"{efficiency(step, gpus, network):.0%}" for network in NETWORKS)
        lines.append([str(gpus), str(gpus // GPUS_PER_MACHINE), sent, *shares, last])
    return lines


def _disk_lines(step: Step) -> list[list[str]]:
    """What is read, when no GPU waits for another or for the disk."""
    lines = [["GPUs", "effective batch", "samples/s", "GB/s read", "GB/s per machine", "reading processes per GPU"]]
    for gpus in GPUS:
        rate = gpus * SAMPLES_PER_GPU / step.seconds
        read = gpus * step.read_bytes / step.seconds / 1e9
        per_machine, workers = read * GPUS_PER_MACHINE / gpus, rate / gpus * step.read_ms / 1e3
        numbers = (f"{rate:.0f}", f"{read:.1f}", f"{per_machine:.2f}", f"{workers:.1f}")
        lines.append([str(gpus), str(gpus * SAMPLES_PER_GPU), *numbers])
    return lines


def _memory_lines(held: Held) -> list[list[str]]:
    """The largest network that DDP trains, by the memory of each GPU."""
    lines = [["memory of each GPU", "weights, gradients, moments and buckets alone", "one sample with recomputation"]]
    for gigabytes in GPU_MEMORIES:
        alone, trained = gigabytes * 1e9 / BYTES_PER_PARAMETER, held.most_parameters(gigabytes * 1e9)
        lines.append([f"{gigabytes} GB", *(f"{parameters / 1e9:.2f} billion" for parameters in (alone, trained))])
    return lines


def _table(lines: list[list[str]]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)
