"""What a step of each pre-training method costs, against its plain counterpart, on the same voxels.

Run: ``OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/methods.py`` (or ``make bench``), one thread on a CPU; a GPU
where there is one. ``--parts`` names some of the table ``PARTS``. Both networks of a part have the same sizes and take
steps in turns in one process; on a CPU the clock counts its own time alone. A step is forward, backward and the
optimiser, each as its side has it: mim3d's by ``build_optimizer``, the counterpart's ``torch.optim.AdamW`` as it comes.
The ratio without the optimiser stands beside it. A counterpart that fails under autocast takes its steps in float32,
which its row says. The least of a few steps counts. Peak memory is that of a process for each side alone. Writes
benchmarks/results/methods_PART_*.json.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from yardstick.apart import print_table
from yardstick.dense_mae import DenseMAE
from yardstick.machine import Row, describe, options, peak_memory, prepare, write_results
from yardstick.monai_mae import MonaiMAE
from yardstick.plain_voco import PlainVoCo
from yardstick.tutorial_swin import TutorialSwinSSL

from mim3d.backbones import ResEnc, Swin, ViT, create_recipe
from mim3d.methods.mae import MAE
from mim3d.methods.swinunetr_ssl.method import SwinUNETRSSL
from mim3d.methods.voco.method import VoCo
from mim3d.objective import Batch
from mim3d.training.optim import build_optimizer
from mim3d.training.schedule import Optimisation, make_schedule

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("mim3d", "counterpart")

#: Voxels of a crop and of a hidden place along each axis where every place is computed.
DENSE_EDGE, MASK_SIZE = 64, (16, 16, 16)
VOCO = VoCo(crop_size=(32, 32, 32), cells=(2, 2, 2))

Loss = Callable[[], Tensor]
#: Size, samples of a step and device -> the network, and what computes its loss on a fixed batch.
Builder = Callable[[str, int, torch.device], tuple[nn.Module, Loss]]


@dataclass(frozen=True)
class Part:
    """A method and its counterpart.

    Attributes:
        counterpart: What it is compared with, in words.
        mark: How many times as fast a step should be.
        sizes: Names of the backbones that are measured.
        small: One of them, or a smaller one, to try the script.
        batch_size: Samples of a step.
        build: The two sides, mim3d's first.
        counterpart_precisions: In which of ``PRECISIONS`` the counterpart can be trained.
    """

    counterpart: str
    mark: float
    sizes: Sequence[str]
    small: str
    batch_size: int
    build: tuple[Builder, Builder]
    counterpart_precisions: Sequence[str] = ("float32", "bfloat16")

    def precision_of(self, side: int, precision: str) -> str:
        """In which precision a side takes its steps where ``precision`` is asked for."""
        return precision if side == 0 or precision in self.counterpart_precisions else "float32"


def batch_of(tokens_and_hidden: tuple[int, int], edge: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Crops of noise and masks that hide the same number of tokens of each."""
    length, num_hidden = tokens_and_hidden
    generator = torch.Generator().manual_seed(0)
    volumes = torch.rand(batch_size, 1, 1, edge, edge, edge, generator=generator)
    return volumes, torch.rand(batch_size, 1, length, generator=generator).argsort(-1).argsort(-1) < num_hidden


def vit_of(size: str) -> tuple[ViT, int]:
    """A plain vision transformer, and the edge of a crop of six tokens along each axis."""
    recipe = create_recipe(size)
    assert isinstance(recipe, ViT)
    return recipe, 6 * recipe.token_edge


def our_mae(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """MAE on a plain vision transformer."""
    recipe, edge = vit_of(size)
    objective = MAE(size=(edge, edge, edge)).planned(recipe, [(edge, edge, edge)]).build(recipe).to(device)
    (tokens,) = objective.tokens_per_sample
    volumes, hidden = batch_of((tokens.visible + tokens.hidden, tokens.hidden), edge, batch_size)
    batch = {"crop": volumes.to(device), "hidden/crop": hidden.to(device)}
    return objective, lambda: objective(batch, 0.0).loss


def monai_mae(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """MONAI's, of the same sizes."""
    recipe, edge = vit_of(size)
    network = MonaiMAE(recipe, MAE().decoder(recipe), edge, MAE().mask_ratio).to(device)
    volumes = batch_of((1, 0), edge, batch_size)[0].flatten(0, 1).to(device)
    return network, lambda: network(volumes)


def resenc_of(size: str) -> ResEnc:
    """nnU-Net's residual encoder, for crops of ``DENSE_EDGE``."""
    recipe = create_recipe(size)
    assert isinstance(recipe, ResEnc)
    return recipe


def dense_batch(mask_edge: int, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Crops of ``DENSE_EDGE`` and masks of blocks."""
    length = (DENSE_EDGE // mask_edge) ** 3
    volumes, hidden = batch_of((length, round(MAE().mask_ratio * length)), DENSE_EDGE, batch_size)
    return volumes.to(device), hidden.to(device)


def our_dense_mae(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """MAE on a network of convolutions, which computes every place."""
    recipe, edges = resenc_of(size), (DENSE_EDGE,) * 3
    objective = MAE(size=edges, mask_size=MASK_SIZE).planned(recipe, [edges]).build(recipe).to(device)
    volumes, hidden = dense_batch(MASK_SIZE[0], batch_size, device)
    batch = {"crop": volumes, "hidden/crop": hidden}
    return objective, lambda: objective(batch, 0.0).loss


def plain_dense_mae(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """nnU-Net's network with zeros in hidden places."""
    network = DenseMAE(resenc_of(size), MASK_SIZE[0]).to(device)
    volumes, hidden = dense_batch(MASK_SIZE[0], batch_size, device)
    return network, lambda: network(volumes.flatten(0, 1), hidden.flatten(0, 1))


def voco_batch(batch_size: int, device: torch.device) -> Batch:
    """Base crops, random crops and their overlaps."""
    rng, grid = np.random.default_rng(0), VOCO.grid()
    places = rng.integers(0, np.array(grid.footprint) - np.array(grid.crop_size) + 1, (batch_size * VOCO.num_crops, 3))
    overlaps = torch.from_numpy(grid.overlaps(places)).reshape(batch_size, VOCO.num_crops, -1)
    numbers = {"base": grid.num_bases, "crop": VOCO.num_crops}
    generator = torch.Generator().manual_seed(0)
    crops = {
        key: torch.rand(batch_size, number, 1, *grid.crop_size, generator=generator) for key, number in numbers.items()
    }
    return {key: value.to(device) for key, value in {**crops, "overlap": overlaps}.items()}


def our_voco(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """VoCo, the movement of its teacher included."""
    objective, batch = VOCO.build(create_recipe(size)).to(device), voco_batch(batch_size, device)

    def loss_of() -> Tensor:
        with torch.no_grad():
            objective.after_step(0.0)
        return objective.forward(batch, 0.0).loss

    return objective, loss_of


def plain_voco(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """A straightforward step of the same sizes."""
    network, batch = PlainVoCo(create_recipe(size).build(), VOCO.dim).to(device), voco_batch(batch_size, device)
    return network, lambda: network(batch["crop"], batch["base"], batch["overlap"])


def swin_of(size: str) -> tuple[Swin, int]:
    """An encoder of SwinUNETR, and the edge of a crop: the paper's, or for narrow ones two of the coarsest tokens."""
    recipe = create_recipe(size)
    assert isinstance(recipe, Swin)
    return recipe, 96 if recipe.feature_size >= 48 else 64


def our_swin(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """SwinUNETR's pre-training, all views in one pass."""
    recipe, edge = swin_of(size)
    objective = SwinUNETRSSL(size=(edge, edge, edge)).build(recipe).to(device)
    batch = {"crop": batch_of((1, 0), edge, batch_size)[0].to(device)}
    return objective, lambda: objective(batch, 0.0).loss


def tutorial_swin(size: str, batch_size: int, device: torch.device) -> tuple[nn.Module, Loss]:
    """The same with MONAI's encoder, one view after the other."""
    recipe, edge = swin_of(size)
    network = TutorialSwinSSL(recipe).to(device)
    volumes = batch_of((1, 0), edge, batch_size)[0].flatten(0, 1).to(device)
    return network, lambda: network(volumes)


PARTS = {
    "voco": Part(
        "a straightforward VoCo step",
        mark=1.0,
        sizes=("resenc_nano", "hybrid_nano"),
        small="resenc_nano",
        batch_size=1,
        build=(our_voco, plain_voco),
    ),
    "dense_mae": Part(
        "nnU-Net's network as a dense masked autoencoder",
        mark=1.0,
        sizes=("resenc_nano", "resenc_s"),
        small="resenc_nano",
        batch_size=1,
        build=(our_dense_mae, plain_dense_mae),
    ),
    "mae": Part(
        "MONAI's MaskedAutoEncoderViT",
        mark=1.3,
        sizes=("vit_small", "vit_base"),
        small="vit_nano",
        batch_size=2,
        build=(our_mae, monai_mae),
        # It puts tokens of bfloat16 into a tensor of float32 under autocast, which torch refuses (MONAI 1.6.1).
        counterpart_precisions=("float32",),
    ),
    "swinunetr_ssl": Part(
        "MONAI's SwinUNETR pre-training step, as its tutorial takes it",
        mark=1.5,
        sizes=("swin_tiny", "swin_small"),
        small="swin_tiny",
        batch_size=2,
        build=(our_swin, tutorial_swin),
    ),
}


class Stepper:
    """One side of a part: takes steps, and keeps the least time of a step and of its forward and backward pass.

    Args:
        part: The part.
        side: Which of its sides.
        size: Name of the backbone.
        precision: One of ``PRECISIONS``.
        device: Where.
    """

    def __init__(self, part: Part, side: int, size: str, precision: str, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network, self.loss_of = part.build[side](size, part.batch_size, device)
        if side == 0:
            schedule = make_schedule(Optimisation(learning_rate=1e-6), effective_batch=1, max_steps=10)
            self.optimizer: torch.optim.Optimizer = build_optimizer(self.network, schedule)
        else:
            self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-6)
        self.dtype, self.device = PRECISIONS[part.precision_of(side, precision)], device
        self.step_s = self.passes_s = float("inf")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return time.perf_counter()
        return time.process_time()

    def step(self) -> None:
        """One step, timed."""
        start_s = self._now()
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss_of()
        torch.autograd.backward(loss)
        self.passes_s = min(self.passes_s, self._now() - start_s)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step_s = min(self.step_s, self._now() - start_s)


def memory_gib(name: str, side: int, size: str, precision: str, device: torch.device) -> float:
    """Peak memory of three steps in a process of their own."""
    case = json.dumps([name, side, size, precision])
    command = [sys.executable, __file__, "--device", device.type, "--memory_of", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
    return float(done.stdout.splitlines()[-1])


def measure(name: str, size: str, precision: str, device: torch.device, num_rounds: int) -> Row:
    """One row of the results."""
    part = PARTS[name]
    sides = [Stepper(part, side, size, precision, device) for side in range(2)]
    for number in range(num_rounds + 1):
        for side in sides:
            side.step()
        if number == 0:
            # The first step allocates.
            for side in sides:
                side.step_s = side.passes_s = float("inf")
    memory = [memory_gib(name, side, size, precision, device) for side in range(2)]
    ours, theirs = sides
    ratio = theirs.step_s / ours.step_s
    return {
        "part": name,
        "size": size,
        "precision": precision,
        "counterpart_in": part.precision_of(1, precision),
        "batch": part.batch_size,
        "s_per_step": round(ours.step_s, 3),
        "counterpart_s": round(theirs.step_s, 3),
        "times_as_fast": round(ratio, 2),
        "without_optimiser": round(theirs.passes_s / ours.passes_s, 2),
        "mark": part.mark,
        "met": ratio >= part.mark,
        "memory_gib": round(memory[0], 2),
        "counterpart_gib": round(memory[1], 2),
    }


def main() -> None:
    """Parse arguments; measure the memory of one case when told to, else all."""
    parser = options(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="methods to measure")
    parser.add_argument("--sizes", nargs="+", help="backbones, instead of those of each part")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each side, of which the least counts")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    prepare(device)
    if arguments.memory_of is not None:
        name, side, size, precision = json.loads(arguments.memory_of)
        stepper = Stepper(PARTS[name], side, size, precision, device)
        for _ in range(3):
            stepper.step()
        print(peak_memory(device) / 2**30)
        return
    for name in arguments.parts:
        rows = []
        sizes = [PARTS[name].small] if arguments.quick else arguments.sizes or PARTS[name].sizes
        for size in sizes:
            for precision in PRECISIONS:
                rows.append(measure(name, size, precision, device, 1 if arguments.quick else arguments.rounds))
                print(f"{name} on {size}, {precision}, against {PARTS[name].counterpart}:")
                print_table(rows[-1:])
        if not arguments.quick:
            write_results(f"methods_{name}_{device.type}", describe(device), rows)


if __name__ == "__main__":
    main()
